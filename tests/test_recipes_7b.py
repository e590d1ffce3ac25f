"""The 7B recipes: one for every stage of both papers, each value with its source, each taking a step when the
tiny policy stands in for the large one."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from reflectvlm.config import compose, load_recipe
from reflectvlm.data.digit_traces import DigitTraces, Style
from reflectvlm.data.digits import Digits
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.reattention import VisualCopy, VisualRoute
from reflectvlm.recipe_files import recipes, recipes_folder
from reflectvlm.train.distill import Distiller
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.sft import SFTTrainer
from reflectvlm.types import Visual
from training import rubric

# Every stage of both papers: (recipe, overrides that choose it, the style of its gold answers).
STAGES: dict[str, tuple[str, tuple[str, ...], Style]] = {
    "Look-Back, cold start, semantic": ("lookback_sft_7b", ("variant=semantic",), "semantic"),
    "Look-Back, cold start, solution": ("lookback_sft_7b", ("variant=solution",), "solution"),
    "Look-Back, RL, semantic": ("lookback_rl_7b", ("variant=semantic",), "semantic"),
    "Look-Back, RL, solution": ("lookback_rl_7b", ("variant=solution",), "solution"),
    "Qwen-LA, cold start": ("qwen_la_coldstart_7b", (), "qwen_la"),
    "Qwen-LA, BRPO": ("qwen_la_brpo_7b", (), "qwen_la"),
    "Qwen-LA, distillation": ("qwen_la_distill_7b", (), "qwen_la"),
    "Qwen-LA, COPY": ("qwen_la_copy_7b", (), "qwen_la"),
    "Qwen-LA, ROUTE": ("qwen_la_route_7b", (), "qwen_la"),
    "Qwen-LA, text alone": ("qwen_la_text_7b", (), "qwen_la"),
}
LARGE = sorted(name for name in recipes() if name.endswith("_7b"))
PARTS = ("qwen2_5_vl_7b", "qwen2_5_vl_7b_qwen_la", "qwen2_5_vl_7b_qwen_la_sft")
FILES = [f"{name}.yaml" for name in LARGE] + [f"policy/{name}.yaml" for name in PARTS]


def test_no_stage_and_no_recipe_is_left_out() -> None:
    """Bug: a recipe is added, and none of these tests sees it."""
    assert sorted({recipe for recipe, _, _ in STAGES.values()}) == LARGE
    used = {compose(name).values["policy"]["path"] for name in LARGE}
    assert used == {"Qwen/Qwen2.5-VL-7B-Instruct"}


# -- a step -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy as a folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def rows_of(style: Style, folder: Path) -> Path:
    """Four rows of one's own, as `data=rows` reads them: the data these recipes have."""
    lines = []
    for number, sample in enumerate(DigitTraces(data=Digits(size=4), style=style, wrong_first=0.5)):
        sample.images[0].save(folder / f"{number}.png")
        row = {"question": sample.question, "answer": sample.answer, "images": [f"{number}.png"]}
        lines.append(json.dumps({**row, "trace": sample.columns["trace"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


SMALL = {
    SFTTrainer: ("rows_per_step=2", "steps=2"),
    RLTrainer: ("prompts_per_step=4", "group_size=2", "sampling.max_tokens=4", "steps=2"),
    Distiller: ("rows=2", "rows_per_batch=2", "sampling.max_tokens=4", "wrong=repair"),
}
KINDS = {kind: f"{kind.__module__}.{kind.__qualname__}" for kind in SMALL}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_a_step_with_the_tiny_policy(stage: str, tiny: Path, tmp_path: Path) -> None:
    """Bug: a recipe that needs a GPU to be tried is wrong when somebody has one. `policy=tiny` in place of
    its policy, rows of one's own, small sizes; all else, such as its re-attention, is its own."""
    recipe, choice, style = STAGES[stage]
    target = compose(recipe).values["_target_"]
    (kind,) = (kind for kind, name in KINDS.items() if name == target)
    words = ("policy=tiny", f"policy.path='{tiny}'", f"data.path='{rows_of(style, tmp_path)}'", *choice)
    trainer = load_recipe(recipe, *words, *SMALL[kind], f"root={tmp_path}")
    if isinstance(trainer, Distiller):
        assert trainer.run().tally.asked == 2
        return
    # A random policy earns no reward of its own, and without a difference there is no update.
    trainer = dataclasses.replace(trainer, rubric=rubric())
    trainer.prepare()
    metrics = trainer.step(0).metrics
    assert math.isfinite(metrics["loss"])
    assert trainer.updates >= 1
    if isinstance(trainer, SFTTrainer) and isinstance(trainer.reattention, VisualCopy | VisualRoute):
        ((_, answer),) = trainer.sequences([0])
        (block,) = (span for span in answer if isinstance(span, Visual))
        assert (block.keep is None) == isinstance(trainer.reattention, VisualCopy)


# -- sources ----------------------------------------------------------------------------------------

SOURCE = re.compile(r"(P|S|G|ours)\b[^:;]*[:;] ?\S")
"""A mark with what belongs to it, as the recipes' headers explain them."""
GUESS = re.compile(r"G(: not stated\b.*[;,] \S|: (what|the paper's) .*[;,] \S)")
"""A guess, and behind a semicolon or a comma its reason."""


def comment_of(line: str) -> str:
    """The comment of a line of YAML, quotes left alone; empty if there is none."""
    found = re.match(r"""(?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)#)*?(?:^|(?<=\s))#\s*(.*)$""", line)
    return found[1].strip() if found else ""


def leaves(node: yaml.Node, opened: int | None = None) -> Iterator[tuple[str, int, int | None]]:
    """(key, its line, the line that opens its mapping) of each value; a list of values is one, and so is
    a mapping within a line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line
            nested = isinstance(value, yaml.MappingNode) and value.start_mark.line != line
            if nested:
                yield from leaves(value, line)
            elif key.value != "defaults":
                yield key.value, line, opened


def without_source(text: str) -> list[str]:
    """Keys whose value has no source: on its line, in the comment above it, or, for the first of a mapping,
    on the line that opens it."""
    lines = text.splitlines()
    missing = []
    for key, line, opened in leaves(yaml.compose(text)):
        given = [comment_of(lines[line])]
        if opened == line - 1:
            given.append(comment_of(lines[opened]))
        while line > 0 and lines[line - 1].lstrip().startswith("#"):
            line -= 1
            given.append(comment_of(lines[line]))
        if not any(SOURCE.match(comment) for comment in given):
            missing.append(key)
    return missing


@pytest.mark.parametrize("file", FILES)
def test_every_value_says_where_it_comes_from(file: str) -> None:
    """Bug: a reproduction whose reader cannot tell the paper's figures from ours."""
    assert without_source((recipes_folder() / file).read_text()) == []


@pytest.mark.parametrize("file", FILES)
def test_every_guess_gives_its_reason(file: str) -> None:
    """Bug: "G" alone says that we made it up, and not why like this."""
    for line in (recipes_folder() / file).read_text().splitlines():
        comment = comment_of(line)
        if comment.startswith("G"):
            assert GUESS.match(comment), line


@pytest.mark.parametrize("name", LARGE)
def test_a_mark_taken_away_is_noticed(name: str) -> None:
    """The check can fail: of every line with a value and a mark, once without."""
    text = (recipes_folder() / f"{name}.yaml").read_text()
    lines = text.splitlines()
    own = [n for n, line in enumerate(lines) if not line.startswith("#") and comment_of(line)]
    for number in own:
        bare = [*lines]
        bare[number] = re.sub(r"\s+# .*$", "", bare[number])
        key = bare[number].strip().split(":")[0]
        first = lines[number].rstrip().endswith(":") or bare[number].rstrip().endswith(":")
        expected = ["_target_"] if first and "_target_" in lines[number + 1] else [key]
        assert without_source("\n".join(bare)) == expected, lines[number]


def test_comments_are_found() -> None:
    """Bug: a '#' in a text, or in a reference, is taken for a comment, so that no source is needed."""
    assert comment_of('a: "x # P: y"') == ""
    assert comment_of("a: x#y") == ""
    assert comment_of('a: "${b}"   # P: c') == "P: c"
    assert comment_of("# ours: d") == "ours: d"
    assert without_source("a: 1 # quick\nb: 2 # P: table\nc:\n  d: 3\n") == ["a", "d"]
