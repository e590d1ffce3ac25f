"""Distillation as Qwen Look Again makes its Qwen-Zero-40k (arXiv 2505.23558, stage 3).

    questions.jsonl  which questions are in evaluation sets (`beforehand.py`)
    answers.jsonl    the policy answers each question once, in its layout
    votes.jsonl      judges vote on each answer, "correct" or "incorrect"
    rewrites.jsonl   where enough of them say "incorrect" (2 of 4 in the paper) a stronger teacher rewrites it
    rows.jsonl       what filters let pass; `to_review.jsonl`: what was rewritten, or what judges differ
                     about or have no word for

A policy's answer that has no layout counts as one to be rewritten, whatever judges say: nobody could train on
it. The recipe `qwen_la_distill` is the way without judges and teacher: a rubric decides, and a gold answer
stands in (`train/distill.py`). Left out: that people check the rest, for which `reflectvlm data review` is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.curate.beforehand import beforehand
from reflectvlm.curate.coldstart import Ask, Before, silent, vars_of
from reflectvlm.curate.finishing import Finishing, Made, Nothing
from reflectvlm.curate.judging import Judges, Votes, differ, doubt, spent
from reflectvlm.curate.requests import answer_request, read_rewrite, rewrite_request
from reflectvlm.curate.splice import METHODS, Method, layout_of
from reflectvlm.curate.stages import Line, Stage, failed_of, tokens_of
from reflectvlm.curate.types import Filter, Question, Request, Said, Trace
from reflectvlm.tags import parse


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Example: `Distillation().run(questions, policy, Judges(asked={…}), teacher, out=Path("distilled"))`"""

    method: Method = "qwen_la"
    instruction: str = ""
    """Behind each question: the one that the policy was trained with."""
    temperature: float = 0.0
    max_tokens: int = 1024
    """Of one answer, and of a rewritten one."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}. It must be one of {', '.join(METHODS)}.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}. It must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}. It must be 0 or more.")

    def card(self) -> dict[str, Any]:
        return vars_of(self)

    def answer_requests(self, question: Question) -> list[Request]:
        settings = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return [answer_request(question, self.instruction, 0, **settings)]

    def run(
        self,
        questions: Sequence[Question],
        policy: Ask,
        judges: Judges,
        teacher: Ask,
        *,
        out: Path,
        policy_name: str = "policy",
        teacher_name: str = "teacher",
        filters: Sequence[Filter] = (),
        rows_at_once: int = 64,
        before: Before = silent,
    ) -> Mapping[str, Any]:
        """Makes the set in `out`, or goes on with it; the report's values."""
        if not judges.asked:
            raise ValueError("Nobody judges the answers. Give judges, e.g. judges=rule.")
        stage = functools.partial(Stage, rows_at_once=rows_at_once)
        rewritten = stage(path=out / "rewrites.jsonl")
        voted = stage(path=out / "votes.jsonl", later=[rewritten.path])
        answers = stage(path=out / "answers.jsonl", later=[voted.path, rewritten.path])
        fit = stage(path=out / "questions.jsonl")
        asked, (questions, unfit) = len(questions), beforehand(questions, filters, fit)
        todo = answers.todo(questions)
        before("model", [request for question in todo for request in self.answer_requests(question)])
        answers.run(questions, lambda part: self._answer(part, policy))
        whys = {line["id"]: line["why"] for line in answers.lines() if "why" in line}
        said = [
            self._trace(question, line.get("text"), policy_name)
            for question, line in zip(questions, answers.lines(), strict=True)
        ]
        judged = [one for one in said if isinstance(one, Trace)]
        before("judges", judges.to_ask(judged, voted))
        votes = dict(zip(map(_id, judged), judges.vote(judged, voted), strict=True))
        wrong = [one for one in judged if self.is_wrong(one, votes[_id(one)], judges)]
        rows = [_Row(one.question, one) for one in wrong]
        before("teacher", self.rewrite_requests(rewritten.todo(rows)))
        rewritten.run(rows, lambda part: self._rewrite(part, teacher))
        new = {line["id"]: line for line in rewritten.lines()}
        made = [self.made(one, votes[_id(one)], new.get(_id(one)), teacher_name) for one in judged]
        silent = [
            Nothing(one.id, "answers", f"no answer ({whys[one.id].partition(':')[0]})")
            for one in said
            if isinstance(one, Question)
        ]
        finishing = Finishing(filters=filters)
        return finishing(
            out,
            [one for one in made if isinstance(one, Made)],
            [*unfit, *silent, *(one for one in made if isinstance(one, Nothing))],
            asked=asked,
            about={
                "method": self.method,
                "called_incorrect": sum(judges.refused(vote) for vote in votes.values()),
                "judges_differ": sum(differ(vote) for vote in votes.values()),
                "rewritten": len(wrong),
                "tokens": tokens_of(answers, voted, rewritten),
                "failed": failed_of(answers, voted, rewritten),
            },
        )

    def is_wrong(self, trace: Trace, votes: Votes, judges: Judges) -> bool:
        return judges.refused(votes) or not parse(layout_of(self.method), trace.text).valid

    def made(self, first: Trace, votes: Votes, rewritten: Line | None, teacher_name: str) -> Made | Nothing:
        """The row's trace: the policy's own, or the teacher's."""
        if rewritten is None:
            return Made(trace=first, votes=votes, review=doubt(votes))
        if "why" in rewritten:
            return Nothing(first.question.id, "rewrite", rewritten["why"])
        trace = Trace(
            question=first.question,
            text=rewritten["text"],
            method=self.method,
            look="corrected",
            made_by=teacher_name,
            about={"first_answer": first.text, "first_votes": dict(votes)},  # nobody has judged the new one
        )
        review = f"rewritten; of the first answer: {why}" if (why := doubt(votes)) else "rewritten"
        return Made(trace=trace, review=review)

    def _trace(self, question: Question, text: str | None, name: str) -> Trace | Question:
        """The policy's answer as a trace; the question itself where there is none."""
        if text is None:
            return question
        kept = _before_look(self.method, text)
        return Trace(
            question=question,
            text=text,
            method=self.method,
            look="unneeded" if kept is None else "confirmed",
            kept=text if kept is None else kept,
            made_by=name,
        )

    def _answer(self, questions: Sequence[Question], policy: Ask) -> list[Line]:
        requests = [request for question in questions for request in self.answer_requests(question)]
        return [_line(one) for one in policy(requests)]

    def _rewrite(self, rows: Sequence[_Row], teacher: Ask) -> list[Line]:
        return [self._rewritten(one) for one in teacher(self.rewrite_requests(rows))]

    def rewrite_requests(self, rows: Sequence[_Row]) -> list[Request]:
        return [rewrite_request(row.question, self.method, row.first.text, self.max_tokens) for row in rows]

    def _rewritten(self, said: Said) -> Line:
        if said.text is None:
            return {"why": f"no reply ({said.why.partition(':')[0]})", "said": said.why, **spent([said])}
        if problem := read_rewrite(self.method, said.text):
            return {"why": f"reply out of layout: {problem}", "said": said.text, **spent([said])}
        return {"text": said.text.strip(), **spent([said])}


@dataclass(frozen=True)
class _Row:
    question: Question
    first: Trace

    @property
    def id(self) -> str:
        return self.question.id


def _line(said: Said) -> Line:
    return ({"text": said.text} if said.text is not None else {"why": said.why}) | spent([said])


def _before_look(method: Method, text: str) -> str | None:
    """What stands before a second look that says something; None where there is none."""
    blocks = parse(layout_of(method), text).blocks
    looks = [block for block in blocks if block.tag in ("back", "REFLECTION") and block.content.strip()]
    return text[: looks[0].start] if looks else None


def _id(trace: Trace) -> str:
    return trace.question.id
