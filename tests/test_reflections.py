"""The logged curves of reflections and insertions: numbers by hand, and where they are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fixtures import ShowAgain, make_policy, make_prompt
from reflectvlm.reattention import Implicit
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.train.console import Console, compare
from reflectvlm.train.evaluate import summarize
from reflectvlm.train.plots import KEYS, curves
from reflectvlm.train.reflections import for_display, insertion_curves, tag_curves
from reflectvlm.types import Grid, Patches, Prompt, Rollout, Sample, SamplingParams, ScoredGroup, Text, Visual

TOKEN = re.compile(r"</?\w+>|.", re.DOTALL)
"""A tag is one token, else a character is one."""
R = "<REFLECTION>"


def reflection(tokens: int) -> str:
    return f"{R}{'x' * tokens}</REFLECTION>"


def rollout(text: str, spans: Any = (), counted: bool = True) -> Rollout:
    patches = Patches(pixels=torch.zeros(16, 3), grid=Grid(1, 2, 2))
    prompt = Prompt(sample=Sample(id="s", question="", answer=""), spans=(), patches=(patches,))
    offsets = tuple(match.start() for match in TOKEN.finditer(text)) if counted else ()
    sampled = (Text(ids=tuple(range(len(offsets))), trained=True),) if offsets else ()
    return Rollout(prompt=prompt, spans=(*sampled, *spans), text=text, stop="eos", offsets=offsets)


def test_curves_by_hand() -> None:
    """Bug: a mean over answers where one over blocks is meant, or the other way round."""
    rollouts = [
        # 16 tokens: abcd, tag, 4, tag, ef, tag, 1, tag, g; the blocks begin behind 4 and behind 12 tokens.
        rollout(f"abcd{reflection(4)}ef{reflection(1)}g"),
        # 5 tokens: the block begins behind 2 of them. White space alone is empty, as in the layout.
        rollout(f"ab{R} </REFLECTION>"),
        rollout("nothing"),
        rollout(""),
    ]
    assert tag_curves(rollouts, R) == pytest.approx(
        {
            "blocks/count": 3 / 4,
            "blocks/tokens": (5 + 1) / 4,
            "blocks/tokens_each": (5 + 1) / 3,
            "blocks/empty": 1 / 3,
            "blocks/position": (4 / 16 + 12 / 16 + 2 / 5) / 3,
        }
    )


def test_curves_of_a_tag_in_plain_text() -> None:
    """Bug: only the paper's own tag is found. "a", "<back>", three, "</back>": 1 token of 6 before it."""
    found = tag_curves([rollout("a<back>xyz</back>"), rollout("b")], "<back>")
    assert found == {
        "blocks/count": 0.5,
        "blocks/empty": 0.0,
        "blocks/tokens": 1.5,
        "blocks/tokens_each": 3.0,
        "blocks/position": pytest.approx(1 / 6),
    }


def test_what_cannot_be_said_is_left_out() -> None:
    """Bug: a run that ends because nobody counted tokens, a 0 that stands for "no block", or nan."""
    assert tag_curves([rollout(reflection(4), counted=False)], R) == {
        "blocks/count": 1.0,
        "blocks/empty": 0.0,
    }
    assert tag_curves([rollout("ab"), rollout("")], R) == {"blocks/count": 0.0, "blocks/tokens": 0.0}
    mixed = tag_curves([rollout(reflection(4)), rollout("ab", counted=False)], R)
    assert mixed == {"blocks/count": 0.5, "blocks/empty": 0.0}
    assert tag_curves([rollout("Wait, ab")], "Wait") == {}
    assert tag_curves([], R) == {}


def test_insertions_by_hand() -> None:
    """Bug: inserted tokens logged in a run that inserts nothing, or a kept selection counted whole."""
    text = Text(ids=(1,), trained=True)
    # 2 x 2 cells and the two around them are 6; three kept cells and the two around them are 5.
    shown = rollout("x", (text, Visual(image=0), text, Visual(image=0, keep=(0, 1, 3))))
    assert insertion_curves([shown, rollout("x", (text,))]) == {
        "inserted/blocks": 1.0,
        "inserted/tokens": 5.5,
    }
    assert insertion_curves([rollout("x", (text,))]) == {}
    assert insertion_curves([]) == {}


def summary(reattention: Any) -> dict[str, float]:
    policy = make_policy()
    engine = ScriptedEngine(policy=policy, texts=("one<back>two</back>", "none"))
    (group,) = engine.generate([make_prompt(policy)], 2, SamplingParams(), reattention, seed=0)
    scored = ScoredGroup(rollouts=group, rewards=(1.0, 0.0), parts={}, scored=(True, True))
    return summarize([scored], "<back>")


def test_a_step_and_an_evaluation_log_them() -> None:
    """Bug: curves that are computed and never logged. The shown image has 4 x 4 cells and two ends, in one
    of the two answers."""
    plain, shown = summary(Implicit()), summary(ShowAgain("<back>"))
    assert plain["back_rate"] == plain["blocks/count"] == 0.5
    assert plain["blocks/tokens"] * 2 == plain["blocks/tokens_each"] >= 1
    assert not any(key.startswith("inserted/") for key in plain)
    assert shown == plain | {"inserted/blocks": 0.5, "inserted/tokens": 9.0}


# -- where they are shown ---------------------------------------------------------------------------

LOOK_BACK = {
    "reward": 1.0,
    "back_rate": 1.0,
    "blocks/count": 1.0,
    "blocks/tokens_each": 25.0,
    "blocks/empty": 0.0,
}


@pytest.mark.parametrize(
    "sign",
    [{"blocks/count": 1.5}, {"reward/balance": -0.5}, {"inserted/blocks": 0.5, "inserted/tokens": 9.0}],
)
def test_display_only_where_blocks_say_more_than_their_rate(sign: dict[str, float]) -> None:
    """Bug: five more lines in every run of Look-Back, or none in one of Qwen-LA."""
    assert for_display(LOOK_BACK) == {"reward": 1.0, "back_rate": 1.0}
    assert for_display(LOOK_BACK | sign) == LOOK_BACK | sign


class Lines:
    """A stream that keeps what it is given."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError


def test_console_and_table() -> None:
    """Bug: a label that no key reaches."""
    out = Lines()
    console = Console("RL", 2, every=1, file=out, width=200)
    console.metrics(1, LOOK_BACK)
    assert "look" not in out.text.replace("looks back", "")
    console.metrics(2, LOOK_BACK | {"blocks/count": 1.5, "blocks/empty": 0.25})
    assert "looks per answer 1.5 | tokens per look 25.0 | empty looks 25.0%" in out.text
    table = compare("t", LOOK_BACK, LOOK_BACK | {"blocks/count": 3.0}, {}).rows
    assert ("looks per answer", "1.0", "3.0", "+2.0") in table
    assert ("empty looks", "0.0%", "0.0%", "+0.0 pp") in table
    assert "look" not in compare("t", LOOK_BACK, LOOK_BACK, {}).markdown.replace("looks back", "")


def test_picture(tmp_path: Path) -> None:
    """Bug: panels for blocks in Look-Back's picture, or a key that was asked for by name and left out."""
    assert {"blocks/count", "blocks/tokens_each", "blocks/empty"} < {*KEYS}

    def width(keys: Any, *rows: dict[str, float]) -> int:
        lines = [json.dumps({"step": step} | row) for step, row in enumerate(rows)]
        (tmp_path / "m.jsonl").write_text("\n".join(lines))
        with Image.open(curves(tmp_path / "m.jsonl", tmp_path / "c.png", keys)) as picture:
            return picture.width

    one = width(["reward"], LOOK_BACK)
    assert width(["reward", "blocks/count"], LOOK_BACK) == pytest.approx(2 * one, abs=2)
    assert width(None, LOOK_BACK) == pytest.approx(2 * one, abs=2)  # reward and back_rate
    evaluated = {"eval/reward": 1.0, "eval/blocks/count": 3.0}
    assert width(None, LOOK_BACK, evaluated) == pytest.approx(3 * one, abs=2)  # three columns, two rows
