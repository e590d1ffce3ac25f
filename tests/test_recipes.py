"""Every recipe composes, builds and takes a step; those of papers hold the papers' values."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from reflectvlm import chain
from reflectvlm.config import compose, load_recipe
from reflectvlm.data.instructions import instruction, instruction_names
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.recipe_files import find_pipeline, recipes, recipes_folder
from reflectvlm.tags import layout_tags, look_back, qwen_la, tag_names
from reflectvlm.train.distill import Distiller
from training import rubric

RL = ("prompts_per_step=4", "group_size=2", "sampling.max_tokens=4", "data.size=8")
SFT = ("data.data.size=8", "rows_per_step=2")
ALONE = ("start_from=null", "data_from=null")
"""Without the stages that a recipe is made from: those are tested in test_stages.py."""
SMALL: dict[str, tuple[str, ...]] = {
    "grpo": ("policy=tiny", "data=digits", *RL),
    "lookback_rl": ("policy=tiny", "data=digits", "start_from=null", *RL),
    "lookback_rl_7b": ("policy=tiny", "data=digits", *RL),
    "lookback_sft": ("policy=tiny", "data=digit_traces", *SFT),
    "lookback_sft_7b": ("policy=tiny", "data=digit_traces", *SFT),
    "tiny_base": ("rows_per_step=2",),
    "qwen_la_coldstart": ("policy=tiny_qwen_la_sft", "data=qwen_la_traces", *SFT),
    "qwen_la_brpo": ("policy=tiny_qwen_la", "data=digits", *ALONE, *RL),
    "qwen_la_text": ("policy=tiny_qwen_la_sft", "data=qwen_la_traces", *ALONE, *SFT),
    "qwen_la_distill": (
        "policy=tiny_qwen_la", "data=qwen_la_questions", *ALONE, "rows=3", "rows_per_batch=2",
        "sampling.max_tokens=4", "wrong=repair",
    ),
}  # fmt: skip
"""Overrides under which a recipe takes a step in a second."""
SMALL |= {f"qwen_la_{kind}": SMALL["qwen_la_text"] for kind in ("copy", "route")}
SMALL |= {f"qwen_la_rl_{kind}": SMALL["qwen_la_brpo"] for kind in ("copy", "route")}
SMALL |= {
    f"qwen_la_{kind}_7b": SMALL[f"qwen_la_{kind}"]
    for kind in ("coldstart", "brpo", "distill", "text", "copy", "route")
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy as a folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_builds_and_takes_a_step(name: str, tiny: Path, tmp_path: Path) -> None:
    """A recipe nobody runs is wrong within a month. Random rewards stand in for those that a random
    policy never earns, so that the step also updates."""
    small = SMALL[name]
    if "policy=" in small[0]:
        small = (*small, f"policy.path={tiny}")
    trainer = load_recipe(name, *small, f"root={tmp_path}")
    if isinstance(trainer, Distiller):
        done = trainer.run()
        assert done.tally.asked == 3
        return
    trainer = dataclasses.replace(trainer, rubric=rubric())
    trainer.prepare()
    metrics = trainer.step(0).metrics
    assert math.isfinite(metrics["loss"])
    assert trainer.updates >= 1


@pytest.mark.parametrize("name", sorted(recipes()))
@pytest.mark.parametrize(
    "policy",
    [
        "tiny", "tiny_random", "tiny_qwen_la", "tiny_qwen_la_sft", "qwen2_5_vl_3b", "qwen2_5_vl_7b",
        "qwen2_5_vl_7b_qwen_la", "qwen2_5_vl_7b_qwen_la_sft", "qwen3_vl_8b", "tiny_lora",
        "qwen2_5_vl_7b_lora", "qwen2_5_vl_7b_qlora",
    ],
)  # fmt: skip
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


# Qwen-LA, the two tables of arXiv 2505.23558. What is read out of them: 10,000 rows / 32 are 312 steps;
# batch 16 x accumulation 2 x 8 GPUs / 8 answers = 32 prompts; 1 x 8 x 8 GPUs = 64 rows; 13 epochs of 2,000
# and of 40,000 rows; 8192 tokens in all less 1024 of the answer; 640 x 480 pixels.
QWEN_LA_TAGS = [
    f"<{slash}{name}>"
    for name in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION", "REFLECTION")
    for slash in ("", "/")
]
QWEN_LA_BRPO_7B = {
    "policy.path": "Qwen/Qwen2.5-VL-7B-Instruct",
    "policy.new_tags": QWEN_LA_TAGS,
    "policy.freeze_parts": [],
    "policy.embeddings": "all",
    "policy.max_pixels": 640 * 480,
    "optimizer.lr": 1e-6,
    "optimizer.warmup": 0.01,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.eps": 1e-8,
    "objective.kl.coefficient": 0.1,
    "objective.kl.estimator": "k3",
    "objective.reduce": "sequence_mean",
    "advantage.scale": "group",
    "group_size": 8,
    "prompts_per_step": 16 * 2 * 8 // 8,
    "steps": 10_000 // 32,
    "sampling.temperature": 1.0,
    "sampling.max_tokens": 1024,
    "max_prompt_tokens": 8192 - 1024,
    "rubric.target_tokens": 100,
    "rubric.accuracy_weight": 1.0,
    "rubric.format_weight": 1.0,
    "rubric.balance_weight": 1.0,
    "rubric.none": 0.0,
    "rubric.clip": None,
    "reattention._target_": "reflectvlm.reattention.Implicit",
    "start_from": None,
}
QWEN_LA_SFT_7B = {
    "policy.path": "Qwen/Qwen2.5-VL-7B-Instruct",
    "policy.new_tags": QWEN_LA_TAGS,
    "policy.freeze_parts": ["vision", "projector"],
    "policy.embeddings": "new_tags",
    "policy.max_pixels": 262_144,
    "optimizer.lr": 1e-5,
    "optimizer.warmup": 0.01,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "rows_per_step": 1 * 8 * 8,
    "micro_tokens": 8192,
    "start_from": None,
    "data_from": None,
}
DISTILLED = QWEN_LA_SFT_7B | {"steps": 40_000 * 13 // 64}
COPY, ROUTE = "reflectvlm.reattention.VisualCopy", "reflectvlm.reattention.VisualRoute"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("lookback_rl_7b", LOOKBACK_RL_7B),
        ("lookback_sft_7b", LOOKBACK_SFT_7B),
        ("qwen_la_coldstart_7b", QWEN_LA_SFT_7B | {"steps": 2_000 * 13 // 64}),
        ("qwen_la_brpo_7b", QWEN_LA_BRPO_7B),
        ("qwen_la_distill_7b", {"policy.max_pixels": 640 * 480, "start_from": None, "rows": None}),
        ("qwen_la_text_7b", DISTILLED | {"reattention._target_": "reflectvlm.reattention.Implicit"}),
        ("qwen_la_copy_7b", DISTILLED | {"reattention._target_": COPY}),
        ("qwen_la_route_7b", DISTILLED | {"reattention._target_": ROUTE, "reattention.m": 50}),
    ],
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


@pytest.mark.parametrize("suffix", ["", "_7b"])
def test_sft_stages_differ_only_in_what_is_inserted(suffix: str) -> None:
    """An ablation whose rows differ in a learning rate is none."""
    text, copy, route = (compose(f"qwen_la_{kind}{suffix}").values for kind in ("text", "copy", "route"))
    for other in (copy, route):
        assert {key for key in text if text[key] != other[key]} == {"name", "reattention"}


@pytest.mark.parametrize("kind", ["copy", "route"])
def test_rl_with_reattention_is_brpo_with_reattention(kind: str) -> None:
    """What is new is compared with BRPO, from a model that was taught the same mechanism."""
    plain, ours = (compose(name).values for name in ("qwen_la_brpo", f"qwen_la_rl_{kind}"))
    assert {key for key in plain if plain[key] != ours[key]} == {"name", "reattention", "start_from"}
    assert ours["start_from"]["recipe"] == f"qwen_la_{kind}"
    assert ours["reattention"] == compose(f"qwen_la_{kind}").values["reattention"]


def test_every_reattention_of_qwen_la_asks_for_the_same_tag() -> None:
    """A trigger that no trace contains inserts nothing, and nobody notices."""
    for name in recipes():
        reattention = compose(name).values.get("reattention") or {}
        if name.startswith("qwen_la") and "trigger" in reattention:
            assert reattention["trigger"] in QWEN_LA_TAGS


def test_new_tags_are_those_of_the_layout() -> None:
    """A tag that is scored and was not added is sampled in pieces."""
    for policy in ("tiny_qwen_la", "qwen2_5_vl_7b_qwen_la"):
        added = compose("qwen_la_brpo", (f"policy={policy}",)).values["policy"]["new_tags"]
        assert sorted(added) == sorted(layout_tags(qwen_la()))


def test_the_chain_of_the_tiny_policy() -> None:
    """coldstart -> brpo -> distill -> SFT of the base, each with the seed and the base of the last one."""
    words = ("seed=3", "policy.path=some/base")
    name, sources = "qwen_la_rl_copy", []
    while True:
        values = compose(name, words).values
        source = values["start_from"] or values["data_from"]
        if source is None:
            break
        assert source["overrides"][:2] == ["seed=3", "policy.path='some/base'"]
        name = source["recipe"]
        sources.append(name)
    assert sources == ["qwen_la_copy", "qwen_la_distill", "qwen_la_brpo", "qwen_la_coldstart"]


@pytest.mark.parametrize("layers", ["null", "[0,-1]"])
def test_rl_with_route_starts_from_the_same_route(layers: str) -> None:
    """A model that was taught with all layers' choice, and is then rewarded with that of two of them."""
    words = ("reattention.m=25", f"reattention.layers={layers}", "reattention.heads=max")
    run = compose("qwen_la_rl_route", words)
    (source,) = chain._sources(run.values)
    stage = chain.Chain(told={}).stage(source.recipe, source.overrides)
    assert stage.values["reattention"] == run.values["reattention"]
    assert stage.values["reattention"]["m"] == 25
    assert stage.values["reattention"]["layers"] == (None if layers == "null" else [0, -1])


@pytest.mark.parametrize("kind", ["copy", "route"])
def test_insertions_of_the_7b_recipes_end(kind: str) -> None:
    """A model that only repeats the trigger puts in images until the memory ends; or a gold answer with so
    many that SFT refuses its row."""
    recipe = compose(f"qwen_la_{kind}_7b").values
    prompt = answer = 2048
    assert recipe["reattention"]["budget"] + prompt + answer <= recipe["max_tokens"]
    table = yaml.safe_load(find_pipeline("qwen_la_7b").read_text())["table"]
    (vision_only,) = [row["reattention"] for row in table if row["name"] == "vision-only"]
    assert vision_only["budget"] == recipe["reattention"]["budget"]


def test_stages_ask_about_pages_of_their_own() -> None:
    """Questions that RL has trained on are answered better than they deserve."""
    seeds = [
        compose(name).values["data"] for name in ("qwen_la_coldstart", "qwen_la_brpo", "qwen_la_distill")
    ]
    found = [str(data.get("data", data)["seed"]) for data in seeds]
    assert len(set(found)) == 3


def test_shared_parts_are_no_recipes() -> None:
    """All shared parts name what is run and where its run goes."""
    for part in ("_rl", "_sft", "_distill"):
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
    for name in ("qwen_la", "brief_qwen_la"):
        text = instruction(name).text
        assert all(f"<{tag}>" in text for tag in tag_names(qwen_la()))
    boxed = [name for name in instruction_names() if "qwen_la" not in name]
    assert all("\\boxed{" in instruction(name).text for name in boxed)


def test_brief_instructions_are_brief() -> None:
    """The tiny policy pays for every token of its prompt."""
    brief = ("brief_back", "brief_think", "brief_qwen_la", "boxed")
    assert all(len(instruction(name).text.split()) <= 25 for name in brief)
    assert all("\n" not in instruction(name).text for name in brief)


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
