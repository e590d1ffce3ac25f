"""The second look of one planned row: what its teacher is asked, and the trace that comes of it. Pure.

    unneeded     nobody is asked: the answer as it stands
    self-made    nobody is asked: the look is the beginning of another of the model's answers
    splice       the teacher writes the look, and what follows it where the answer was wrong
    rewrite      the teacher writes all of it

All but a rewrite keep what stands before the look letter by letter (`splice.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from reflectvlm.curate.choosing import Choosing, Rewrite, Start
from reflectvlm.curate.judging import spent
from reflectvlm.curate.requests import insert_request, read_insert, read_rewrite, rewrite_request
from reflectvlm.curate.splice import Method, Spliced, with_look, with_reflection, without_look
from reflectvlm.curate.stages import Line
from reflectvlm.curate.types import Question, Request, Said

OPENING = {
    "semantic_back": "Looking again: {look}",
    "solution_back": "Checking {answer} on the image: {look}",
    "qwen_la": "Looking again: {look}",
}
"""How a self-made look begins."""


@dataclass(frozen=True, kw_only=True)
class SecondLook:
    """`request`, then `trace` with the reply. A row's plan is a line of `plan.jsonl`."""

    choosing: Choosing
    rewrite: Rewrite
    max_tokens: int
    """Of what a teacher writes."""

    @property
    def method(self) -> Method:
        return self.choosing.method

    def request(self, question: Question, plan: Line) -> Request | None:
        """What the teacher is asked for this row; None where nothing is to be asked."""
        start, look = Start(**plan["first"]), plan["look"]
        if self.choosing.self_made or look == "unneeded":
            return None
        if self.rewrite == "rewrite":
            return rewrite_request(question, self.method, start.text, self.max_tokens)
        return insert_request(
            question, self.method, look, start.kept, self._block_only(plan), self.max_tokens
        )

    def trace(self, plan: Line, said: Said | None, teacher: str = "") -> Line:
        """The trace's text, or why there is none."""
        start, look = Start(**plan["first"]), plan["look"]
        if look == "unneeded":
            reasoning = f"{start.kept} {start.rest}".strip()
            found: Spliced | str = self._whole(start) or without_look(reasoning, start.answer)
            return _as_line(found, "itself")
        if self.choosing.self_made:
            return _as_line(self._own(start, Start(**plan["second"])), "itself")
        assert said is not None
        if said.text is None:
            return {"why": f"no reply ({said.why.partition(':')[0]})", "said": said.why, **spent([said])}
        found = self._taught(plan, start, said.text)
        shown = {"said": said.text} if isinstance(found, str) else {}
        return _as_line(found, teacher) | shown | spent([said])

    def _block_only(self, plan: Line) -> bool:
        """A right answer that goes on after the cut needs the block alone: its own end is kept as well."""
        return plan["look"] == "confirmed" and self.method != "qwen_la" and bool(plan["first"]["rest"])

    def _whole(self, start: Start) -> Spliced | None:
        """The reasoning as it stands in the answer, white space at the cut and all."""
        if not start.rest:
            return None
        first = start.text.index(start.kept)
        end = start.text.index(start.rest, first + len(start.kept)) + len(start.rest)
        return without_look(start.text[first:end], start.answer)

    def _own(self, start: Start, second: Start) -> Spliced | str:
        seen = self.choosing.own_look(second)
        assert seen is not None, "the plan takes no second answer without a look"
        look = OPENING[self.method].format(look=seen[0], answer=start.answer)
        if self.method == "qwen_la":
            return with_reflection(start.kept, look, second.answer)
        return with_look(start.kept, look, seen[1], second.answer)

    def _taught(self, plan: Line, start: Start, text: str) -> Spliced | str:
        if self.rewrite == "rewrite":
            problem = read_rewrite(self.method, text)
            return f"reply out of layout: {problem}" if problem else Spliced(text=text.strip(), kept="")
        block_only = self._block_only(plan)
        reply = read_insert(self.method, block_only, text)
        if isinstance(reply, str):
            return f"reply out of layout: {reply}"
        if self.method == "qwen_la":
            return with_reflection(start.kept, reply.look, reply.answer)
        rest, answer = (start.rest, start.answer) if block_only else (reply.rest, reply.answer)
        return with_look(start.kept, reply.look, rest, answer)


def _as_line(found: Spliced | str, by: str) -> Line:
    if isinstance(found, str):
        return {"why": found, "made_by": by}
    return {"text": found.text, "kept": found.kept, "made_by": by}
