"""LoRA as recipes give it: a policy of its own, or a setting on the command line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from reflectvlm.config import load_recipe
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.recipe_check import RecipeError
from training import rubric

pytest.importorskip("peft", reason="adapters come with the extra lora")

SMALL = {
    "lookback_rl": ("start_from=null", "prompts_per_step=4", "group_size=2", "sampling.max_tokens=4"),
    "lookback_sft": ("data.data.size=8", "rows_per_step=2"),
    "qwen_la_copy": (
        "start_from=null", "data_from=null", "data=qwen_la_traces", "data.data.size=8", "rows_per_step=2",
    ),
}  # fmt: skip
LORA = "+policy.lora={_target_: reflectvlm.models.lora.LoRA, rank: 4, language: [q_proj, v_proj]}"


@pytest.mark.parametrize(
    ("name", "chosen", "new_rows"),
    [
        ("lookback_rl", ("policy=tiny_lora",), False),
        ("lookback_rl", (LORA,), False),
        ("lookback_sft", ("policy=tiny_lora",), False),
        ("qwen_la_copy", ("policy=tiny_qwen_la_sft", LORA), True),
    ],
    ids=["policy", "override", "sft", "new tags"],
)
def test_recipes_take_a_step(name: str, chosen: tuple[str, ...], new_rows: bool, tmp_path: Path) -> None:
    """Bug: a setting that recipes cannot give, or adapters that a recipe's other settings freeze."""
    tiny = tiny_folder(tmp_path / "tiny")
    trainer = load_recipe(name, *chosen, *SMALL[name], f"policy.path={tiny}", f"root={tmp_path}")
    trainer = dataclasses.replace(trainer, rubric=rubric())
    trainer.prepare()
    assert math.isfinite(trainer.step(0).metrics["loss"])
    trains = {n for n, p in trainer.policy.module.named_parameters() if p.requires_grad}
    rows = {one for one in trains if "lora_" not in one}
    assert len(trains) > len(rows) == new_rows
    assert all("embed_tokens" in one for one in rows)


def test_a_misspelt_setting_is_one_line() -> None:
    """Bug: a rank that is ignored."""
    with pytest.raises(
        RecipeError, match=r"^policy\.lora\.rnk is no argument of LoRA\. Did you mean 'policy\."
    ):
        load_recipe("grpo", "policy=tiny_lora", "+policy.lora.rnk=4", "steps=1")
    with pytest.raises(RecipeError, match=r"LoRA\.rank is 0\. It must be at least 1"):
        load_recipe("grpo", "policy=tiny_lora", "policy.lora.rank=0", "steps=1")
