"""Several judges vote on each trace, "correct" or "incorrect" (Qwen-LA, arXiv 2505.23558, stage 3: four).

What becomes of the votes is their reader's matter: a cold start leaves out what enough judges call incorrect,
a distillation has it rewritten. A judge that says neither word, or nothing, has no vote. Where judges differ
people should look, and where none of them had a vote as well: nobody has vouched for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from reflectvlm.curate.requests import judge_request, read_vote
from reflectvlm.curate.stages import FAILED, Line, Stage
from reflectvlm.curate.teachers.reasons import is_kept
from reflectvlm.curate.types import Request, Said, Trace

Votes = Mapping[str, bool | None]
"""By judge: correct, incorrect, or no vote."""


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Example: `Judges(asked={"a": calls_a, "b": calls_b}, votes=2)`"""

    asked: Mapping[str, Callable[[Sequence[Request]], list[Said]]] = field(default_factory=dict)
    votes: int = 2
    """So many who say "incorrect" decide."""
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.asked and not 1 <= self.votes <= len(self.asked):
            raise ValueError(
                f"votes is {self.votes}, and there are {len(self.asked)} judges. It must be from 1 to their "
                "number, or no trace could ever be called incorrect."
            )

    def requests(self, traces: Sequence[Trace]) -> list[Request]:
        """What each judge is asked; nothing where there are none."""
        if not self.asked:
            return []
        return [judge_request(trace.question, trace.text, self.max_tokens) for trace in traces]

    def to_ask(self, traces: Sequence[Trace], stage: Stage) -> list[Request]:
        """What each judge is still to be asked."""
        if not self.asked:
            return []
        return self.requests([row.trace for row in stage.todo([_Judged(trace) for trace in traces])])

    def vote(self, traces: Sequence[Trace], stage: Stage) -> list[Votes]:
        """The votes on each trace, one line of the stage's file for each."""
        if not self.asked:
            return [{} for _ in traces]
        stage.run([_Judged(trace) for trace in traces], self._lines)
        return [line["votes"] for line in stage.lines()]

    def refused(self, votes: Votes) -> bool:
        return bool(votes) and sum(vote is False for vote in votes.values()) >= self.votes

    def _lines(self, rows: Sequence[_Judged]) -> list[Line]:
        requests = self.requests([row.trace for row in rows])
        said = {name: judge(requests) for name, judge in self.asked.items()}
        return [
            {
                "votes": {name: _vote(replies[place]) for name, replies in said.items()},
                "said": {name: _told(replies[place]) for name, replies in said.items()},
                **spent([replies[place] for replies in said.values()]),
            }
            for place in range(len(rows))
        ]


@dataclass(frozen=True)
class _Judged:
    trace: Trace

    @property
    def id(self) -> str:
        return self.trace.question.id


def differ(votes: Votes) -> bool:
    """Whether people should look: not all judges said the same word."""
    return len(set(votes.values())) > 1


def doubt(votes: Votes) -> str:
    """Why people should look at a trace, in a few words; empty where judges agree, or none are asked."""
    if votes and all(vote is None for vote in votes.values()):
        return "no judge voted"
    return "judges differ" * differ(votes)


def spent(said: Sequence[Said]) -> Line:
    """Tokens of some replies, as they stand in a stage's line; and how many calls the next start makes
    again, because something stood between, if any."""
    line: Line = {"tokens": [sum(one.prompt_tokens for one in said), sum(one.tokens for one in said)]}
    failed = sum(not is_kept(one) for one in said)
    return line | ({FAILED: failed} if failed else {})


def _vote(said: Said) -> bool | None:
    return None if said.text is None else read_vote(said.text)


def _told(said: Said) -> str:
    return said.why if said.text is None else said.text[:200]
