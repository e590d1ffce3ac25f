"""Our reward in a stock `trl.GRPOTrainer`: a random text model of 20,000 parameters learns to say `<back>`.

Run it with `python examples/trl_grpo.py`.

Runs on a CPU in seconds and loads nothing. Needs `pip install reflectvlm[trl]`.
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from reflectvlm.integrations.trl import as_trl_reward
from reflectvlm.rewards import per_rollout
from reflectvlm.types import Rollout

WORDS = ("<pad>", "<eos>", "<back>", "</back>", "look", "again", "one", "two", "three", "four")


@per_rollout
def says_back(rollout: Rollout) -> float:
    """One of our rewards: a number for a rollout."""
    return float(rollout.count("<back>") > 0)


def word_tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def tiny_model() -> Any:
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def train(folder: str, steps: int) -> list[float]:
    """Mean reward of each step, as TRL logged it."""
    set_seed(0)
    arguments = GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=4,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = GRPOTrainer(
        model=tiny_model(),
        processing_class=word_tokenizer(),
        reward_funcs=[as_trl_reward(says_back, name="back", end_ids={1})],
        train_dataset=Dataset.from_list(
            [{"prompt": f"look again {word}", "answer": word} for word in ("one", "two", "three", "four")]
        ),
        args=arguments,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["rewards/back/mean"] for entry in trainer.state.log_history if "rewards/back/mean" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rewards = train(folder, steps=20)
    print("share of answers with <back>, per step:", *(f"{reward:.2f}" for reward in rewards))
