"""What the page may ask and say, without any HTTP: rows, checks, decisions, search, the reviewed set.

Rows are numbered as they are shown: all of them, or with `only="disagreement"` those whose judges differ.
Values that go out are plain JSON; texts are texts, and nothing here makes markup of them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from reflectvlm.curate.review.check import LayoutName, check_trace
from reflectvlm.curate.review.decisions import WHATS, Decision, Decisions, Drafts
from reflectvlm.curate.review.rows import EDITABLE, ReviewRows, Shown, as_text
from reflectvlm.curate.review.written import Written, write_reviewed

WHY = "review"
"""Column in which `data distill` and `data coldstart` say why somebody should look at a row."""
_LONGEST = 4000
"""Characters shown of another column's value."""
_SIGNS = {"accept": "a", "fix": "f", "drop": "d"}


class Refused(ValueError):
    """What the page asked cannot be done; `status` is HTTP's, `more` goes out with the text."""

    def __init__(self, status: int, text: str, **more: Any) -> None:
        super().__init__(text)
        self.status, self.more = status, more


@dataclass(eq=False, kw_only=True)
class Desk:
    rows: ReviewRows
    decisions: Decisions
    drafts: Drafts
    out: Path
    by: str
    layout: LayoutName = "auto"
    only: Literal["all", "disagreement"] = "all"
    rest: Literal["drop", "keep"] = "drop"
    _lock: Any = field(default_factory=threading.Lock)

    @cached_property
    def shown(self) -> list[int]:
        """Numbers of `rows` that are shown."""
        every = range(len(self.rows))
        return [i for i in every if self.only == "all" or self.rows.mixed[i]]

    @cached_property
    def place_of(self) -> dict[str, int]:
        return {self.rows.ids[index]: place for place, index in enumerate(self.shown)}

    def state(self) -> dict[str, Any]:
        """All that the page needs to find its way: one letter a row."""
        with self._lock:
            return {
                "name": self.rows.name,
                "status": "".join(map(self._sign, self.shown)),
                "mixed": "".join("01"[self.rows.mixed[index]] for index in self.shown),
                "start": self._start(),
                "standing": len(self.decisions),
                "unread": [one.message for one in self.rows.unread[:50]],
                "unread_count": len(self.rows.unread),
                "by": self.by,
                "layout": self.layout,
                "out": str(self.out),
                "rest": self.rest,
            }

    def row(self, place: int) -> dict[str, Any]:
        index = self._index(place)
        shown = self._current(index)
        with self._lock:
            decision = self.decisions.of(shown.id, shown.digest)
            draft = self.drafts.texts.get(shown.id)
        return {
            "place": place,
            "id": shown.id,
            "position": shown.position,
            "of": shown.digest,
            **{part: getattr(shown, part) for part in EDITABLE},
            "has_answer": self.rows.fields.columns.answer is not None,
            "images": len(shown.images),
            "votes": [vote._asdict() for vote in shown.votes],
            "first_votes": [vote._asdict() for vote in shown.first_votes],
            "first_answer": shown.first_answer,
            "mixed": bool(self.rows.mixed[index]),
            "why": why if isinstance(why := shown.others.get(WHY), str) else "",
            "others": [[key, as_text(value)[:_LONGEST]] for key, value in shown.others.items()],
            "decision": _told(decision) if decision else None,
            "draft": draft,
        }

    def check(self, place: int, texts: Mapping[str, Any], draft: bool = False) -> dict[str, Any]:
        """What speaks for and against the row with these texts; with `draft` they are kept as one."""
        shown = self._current(self._index(place))
        texts = _texts(texts)
        if draft:
            changed = _changed(shown, texts)
            with self._lock:
                self.drafts.keep(shown.id, changed or None)
        return self._checked(shown, texts)

    def decide(
        self, place: int, do: str, of: str, texts: Mapping[str, Any] | None = None, anyway: bool = False
    ) -> dict[str, Any]:
        """Writes a decision. What the checks are against needs `anyway`, except to be dropped."""
        shown = self._current(self._index(place))
        what = next((one for one in WHATS if one == do), None)
        if what is None:
            raise Refused(400, f"{do!r} is no decision: {', '.join(WHATS)}.")
        if of != shown.digest:
            raise Refused(409, "The row is no longer the one that was shown. Load the page again.")
        changed = _changed(shown, _texts({} if texts is None else texts)) if do == "fix" else {}
        if do == "fix" and not changed:
            raise Refused(422, "Nothing is changed. Accept the row as it is, or change it.")
        problems = [] if do == "drop" else self._checked(shown, changed)["problems"]
        if problems and not anyway:
            raise Refused(422, "; ".join(problems), problems=problems)
        decision = Decision(
            do=what, row=shown.id, of=of, by=self.by, at=_now(), fields=changed, despite="; ".join(problems)
        )
        with self._lock:
            self.decisions.add(decision)
            self.drafts.keep(shown.id, None)
            return {"place": place, "status": _SIGNS[what], "standing": len(self.decisions)}

    def undo(self, standing: int) -> dict[str, Any]:
        """Takes the last decision back, if it is the one that the page knows as the last."""
        with self._lock:
            if not len(self.decisions):
                raise Refused(422, "There is nothing to undo.")
            if standing != len(self.decisions):
                raise Refused(409, "Somebody has decided since, in another tab. Load the page again.")
            last = self.decisions.undo(self.by, _now())
            place = self.place_of.get(last.row)
            if last.do == "fix":
                self.drafts.keep(last.row, last.fields)  # typed once is enough
            status = "." if place is None else self._sign(self.shown[place])
            return {"place": place, "id": last.row, "status": status, "standing": len(self.decisions)}

    def draft(self, place: int, texts: Mapping[str, Any] | None) -> dict[str, Any]:
        """Keeps what somebody has typed so far; None forgets it."""
        shown = self._current(self._index(place))
        changed = _changed(shown, _texts(texts)) if texts is not None else {}
        with self._lock:
            self.drafts.keep(shown.id, changed or None)
        return {"draft": changed or None}

    def search(self, text: str) -> list[int]:
        """Places of the rows with all of these words, in any case."""
        words = text.lower().split()
        if not words:
            return list(range(len(self.shown)))
        found = []
        for place, index in enumerate(self.shown):
            row = self.rows[index].words()
            if all(word in row for word in words):
                found.append(place)
        return found

    def image(self, place: int, number: int) -> tuple[str, bytes]:
        index = self._index(place)
        if not 0 <= number < len(self.rows[index].images):
            raise Refused(404, f"The row has no image {number}.")
        return self.rows.image(index, number)

    def finish(self) -> Written:
        """Writes the reviewed set."""
        with self._lock:
            return write_reviewed(self.rows, self.decisions, self.out, self.rest)

    def _checked(self, shown: Shown, texts: Mapping[str, str]) -> dict[str, Any]:
        found = check_trace(texts.get("trace", shown.trace), texts.get("answer", shown.answer), self.layout)
        row = self.rows.problem(shown, texts)
        return {
            "layout": found.layout,
            "problem": found.problem,
            "answer": found.answer,
            "right": found.right,
            "why": found.why,
            "row": row,
            "problems": [*found.problems, *([row] if row else [])],
        }

    def _index(self, place: int) -> int:
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(self.shown):
            raise Refused(404, f"There is no row {place!r}.")
        return self.shown[place]

    def _current(self, index: int) -> Shown:
        shown = self.rows[index]
        if (
            shown.digest != self.rows.digests[index]
        ):  # an image beside it is read anew each time, its name not
            raise Refused(409, f"{shown.position} has changed. Start the review again.")
        return shown

    def _sign(self, index: int) -> str:
        decision = self.decisions.of(self.rows.ids[index], self.rows.digests[index])
        return _SIGNS[decision.do] if decision else "."

    def _start(self) -> int:
        """Where people were: the row that was undone, or the next undecided one after the last decision."""
        last = self.place_of.get(self.decisions.last_row or "")
        if last is not None and self.decisions.undone:
            return last
        after = 0 if last is None else last + 1
        order = [*range(after, len(self.shown)), *range(after)]
        return next((place for place in order if self._sign(self.shown[place]) == "."), 0)


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        key in EDITABLE and isinstance(text, str) for key, text in value.items()
    ):
        raise Refused(400, f"A row's texts are {', '.join(EDITABLE)}.")
    try:
        "".join(value.values()).encode()
    except UnicodeEncodeError:
        raise Refused(422, "Half of a surrogate pair is no text. Write the character whole.") from None
    return {key: text.replace("\r\n", "\n") for key, text in value.items()}


def _changed(shown: Shown, texts: Mapping[str, str]) -> dict[str, str]:
    return {part: text for part, text in texts.items() if text != getattr(shown, part)}


def _told(decision: Decision) -> dict[str, Any]:
    return {
        "do": decision.do,
        "by": decision.by,
        "at": decision.at,
        "fields": dict(decision.fields),
        "despite": decision.despite,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
