"""One rank of a DeepSpeed run that trains only the rows of new tags; started by test_trained_rows.py.

    python zero_rows.py STAGE FOLDER

Two steps of two micro-batches each. Prints, as JSON: the rows of embedding and head that moved, and how
many tensors of the tower and of the language model did.
"""

from __future__ import annotations

import json
import os
import sys

import deepspeed
import torch

from fixtures import make_sample
from reflectvlm.ending import exit_with
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.objectives import CrossEntropy
from reflectvlm.train.optim import AdamW
from reflectvlm.train.update import loss_inputs
from reflectvlm.types import Instruction

TAGS = ("<REFLECTION>", "</REFLECTION>")


def main(stage: int, folder: str) -> int:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    policy = load_policy(folder, new_tags=TAGS, embeddings="new_tags", freeze_parts=("vision", "projector"))
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    train(policy, stage)
    after = policy.model.state_dict()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    rows = {
        name: (after[name] != before[name]).any(1).nonzero().flatten().tolist()
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight")
    }
    tower = sum("visual." in name for name in moved)
    if os.environ["RANK"] == "0":
        print(json.dumps({"rows": list(rows.values()), "tower": tower, "language": len(moved) - tower}))
    return 0


def train(policy: QwenVL, stage: int) -> None:
    engine, *_ = deepspeed.initialize(
        model=policy.model,
        optimizer=AdamW(lr=1e-2, weight_decay=0.5).build(policy.module.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    rank = int(os.environ["RANK"])
    for seed in (0, 1, 2, 3):
        prompt = policy.prompt(make_sample(seed + 10 * rank), Instruction())
        batch = policy.batch([(prompt, policy.answer("So <REFLECTION>look</REFLECTION> 7"))])
        scores = policy.score(batch, policy.features(batch.images))
        engine.backward(CrossEntropy()(loss_inputs(batch, scores.logprobs, scores.entropy)).loss)
        engine.step()


if __name__ == "__main__":
    exit_with(lambda: main(int(sys.argv[1]), sys.argv[2]))
