"""A teacher for the pages of digits that needs no model: it knows what stands on the page.

It answers, inserts a second look, rewrites and judges as a model would that reads well most of the time. What
it misreads, and with `faulty` where its replies are refused, cut or broken, follows from the request and the
seed alone. So methods that make data can be run whole, in milliseconds, and their results are known.

    answer    a reading of the page with the result in a box, a share `wrong` of them with one wrong digit;
              in Qwen-LA's blocks if the text names them
    insert    the look behind what is in the request's `so_far`: what stands there, and what follows from it
    rewrite   the whole answer in the layout that the system turn names; what `answer` misread is what its
              first reading misreads
    judge     correct or incorrect, by the result in `answer`; a share `misjudged` the wrong way round

The last three come as one JSON object, as `requests.py` writes it. Left out: all other questions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reflectvlm.curate.request_key import content_hash
from reflectvlm.curate.teachers.reasons import nothing
from reflectvlm.curate.types import Question, Request, Said
from reflectvlm.data.digit_mentions import mentions
from reflectvlm.data.digit_traces import Style, misread, trace_of
from reflectvlm.data.digits import Digits, conclude
from reflectvlm.data.images import BadImage
from reflectvlm.tags import find_boxes
from reflectvlm.types import Sample

FAULTS = ("refused", "cut", "unclosed", "misread")
"""What a faulty reply is, each as often: none at all, none that is whole, a broken layout, a look that reads
a digit wrongly."""
_ROW = re.compile(r"digits-(train|validation|test)-(\d+)")
_CONCLUSION = re.compile(r"<CONCLUSION>(.*?)</CONCLUSION>", re.DOTALL)
_REFLECTION = re.compile(r"<REFLECTION>.*?</REFLECTION>", re.DOTALL)


class _Unknown(Exception):
    """Something this teacher knows no rule for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RuleTeacher:
    """Example: `RuleTeacher(wrong=0.5)([Request(row="digits-train-0", purpose="answer", text=question)])`"""

    questions: Sequence[Question] = ()
    """Rows that it knows: those with the columns of `Digits`. Others are known by their ids, as `Digits` of
    its default settings gives them."""
    wrong: float = 0.3
    """Share of answers that misread one digit."""
    faulty: float = 0.0
    """Share of inserts and rewrites with one of `FAULTS`."""
    misjudged: float = 0.0
    """Share of wrong judgements."""
    seed: int = 0
    """Teachers of different seeds err at different requests."""
    pages: int = 0
    """The seed of the `Digits` that ids name."""
    _known: Mapping[str, Question] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("wrong", "faulty", "misjudged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"RuleTeacher.{name} is {getattr(self, name)}. It is a share, from 0 to 1.")
        if self.seed < 0:
            raise ValueError(f"RuleTeacher.seed is {self.seed}. It must be 0 or more.")
        known = {one.id: one for one in self.questions if {"digits", "looks", "kind"} <= one.columns.keys()}
        object.__setattr__(self, "_known", known)

    @property
    def name(self) -> str:
        settings = {one: getattr(self, one) for one in ("wrong", "faulty", "misjudged", "seed", "pages")}
        return f"rule {json.dumps(settings, sort_keys=True)}"

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        return [self._said(request) for request in requests]

    def _said(self, request: Request) -> Said:
        """Tokens are counted as words: a price and a time can be tried out on them."""
        say = {"answer": self._answer, "insert": self._insert, "rewrite": self._rewrite, "judge": self._judge}
        try:
            chance = self._chance(request)
            if request.purpose not in say:
                raise _Unknown(f"the purpose {request.purpose!r}; it knows {', '.join(say)}")
            text = say[request.purpose](request, chance)
        except BadImage as bad:
            return nothing("image", str(bad))
        except _Unknown as unknown:
            return nothing("unknown", f"the rule teacher has no rule for {unknown}")
        words = len(f"{request.system or ''} {request.text}".split())
        if text in ("refused", "cut"):
            return nothing(text, "a fault of the rule teacher", prompt_tokens=words)
        return Said(text=text, prompt_tokens=words, tokens=len(text.split()))

    def _answer(self, request: Request, chance: np.random.Generator) -> str:
        sample = self._sample(request, request.text)
        if chance.random() < self.wrong:
            sample = _as_read(sample, misread(sample, chance))
        if "<SUMMARY>" in f"{request.system or ''}{request.text}":
            return _REFLECTION.sub("", trace_of("qwen_la", sample, sample.columns["digits"]))
        return trace_of("instruct", sample, sample.columns["digits"])

    def _insert(self, request: Request, chance: np.random.Generator) -> str:
        case = _case(request, "question", "so_far")
        sample = self._sample(request, case["question"])
        fault = self._fault(chance)
        if fault in ("refused", "cut"):
            return fault
        first = _readings(sample, case["so_far"])
        if fault == "misread":
            sample = _as_read(sample, misread(sample, chance))
        style = _style(case.get("method"), request)
        whole = trace_of(style, sample, first)
        if style == "qwen_la":
            said = whole[whole.index("<REFLECTION>") :]
        else:
            said = whole[whole.index("<back>") :]
            if "<think>" not in (request.system or ""):  # the block alone was asked for
                said = said[: said.index("</back>") + len("</back>")]
        return _unclosed(said) if fault == "unclosed" else said

    def _rewrite(self, request: Request, chance: np.random.Generator) -> str:
        case = _case(request, "question", "answer")
        sample = self._sample(request, case["question"])
        fault = self._fault(chance)
        if fault in ("refused", "cut"):
            return fault
        first = _readings(sample, case["answer"])
        if fault == "misread":
            sample = _as_read(sample, misread(sample, chance))
        said = trace_of(_style(case.get("method"), request), sample, first)
        return _unclosed(said) if fault == "unclosed" else said

    def _judge(self, request: Request, chance: np.random.Generator) -> str:
        case = _case(request, "question", "answer")
        sample = self._sample(request, case["question"])
        right = _result(case["answer"]) == sample.answer
        return "correct" if right != (chance.random() < self.misjudged) else "incorrect"

    def _fault(self, chance: np.random.Generator) -> str:
        return FAULTS[int(chance.integers(len(FAULTS)))] if chance.random() < self.faulty else ""

    def _chance(self, request: Request) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(content_hash(request)[:15], 16)])

    def _sample(self, request: Request, text: str) -> Sample:
        """What it knows of the request's row, which must be what the text asks."""
        sample = self._known_row(request.row)
        if sample.question not in text:
            raise _Unknown(f"row {request.row!r}, which asks {sample.question!r} on the page that it knows")
        return sample

    def _known_row(self, row: str) -> Sample:
        if row in self._known:
            known = self._known[row]
            return Sample(id=row, question=known.question, answer=known.answer, columns=known.columns)
        named = _ROW.fullmatch(row)
        if named is None:
            raise _Unknown(f"row {row!r}, which has none of the columns of Digits and none of its ids")
        return _page(named[1], int(named[2]), self.pages)


@functools.lru_cache(maxsize=4096)
def _page(split: Any, number: int, seed: int) -> Sample:
    """Without its picture, which it takes time to draw."""
    return dataclasses.replace(Digits(split=split, seed=seed)[number], images=())


def _as_read(sample: Sample, digits: Sequence[int | None]) -> Sample:
    """The sample as it is to somebody who reads these digits."""
    facts = sample.columns
    working, answer = conclude(facts["kind"], facts["looks"], digits, sample.question)
    columns = {**facts, "digits": tuple(digits), "working": working}
    return dataclasses.replace(sample, answer=answer, columns=columns)


def _readings(sample: Sample, text: str) -> list[int | None]:
    """What a text takes each place for in the end; what it does not name is read rightly."""
    digits = list(sample.columns["digits"])
    for place, digit in mentions(text):
        digits[place] = None if digit is None else int(digit)
    return digits


def _case(request: Request, *names: str) -> dict[str, str]:
    try:
        case = json.loads(request.text)
    except ValueError:
        case = None
    if not isinstance(case, dict) or not all(isinstance(case.get(name), str) for name in names):
        raise _Unknown(f"a text to {request.purpose} that is no JSON object with {' and '.join(names)}")
    return case


def _style(method: str | None, request: Request) -> Style:
    styles: dict[str | None, Style] = {
        "semantic_back": "semantic",
        "solution_back": "solution",
        "qwen_la": "qwen_la",
    }
    if method not in styles:
        raise _Unknown(f"the method {method!r} of a text to {request.purpose}")
    return styles[method]


def _result(text: str) -> str:
    if found := _CONCLUSION.search(text):
        return found[1].strip()
    boxes = find_boxes(text)
    return boxes[-1].content(text) if boxes else ""


def _unclosed(text: str) -> str:
    """Without its first closing tag."""
    return re.sub(r"</\w+>", "", text, count=1)
