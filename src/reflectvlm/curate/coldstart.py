r"""A cold start from a model's own answers: Look-Back and Qwen-LA (arXiv 2507.03019, 2505.23558: stage 1).

    questions.jsonl which questions are in evaluation sets (`beforehand.py`)
    answers.jsonl   n sampled answers to each question, graded; or the answer that the source brings
    plan.jsonl      which answer becomes which kind of trace, in the wanted shares (`choosing.py`)
    traces.jsonl    the second look put in (`second_look.py`): a teacher's, or taken from another answer
    votes.jsonl     what judges say of each, if there are judges
    rows.jsonl      what filters let pass, with its images: `dataset()` reads it

The papers name the stage, the layout and a stronger model that inserts the look; sampling, shares, where to
cut and all words are our decision. Self-made traces need no stronger model. Left out: people, for whom
`reflectvlm data review` is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reflectvlm.curate import scarce
from reflectvlm.curate.beforehand import beforehand
from reflectvlm.curate.choosing import Candidates, Choosing, Rewrite, assign, check_shares
from reflectvlm.curate.finishing import Finishing, Made, Nothing
from reflectvlm.curate.judging import Judges, doubt, spent
from reflectvlm.curate.requests import answer_request
from reflectvlm.curate.second_look import SecondLook
from reflectvlm.curate.splice import METHODS, Method
from reflectvlm.curate.stages import FAILED, Line, Stage, dumped, failed_of, tokens_of, write_whole
from reflectvlm.curate.types import Filter, Look, Question, Request, Said, Trace
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.isolation import RewardError

log = logging.getLogger("reflectvlm")

Ask = Callable[[Sequence[Request]], list[Said]]
"""A teacher, perhaps one that remembers."""

Before = Callable[[str, Sequence[Request]], None]
"""Is told who is about to be asked, `model`, `teacher` or `judges`, and the requests."""

SHARES: Mapping[Look, float] = {"corrected": 0.3, "confirmed": 0.5, "unneeded": 0.2}
"""Of Look-Back's methods, unless others are given."""
SHARES_QWEN_LA: Mapping[Look, float] = {"corrected": 0.3, "confirmed": 0.7}
_NOBODY = Judges()
_DERIVED = ("choosing", "second_look", "usual")


def silent(who: str, requests: Sequence[Request]) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """All that decides a set, beside the questions and who is asked.

    Example: `ColdStart(method="semantic_back", self_made=True).run(questions, ask, out=Path("cold"))`
    """

    method: Method
    n: int = 8
    """Answers to each question."""
    instruction: str = "Put the final answer in \\boxed{}."
    """Behind each question, for those answers."""
    temperature: float = 1.0
    max_tokens: int = 1024
    """Of one answer, and of what a teacher writes."""
    column: str | None = None
    """Column of the source with an answer to begin with, as LLaVA-CoT's rows have one; then nobody is asked
    for answers, and there is no pass rate. None: the model's own."""
    self_made: bool = False
    """The second look is the beginning of another of the model's answers; no teacher is needed."""
    rewrite: Rewrite = "splice"
    """splice: what stands before the look is kept letter by letter. rewrite: the teacher writes all anew."""
    pass_rate: tuple[float, float] = (0.1, 1.0)
    agree: float | None = None
    """As in `Choosing`; None: 0.5 for self-made traces, else it does not matter."""
    at: float = 0.5
    shares: Mapping[Look, float] | None = None
    """None: `SHARES`, or `SHARES_QWEN_LA`, without a look that no question can have. Those that are given are
    kept to: where one of them cannot be had, nobody is asked to write looks."""
    limit: int | None = None
    """Most rows of the set."""
    seed: int = 0
    choosing: Choosing = field(init=False, repr=False)
    usual: bool = field(init=False, repr=False)
    """Whether nobody chose the shares."""
    second_look: SecondLook = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}. It must be one of {', '.join(METHODS)}.")
        for name in ("n", "max_tokens", *(("limit",) if self.limit is not None else ())):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. It must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}. It must be 0 or more.")
        if self.self_made and self.rewrite == "rewrite":
            raise ValueError("self=true splices the model's own answers. Leave out rewrite=rewrite, or self.")
        if self.self_made and (self.n < 2 or self.column):
            raise ValueError("self=true needs several answers of the model: n=2 or more, and no column.")
        if self.rewrite not in ("splice", "rewrite"):
            raise ValueError(f"rewrite is {self.rewrite!r}. It must be splice or rewrite.")
        usual = SHARES_QWEN_LA if self.method == "qwen_la" else SHARES
        object.__setattr__(self, "usual", self.shares is None)
        object.__setattr__(self, "shares", dict(usual if self.shares is None else self.shares))
        check_shares(self.shares or {}, self.method)
        agree = (0.5 if self.self_made else 0.0) if self.agree is None else self.agree
        object.__setattr__(self, "agree", agree)
        choosing = Choosing(
            method=self.method, self_made=self.self_made, pass_rate=self.pass_rate, agree=agree, at=self.at
        )
        object.__setattr__(self, "choosing", choosing)
        look = SecondLook(choosing=choosing, rewrite=self.rewrite, max_tokens=self.max_tokens)
        object.__setattr__(self, "second_look", look)

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy(answer_from="CONCLUSION" if self.method == "qwen_la" else "boxed")

    def card(self) -> dict[str, Any]:
        """All settings, as they stand in the folder's card. The same shares behave otherwise where they were
        chosen."""
        own = {name: value for name, value in vars_of(self).items() if name not in _DERIVED}
        return {**own, "usual_shares": self.usual}

    # -- answers ----------------------------------------------------------------------------------

    def answer_requests(self, question: Question) -> list[Request]:
        """What the model is asked about one question; nothing where the source brings the answer."""
        if self.column is not None:
            return []
        return [
            answer_request(
                question, self.instruction, number, temperature=self.temperature, max_tokens=self.max_tokens
            )
            for number in range(self.n)
        ]

    def answered(self, question: Question, said: Sequence[Said]) -> Line:
        """The answers with their grades, as a line."""
        if self.column is not None:
            own = question.columns.get(self.column)
            said = [
                Said(text=own)
                if isinstance(own, str)
                else Said(text=None, why=f"no text in column {self.column}")
            ]
        spent_on = spent(said if self.column is None else ())
        answers = [
            {"text": one.text, "right": self.is_right(one.text, question)}
            if one.text is not None
            else {"text": None, "why": one.why}
            for one in said
        ]
        return {"answers": answers, **spent_on}

    def is_right(self, text: str, question: Question) -> bool:
        try:
            return self.accuracy.is_right(text, question.answer, question.id)
        except RewardError:
            return False  # a grader that had to be killed vouches for nothing

    # -- plan -------------------------------------------------------------------------------------

    def planned(self, answers: Iterator[Line]) -> Plan:
        """For each question which answer it begins with and what its look does, or why it is left out.
        ValueError: a look of shares that were given cannot be had."""
        found, failed = [], 0
        for line in answers:
            found.append((line["id"], self.candidates(line)))
            failed += line.get(FAILED, 0)
        possible = [frozenset(one.starts) for _, one in found]
        assert self.shares is not None
        supply = scarce.Supply.of(possible, self.shares)
        shares, notes = self.shares, []
        if supply.absent:
            left = supply.without_absent() if self.usual else None
            if left is None:
                raise ValueError(scarce.absent_before(supply, failed))
            shares = left
            notes.append(scarce.absent_told(supply.absent, shares))
        looks = assign(possible, shares, self.limit, self.seed)
        kept = sum(look is not None for look in looks)
        notes.append(scarce.before(scarce.Supply.of(possible, shares), kept, self.limit))
        lines = [
            self._planned(name, place, one, look)
            for place, ((name, one), look) in enumerate(zip(found, looks, strict=True))
        ]
        return Plan(lines, shares, [note for note in notes if note])

    def candidates(self, line: Line) -> Candidates:
        answers = line["answers"]
        texts = [one["text"] for one in answers]
        found = self.choosing(texts, [bool(one.get("right")) for one in answers], self.column is None)
        if not found.starts and found.why == "no answers":
            (first, *_) = [one.get("why", "") for one in answers] or [""]
            return Candidates(
                starts={}, why=f"no answers ({first.partition(':')[0]})" if first else "no answers"
            )
        return found

    def _planned(self, name: str, place: int, one: Candidates, look: Look | None) -> Line:
        if look is None:
            return {"id": name, "why": one.why or "not needed for the shares", "rate": one.rate}
        drawn = np.random.default_rng([self.seed, place, 8])
        start = one.starts[look][int(drawn.integers(len(one.starts[look])))]
        line: Line = {"id": name, "look": look, "rate": one.rate, "first": start._asdict()}
        if self.self_made:
            assert one.second is not None
            line |= {"second": one.second._asdict(), "agree": one.agree}
        return line

    # -- all of it --------------------------------------------------------------------------------

    def run(
        self,
        questions: Sequence[Question],
        model: Ask | None,
        *,
        out: Path,
        teacher: Ask | None = None,
        teacher_name: str = "teacher",
        judges: Judges = _NOBODY,
        filters: Sequence[Filter] = (),
        rows_at_once: int = 64,
        before: Before = silent,
    ) -> Mapping[str, Any]:
        """Makes the set in `out`, or goes on with it; the report's values."""
        if model is None and self.column is None:
            raise ValueError("Nobody answers the questions. Give a model, or the column with their answers.")
        if teacher is None and not self.self_made:
            raise ValueError("Nobody writes the second look. Give a teacher, or self=true.")
        stage = functools.partial(Stage, rows_at_once=rows_at_once)
        votes = stage(path=out / "votes.jsonl")
        traces = stage(path=out / "traces.jsonl", later=[votes.path])
        answers = stage(path=out / "answers.jsonl", later=[traces.path, votes.path])
        fit = stage(path=out / "questions.jsonl")
        asked, (questions, unfit) = len(questions), beforehand(questions, filters, fit)
        todo = answers.todo(questions)
        before("model", [request for question in todo for request in self.answer_requests(question)])
        answers.run(questions, lambda part: self._answer(part, model))
        plan, shares, notes = self.planned(answers.lines())
        for note in notes:
            log.warning("%s", note)
        write_whole(out / "plan.jsonl", "".join(f"{dumped(line)}\n" for line in plan))
        planned = [Planned(q, line) for q, line in zip(questions, plan, strict=True) if "look" in line]
        wanted = (self.second_look.request(row.question, row.plan) for row in traces.todo(planned))
        before("teacher", [request for request in wanted if request is not None])
        traces.run(planned, lambda part: self._insert(part, teacher, teacher_name))
        made = [self.made(row, line) for row, line in zip(planned, traces.lines(), strict=True)]
        left_out = [
            Nothing(question.id, "plan", line["why"])
            for question, line in zip(questions, plan, strict=True)
            if "why" in line
        ]
        left_out = [*unfit, *left_out, *(one for one in made if isinstance(one, Nothing))]
        whole = [one for one in made if isinstance(one, Trace)]
        before("judges", judges.to_ask(whole, votes))
        kept, refused = self.judged(whole, judges, votes)
        about = {
            "method": self.method,
            "rates": [line.get("rate") for line in plan],
            "tokens": tokens_of(answers, traces, votes),
            "failed": failed_of(answers, traces, votes),
            "notes": notes,
        }
        finishing = Finishing(filters=filters, shares=shares, usual_shares=self.usual)
        return finishing(out, kept, [*left_out, *refused], asked=asked, about=about)

    def judged(
        self, traces: Sequence[Trace], judges: Judges, stage: Stage
    ) -> tuple[list[Made], list[Nothing]]:
        """Traces with their votes, without those that enough judges refuse."""
        kept, refused = [], []
        for trace, votes in zip(traces, judges.vote(traces, stage), strict=True):
            if judges.refused(votes):
                said = sum(vote is False for vote in votes.values())
                refused.append(Nothing(trace.question.id, "judges", f"{said} of {len(votes)} say incorrect"))
            else:
                kept.append(Made(trace=trace, votes=votes, review=doubt(votes)))
        return kept, refused

    def made(self, row: Planned, line: Line) -> Trace | Nothing:
        if "why" in line:
            return Nothing(row.id, "look", line["why"])
        about = {"rate": row.plan["rate"], "first_answer": row.plan["first"]["answer"]}
        about |= {"agree": row.plan["agree"]} if "agree" in row.plan else {}
        return Trace(
            question=row.question,
            text=line["text"],
            method=self.method,
            look=row.plan["look"],
            kept=line["kept"],
            made_by=line["made_by"],
            about=about,
        )

    def _answer(self, questions: Sequence[Question], model: Ask | None) -> list[Line]:
        asked = [self.answer_requests(question) for question in questions]
        flat = [request for requests in asked for request in requests]
        said = iter(model(flat) if model is not None and flat else ())
        return [
            self.answered(question, [next(said) for _ in requests])
            for question, requests in zip(questions, asked, strict=True)
        ]

    def _insert(self, rows: Sequence[Planned], teacher: Ask | None, name: str) -> list[Line]:
        asked = [self.second_look.request(row.question, row.plan) for row in rows]
        requests = [one for one in asked if one is not None]
        said = iter(teacher(requests) if teacher is not None and requests else ())
        return [
            self.second_look.trace(row.plan, None if one is None else next(said), name)
            for row, one in zip(rows, asked, strict=True)
        ]


@dataclass(frozen=True)
class Planned:
    """A question and what is to be made of it."""

    question: Question
    plan: Line

    @property
    def id(self) -> str:
        return self.question.id


class Plan(NamedTuple):
    """What is to be made of the questions, and what is to be said about it."""

    lines: list[Line]
    shares: Mapping[Look, float]
    notes: list[str]


def vars_of(settings: Any) -> dict[str, Any]:
    """The fields of a frozen dataclass by name."""
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}
