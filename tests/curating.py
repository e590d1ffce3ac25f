"""Sets of digits made by the rule teacher: milliseconds, and every reply follows from its request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflectvlm.curate.coldstart import ColdStart
from reflectvlm.curate.filters import standard
from reflectvlm.curate.set_words import digit_questions
from reflectvlm.curate.teachers.rule import RuleTeacher
from reflectvlm.curate.types import Question, Request, Said
from reflectvlm.data.instructions import instruction

QUESTIONS = digit_questions(24, 0)


def rule(seed: int = 0, **settings: float) -> RuleTeacher:
    return RuleTeacher(questions=QUESTIONS, seed=seed, **settings)  # type: ignore[arg-type]


def cold(method: str, **settings: Any) -> ColdStart:
    name = "qwen_la" if method == "qwen_la" else "boxed"
    given = {"n": 4, "instruction": instruction(name).text, **settings}
    return ColdStart(method=method, **given)  # type: ignore[arg-type]


def make(
    out: Path, one: ColdStart, *, model: Any = None, questions: Sequence[Question] = QUESTIONS, **given: Any
) -> list[dict[str, Any]]:
    """The rows of a whole set; its other files are in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if not one.self_made:
        given.setdefault("teacher", rule(seed=1))
    given.setdefault("filters", standard(one.method))
    given.setdefault("rows_at_once", 5)
    one.run(questions, model or rule(wrong=0.5), out=out, **given)
    return lines(out / "rows.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Scripted:
    """Says what it is told, whatever is asked, and remembers the requests."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = texts
        self.asked: list[Request] = []

    @property
    def name(self) -> str:
        return "scripted"

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        self.asked += requests
        said = [self.texts[place % len(self.texts)] for place in range(len(requests))]
        return [Said(text=one) if one is not None else Said(text=None, why="http 5xx: 503") for one in said]
