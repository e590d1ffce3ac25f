"""Every recipe composes, builds and takes a step; those of papers hold the papers' values."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from reflectvlm.config import compose, load_recipe
from reflectvlm.data.instructions import instruction, instruction_names
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.recipe_files import recipes, recipes_folder
from reflectvlm.tags import look_back, tag_names
from training import rubric

RL = ("prompts_per_step=4", "group_size=2", "sampling.max_tokens=4", "data.size=8")
SMALL: dict[str, tuple[str, ...]] = {
    "grpo": ("policy=tiny", "data=digits", *RL),
    "lookback_rl": ("policy=tiny", "data=digits", "start_from=null", *RL),
    "lookback_rl_7b": ("policy=tiny", "data=digits", *RL),
    "lookback_sft": ("policy=tiny", "data=digit_traces", "data.data.size=8", "rows_per_step=2"),
    "lookback_sft_7b": ("policy=tiny", "data=digit_traces", "data.data.size=8", "rows_per_step=2"),
    "tiny_base": ("rows_per_step=2",),
}
"""Overrides under which a recipe takes a step in a second."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy as a folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_builds_and_takes_a_step(name: str, tiny: Path, tmp_path: Path) -> None:
    """A recipe nobody runs is wrong within a month. Random rewards stand in for those that a random
    policy never earns, so that the step also updates."""
    small = SMALL[name]
    if "policy=tiny" in small:
        small = (*small, f"policy.path={tiny}")
    trainer = load_recipe(name, *small, f"root={tmp_path}")
    trainer = dataclasses.replace(trainer, rubric=rubric())
    trainer.prepare()
    metrics = trainer.step(0).metrics
    assert math.isfinite(metrics["loss"])
    assert trainer.updates >= 1


@pytest.mark.parametrize("name", sorted(recipes()))
@pytest.mark.parametrize("policy", ["tiny", "tiny_random", "qwen2_5_vl_3b", "qwen2_5_vl_7b"])
def test_every_policy_fits_every_recipe(name: str, policy: str) -> None:
    """A recipe that writes keys into its chosen policy breaks the next choice."""
    chosen = compose(name, (f"policy={policy}",)).values["policy"]
    bare = compose("grpo", (f"policy={policy}",)).values["policy"]
    assert chosen == bare


@pytest.mark.parametrize("data", ["digits", "shapes"])
def test_data_choices_build(data: str, tiny: Path) -> None:
    """A choice that no recipe uses by default would rot unseen."""
    trainer = load_recipe("grpo", f"policy.path={tiny}", f"data={data}", "data.size=3", *RL[:3])
    assert len(trainer.data) == 3
    assert trainer.data[0].images


def test_own_rows_train(tiny: Path, tmp_path: Path) -> None:
    """`data=rows data.path=…` is the door for a user's data; its columns must match the reader's."""
    from reflectvlm.data.digits import Digits

    page = Digits(size=1)[0]
    page.images[0].save(tmp_path / "page.png")
    row = {"question": page.question, "answer": page.answer, "images": ["page.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    path = f"data.path='{tmp_path / 'rows.jsonl'}'"
    trainer = load_recipe("grpo", f"policy.path={tiny}", "data=rows", path, *RL[:3])
    assert trainer.data[0].answer == page.answer
    assert trainer.data[0].images[0].size == (64, 64)


# EasyR1 of June 2025, which Look-Back builds on: the values are that project's, and our guess for the
# paper, which prints none. w is EasyR1's default weight of the format reward.
LOOKBACK_RL_7B = {
    "policy.path": "Qwen/Qwen2.5-VL-7B-Instruct",
    "policy.min_pixels": 262_144,
    "policy.max_pixels": 4_194_304,
    "policy.freeze_parts": [],
    "group_size": 5,
    "prompts_per_step": 512,
    "updates_per_step": 512 // 128,
    "epochs_per_step": 1,
    "sampling.temperature": 1.0,
    "sampling.top_p": 0.99,
    "sampling.max_tokens": 2048,
    "max_prompt_tokens": 2048,
    "optimizer.lr": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup": 0.0,
    "optimizer.weight_decay": 0.01,
    "objective.kl.estimator": "k3",
    "objective.kl.coefficient": 0.01,
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.2,
    "objective.dual_clip": 3.0,
    "objective.reduce": "token_mean",
    "advantage._target_": "reflectvlm.advantages.GroupMean",
    "advantage.scale": "group",
    "reattention._target_": "reflectvlm.reattention.Implicit",
    "rubric.w": 0.1,
    "start_from": None,
}

# The paper gives no settings of its cold start. lr and warm-up are those Qwen-LA (arXiv 2505.23558)
# gives for its SFT stages: our guess here.
LOOKBACK_SFT_7B = {
    "policy.path": "Qwen/Qwen2.5-VL-7B-Instruct",
    "optimizer.lr": 1e-5,
    "optimizer.warmup": 0.01,
    "objective._target_": "reflectvlm.objectives.CrossEntropy",
    "target": "trace",
}


@pytest.mark.parametrize(
    ("name", "table"), [("lookback_rl_7b", LOOKBACK_RL_7B), ("lookback_sft_7b", LOOKBACK_SFT_7B)]
)
def test_published_values(name: str, table: dict[str, Any]) -> None:
    """A value that drifts from its source makes a reproduction one of something else."""
    values = compose(name).values
    found = {key: reduce(lambda node, part: node[part], key.split("."), values) for key in table}
    assert found == table


@pytest.mark.parametrize("variant", ["semantic", "solution"])
def test_variant_reaches_layout_instruction_and_traces(variant: str) -> None:
    """One of the places left at `semantic` trains a mixture of both variants."""
    large = compose("lookback_rl_7b", (f"variant={variant}",)).values
    assert large["instruction"]["name"] == f"{variant}_back"
    assert large["rubric"]["layout"]["variant"] == variant
    assert compose("lookback_sft", (f"variant={variant}",)).values["data"]["style"] == variant


def test_baseline_differs_only_in_what_is_about_back() -> None:
    """A comparison with a baseline of another learning rate compares learning rates."""
    ours, baseline = (compose(name).values for name in ("lookback_rl", "grpo"))
    differ = {key for key in ours if ours[key] != baseline.get(key)}
    assert differ == {"name", "variant", "start_from", "rubric", "instruction"}


def test_shared_parts_are_no_recipes() -> None:
    """Both trainers' shared parts name the trainer and where its run goes."""
    for part in ("_rl", "_sft"):
        text = (recipes_folder() / f"{part}.yaml").read_text()
        assert "_target_: reflectvlm.train." in text
        assert "output:" in text


# -- instructions ---------------------------------------------------------------------------------


def test_instructions_ask_for_the_layouts_that_are_scored() -> None:
    """An instruction that does not name a tag asks for an output its own reward calls invalid."""
    for name in ("semantic_back", "solution_back", "brief_back"):
        text = instruction(name).text
        assert all(f"<{tag}>" in text for tag in tag_names(look_back()))
        assert "\\boxed{" in text
    for name in ("grpo", "brief_think"):
        assert "<think>" in instruction(name).text
        assert "back" not in instruction(name).text
    assert all("\\boxed{" in instruction(name).text for name in instruction_names())


def test_brief_instructions_are_brief() -> None:
    """The tiny policy pays for every token of its prompt."""
    assert all(len(instruction(name).text.split()) <= 25 for name in ("brief_back", "brief_think", "boxed"))
    assert all("\n" not in instruction(name).text for name in ("brief_back", "brief_think", "boxed"))


def test_instruction_takes_place_and_own_files(tmp_path: Path) -> None:
    """A user passes another wording by file."""
    (tmp_path / "own.txt").write_text("Look, then answer.\n", encoding="utf-8")
    made = instruction(str(tmp_path / "own.txt"), place="system")
    assert (made.text, made.place) == ("Look, then answer.", "system")
    with pytest.raises(ValueError, match=r"none.txt' cannot be read: No such file"):
        instruction(str(tmp_path / "none.txt"))
    with pytest.raises(
        ValueError, match=r"No instruction is called 'semantik_back'.*Did you mean 'semantic_back'"
    ):
        instruction("semantik_back")
