"""Only the rows of new tags train: with decay, accumulation, tied or not, under LoRA, after a resume."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import make_sample
from reflectvlm.models.freezing import train_only_rows, trainable_table, trained_rows
from reflectvlm.models.loading import load_tokenizer
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import tiny_config, tiny_image_processor
from reflectvlm.objectives import CrossEntropy
from reflectvlm.train.optim import AdamW
from reflectvlm.train.packing import optimizer_from_tensors, optimizer_to_tensors
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import Updater
from reflectvlm.types import Instruction
from training import small_rl

TAGS = ("<REFLECTION>", "</REFLECTION>")
FIRST, ROWS, WIDTH = 2318, 2432, 128  # the tiny tokenizer's ids, rows and columns of the tiny embedding
ADAMW = AdamW(lr=1e-2, weight_decay=0.5)
PARTS: Any = ("vision", "projector")


def untied_folder(folder: Path) -> str:
    """A tiny model whose head is a matrix of its own, as in the 7B model."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = load_tokenizer("tiny")
    config = tiny_config(tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return str(folder)


def only_tags(path: str = "tiny", **settings: Any) -> QwenVL:
    return load_policy(path, new_tags=TAGS, embeddings="new_tags", freeze_parts=PARTS, **settings)


def updater(policy: QwenVL, micro_tokens: int = 150) -> Updater:
    return Updater(
        policy=policy,
        objective=CrossEntropy(),
        optimizer=ADAMW.build(policy.module.parameters()),
        runtime=Runtime(),
        micro_tokens=micro_tokens,
        max_grad_norm=1.0,
    )


def train(policy: QwenVL, one: Updater, steps: int) -> dict[str, float]:
    """Steps on four rows whose answers hold both tags and old words."""
    rows = [policy.prompt(make_sample(seed), Instruction()) for seed in range(4)]
    batch = policy.batch([(row, policy.answer("So <REFLECTION>look</REFLECTION> 7")) for row in rows])
    metrics = {}
    for _ in range(steps):
        metrics = one(batch, ADAMW.lr)
    return metrics


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def only_rows_changed(before: dict[str, Tensor], after: dict[str, Tensor], names: list[str]) -> None:
    old = [i for i in range(ROWS) if i not in (FIRST, FIRST + 1)]
    for name in names:
        assert torch.equal(after[name][old], before[name][old]), f"old rows of {name} moved"
        for row in (FIRST, FIRST + 1):
            assert not torch.equal(after[name][row], before[name][row]), f"row {row} of {name} did not move"


EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_are_bit_identical(tied: bool, tmp_path: Path) -> None:
    """Weight decay, a hook lost between micro-batches, or a head that nobody thought of moves them; or
    the language model does not train at all; or the frozen tower does."""
    policy = only_tags("tiny" if tied else untied_folder(tmp_path))
    assert (policy.model.lm_head.weight is policy.model.get_input_embeddings().weight) == tied
    before = copy.deepcopy(policy.model.state_dict())
    train(policy, updater(policy), 3)
    after = policy.model.state_dict()
    only_rows_changed(before, after, [EMBEDDING, HEAD])
    moved = changed(before, after)
    assert not [name for name in moved if "visual." in name]
    assert {name for name in after if "visual." not in name} == moved


def test_accumulation_and_clipping_see_only_the_rows() -> None:
    """A norm that counts the emptied rows scales every step down, and differs with micro_tokens."""
    norms, rows = [], []
    for micro_tokens in (1, 4096):
        policy = only_tags()
        norms.append(train(policy, updater(policy, micro_tokens), 1)["grad_norm"])
        rows.append(policy.model.lm_head.weight.detach()[FIRST : FIRST + 2])
        gradient = policy.model.lm_head.weight.grad
        assert gradient.count_nonzero(dim=1).nonzero().flatten().tolist() == [FIRST, FIRST + 1]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    # Adam's first step is lr * g / |g|: a sign that flips at rounding would differ by 2 lr.
    torch.testing.assert_close(rows[0], rows[1], atol=1e-3, rtol=0)
    whole = load_policy("tiny", new_tags=TAGS, freeze_parts=PARTS)
    assert train(whole, updater(whole), 1)["grad_norm"] > norms[0] * 1.01


def test_a_frozen_tower_keeps_no_graph() -> None:
    """Activations of the tower are most of a step's memory; nobody needs them when it is frozen."""
    policy = only_tags()
    prompt = policy.prompt(make_sample(), Instruction())
    assert not policy.features(prompt.patches).requires_grad
    whole = load_policy("tiny", new_tags=TAGS)
    assert whole.features(prompt.patches).requires_grad


def test_two_groups_survive_a_checkpoint() -> None:
    """Moments that come back at the wrong parameter, or decay that comes back for the rows."""
    straight = only_tags()
    train(straight, updater(straight), 4)

    first = only_tags()
    one = updater(first)
    train(first, one, 2)
    packed = optimizer_to_tensors(one.optimizer.state_dict())
    weights = copy.deepcopy(first.model.state_dict())
    second = only_tags()
    second.model.load_state_dict(weights)
    other = updater(second)
    other.optimizer.load_state_dict(optimizer_from_tensors(packed.tensors, packed.json))
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.5, 0.0]
    train(second, other, 2)
    assert changed(straight.model.state_dict(), second.model.state_dict()) == set()


def test_groups() -> None:
    """Without marked parameters there must be one group, or older checkpoints no longer load."""
    tags = only_tags()
    whole, by_rows = ADAMW.build(tags.module.parameters()).param_groups
    assert [id(p) for p in by_rows["params"]] == [id(tags.model.lm_head.weight)]
    assert id(tags.model.lm_head.weight) not in {id(p) for p in whole["params"]}
    assert len(ADAMW.build(load_policy("tiny", new_tags=TAGS).module.parameters()).param_groups) == 1
    (rows_only,) = ADAMW.build([tags.model.lm_head.weight]).param_groups
    assert rows_only["weight_decay"] == 0


def test_the_table_counts_rows(tmp_path: Path) -> None:
    """A start-of-run table that says 300,000 numbers of the embedding train when 256 do."""
    for path, matrices in (("tiny", 1), (untied_folder(tmp_path), 2)):
        policy = only_tags(path)
        everything = {part: total for part, total, _ in trainable_table(policy.model)}
        trains = {part: count for part, _, count in trainable_table(policy.model)}
        assert trains["vision"] == trains["projector"] == 0
        assert everything["language"] - trains["language"] == matrices * (ROWS - 2) * WIDTH


def test_a_saved_model_means_the_same_rows(tmp_path: Path) -> None:
    """In the second stage the tags are there already; the rows that train must not become none, or
    the next spare ones."""
    policy = only_tags()
    train(policy, updater(policy), 1)
    policy.save(tmp_path)
    again = only_tags(str(tmp_path))
    assert trained_rows(again.model.lm_head.weight) == (FIRST, FIRST + 1)
    before = copy.deepcopy(again.model.state_dict())
    train(again, updater(again), 2)
    only_rows_changed(before, again.model.state_dict(), [EMBEDDING, HEAD])


def test_rows_train_where_language_is_frozen() -> None:
    """freeze_parts speaks about all else."""
    policy = load_policy("tiny", new_tags=TAGS, embeddings="new_tags", freeze_parts=("vision", "language"))
    before = copy.deepcopy(policy.model.state_dict())
    train(policy, updater(policy), 1)
    after = policy.model.state_dict()
    only_rows_changed(before, after, [EMBEDDING])
    assert all("visual.merger" in name for name in changed(before, after) - {EMBEDDING, HEAD})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # peft asks transformers
def test_lora() -> None:
    """peft freezes the embedding it finds; the rows must train all the same, and nothing else of it."""
    from peft import LoraConfig, get_peft_model

    policy = load_policy("tiny", new_tags=TAGS, freeze_parts=PARTS)
    lora = LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)", r=4, lora_alpha=8)
    wrapped = get_peft_model(policy.model, lora)
    train_only_rows(wrapped, (FIRST, FIRST + 1))
    policy = dataclasses.replace(policy, model=wrapped.get_base_model())
    before = copy.deepcopy(policy.model.state_dict())
    train(policy, updater(policy), 3)
    after = policy.model.state_dict()
    only_rows_changed(before, after, [EMBEDDING, HEAD])
    moved = changed(before, after) - {EMBEDDING, HEAD}
    assert len(moved) == 4 * 2 * 2  # layers, q and v, A and B
    assert all("lora_" in name for name in moved)
    trains = [count for part, _, count in trainable_table(policy.model) if part == "language"]
    assert trains == [sum(after[name].numel() for name in moved) + 2 * WIDTH]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (extra: deepspeed)")
@pytest.mark.parametrize(("stage", "tied"), [(2, True), (2, False), (1, True)])
def test_deepspeed(stage: int, tied: bool, tmp_path: Path) -> None:
    """ZeRO flattens and shards gradients: a hook that runs after it has taken them changes nothing."""
    folder = "tiny" if tied else untied_folder(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zero_rows.py")), str(stage), folder],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    seen = json.loads(printed[0].splitlines()[-1])
    assert seen["rows"] == [[FIRST, FIRST + 1]] * 2
    assert seen["tower"] == 0
    assert seen["language"] == 51


def test_a_second_call_replaces_the_rows() -> None:
    """Two hooks that each empty what the other keeps."""
    policy = only_tags()
    train_only_rows(policy.model, (FIRST + 1,))
    before = policy.model.lm_head.weight.detach().clone()
    train(policy, updater(policy), 1)
    moved = (policy.model.lm_head.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [FIRST + 1]


def test_the_reference_of_rl_is_a_copy_without_hooks(tmp_path: Path) -> None:
    """RL copies the policy for its KL term; a hook that is copied or lost would show in this step."""
    trainer = small_rl(tmp_path, policy=only_tags(), updates_per_step=1, epochs_per_step=1)
    trainer.prepare()
    assert trainer.reference is not None
    assert not any(parameter.requires_grad for parameter in trainer.reference.model.parameters())
    before = trainer.policy.model.lm_head.weight.detach().clone()
    trainer.step(0)
    assert torch.equal(trainer.policy.model.lm_head.weight[:FIRST], before[:FIRST])


def test_settings_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match=r"trains the rows of new_tags, and there are none\. Name them"):
        load_policy("tiny", embeddings="new_tags")
    with pytest.raises(ValueError, match=r"embeddings is 'tags'\. It must be 'all' or 'new_tags'"):
        load_policy("tiny", embeddings="tags")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no rows to train\. Give the ids that add_tags returned"):
        train_only_rows(None, ())
