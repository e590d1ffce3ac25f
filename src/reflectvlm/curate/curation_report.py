"""What became of the questions, for people (markdown) and programs (JSON): kept, dropped and why, lengths,
where `<back>` stands, shares wanted and reached, pass rates, tokens.

It holds neither times nor paths, so that it is the same after a kill. Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflectvlm.curate.splice import layout_of
from reflectvlm.curate.types import Look, Trace
from reflectvlm.tags import find_boxes, parse
from reflectvlm.train.table import Table

_LOOK_TAGS = ("back", "REFLECTION")
_PARTS = 10
_REASONS = 12
"""Reasons named under each stage; reports of thousands of different ones help nobody."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curated:
    """What a report is made of."""

    traces: Sequence[Trace]
    dropped: Sequence[tuple[str, str]]
    """Stage and reason, one for each question without a row."""
    asked: int
    shares: Mapping[Look, float] | None = None
    to_review: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    """`method`; `rates`: pass rates of the questions that were asked; `tokens`: by stage; `failed`: calls
    without a reply that may yet come, by stage; `notes`: what must be read; all else is told as it is."""


def report(curated: Curated) -> dict[str, Any]:
    """Plain values; see `report_markdown` for what they mean."""
    about = dict(curated.about)
    rates = [rate for rate in about.pop("rates", ()) if rate is not None]
    notes = [*about.pop("notes", ()), *_silent(about.get("failed", {}))]
    looks = Counter(trace.look for trace in curated.traces)
    blocks = [found for trace in curated.traces if (found := _look_block(trace)) is not None]
    values: dict[str, Any] = {
        **about,
        "questions": curated.asked,
        "rows": len(curated.traces),
        "notes": notes,
        "to_review": curated.to_review,
        "dropped": _dropped(curated.dropped),
        "looks": {look: looks[look] for look in sorted(looks)},
        "made_by": dict(sorted(Counter(trace.made_by for trace in curated.traces).items())),
        "words": {
            "trace": spread([_words(trace.text) for trace in curated.traces]),
            "kept": spread([_words(trace.kept) for trace in curated.traces if trace.kept]),
            "look": spread([_words(content) for content, _ in blocks]),
        },
        "look_begins_at": histogram([place for _, place in blocks]),
        "repeated_lines": _repeated(curated.traces),
    }
    if curated.shares is not None:
        values["shares"] = {
            look: {"wanted": share, "reached": round(looks[look] / max(1, len(curated.traces)), 4)}
            for look, share in curated.shares.items()
        }
    if rates:
        values["pass_rates"] = histogram(rates)
    return values


def report_markdown(values: Mapping[str, Any]) -> str:
    """The same as tables."""
    rows, questions = values["rows"], values["questions"]
    method = values.get("method", "")
    parts = [f"# {rows:,} rows from {questions:,} questions{f', {method}' if method else ''}\n"]
    parts += [f"- {note}" for note in values["notes"]]
    parts += [""] if values["notes"] else []
    fates = Table("What became of the questions", ("stage: reason", "questions", "share"))
    fates.add("row", f"{rows:,}", _share(rows, questions))
    for stage, found in values["dropped"].items():
        fates.add(stage, f"{found['all']:,}", _share(found["all"], questions))
        for reason, count in found["reasons"].items():
            fates.add(f"{stage}: {reason}", f"{count:,}", _share(count, questions))
    parts.append(fates.markdown)
    if "shares" in values:
        looks = Table("What the second look does", ("look", "rows", "wanted", "reached"))
        for look, share in values["shares"].items():
            count = values["looks"].get(look, 0)
            looks.add(look, f"{count:,}", f"{share['wanted']:.1%}", f"{share['reached']:.1%}")
        parts.append(looks.markdown)
    lengths = Table("Words", ("part", "least", "10 %", "median", "90 %", "most"))
    for name, found in values["words"].items():
        if found:
            lengths.add(name, *(f"{found[key]:,}" for key in ("least", "tenth", "median", "ninth", "most")))
    parts.append(lengths.markdown)
    parts.append(_bars("Where the second look begins, as a share of the text", values["look_begins_at"]))
    if "pass_rates" in values:
        parts.append(_bars("Pass rates of the questions", values["pass_rates"]))
    others = Table("Further counts", ("what", "number"))
    others.add("rows that people should look at (to_review.jsonl)", f"{values['to_review']:,}")
    others.add("rows whose text another row has, letter by letter", f"{values['repeated_lines']:,}")
    for name, count in values["made_by"].items():
        others.add(f"rows made by {name}", f"{count:,}")
    for stage, (asked, said) in values.get("tokens", {}).items():
        others.add(f"tokens of {stage}: asked", f"{asked:,}").add(f"tokens of {stage}: said", f"{said:,}")
    parts.append(others.markdown)
    return "\n".join(parts)


def without_rows(values: Mapping[str, Any]) -> str:
    """Why a set has no row: its commonest reason."""
    if not values["questions"]:
        return "The source has no questions."
    stage, found = next(iter(values["dropped"].items()))
    reason, count = next(iter(found["reasons"].items()))
    said = f"{stage}: {reason}" if count == found["all"] else f"{stage}, for example: {reason}"
    remedy = " Give another source=, or leave the set out of without=." if stage == "overlap" else ""
    return (
        f"The set has no rows: of {values['questions']:,} questions {found['all']:,} are left out for "
        f"{said}.{remedy}"
    )


def _silent(failed: Mapping[str, int]) -> list[str]:
    """Calls that the next start makes again."""
    if not failed:
        return []
    told = ", ".join(f"{name} {count:,}" for name, count in failed.items())
    return [f"Calls without a reply, for reasons that may pass: {told}. The same words again ask for these."]


def spread(numbers: Sequence[int]) -> dict[str, int]:
    """Least, tenth, median, ninth tenth, most; empty for no numbers."""
    if not numbers:
        return {}
    ordered = sorted(numbers)

    def at(share: float) -> int:
        return ordered[round(share * (len(ordered) - 1))]

    return {"least": at(0), "tenth": at(0.1), "median": at(0.5), "ninth": at(0.9), "most": at(1)}


def histogram(shares: Sequence[float]) -> list[int]:
    """How many lie in each tenth from 0 to 1; 1 itself is in the last."""
    counts = [0] * _PARTS
    for share in shares:
        counts[min(_PARTS - 1, int(share * _PARTS + 1e-9))] += 1
    return counts


def _dropped(dropped: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """By stage, the commonest first; of each its commonest reasons."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for stage, why in dropped:
        found[stage][why] += 1
    ordered = sorted(found.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    return {
        stage: {
            "all": sum(reasons.values()),
            "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:_REASONS]),
        }
        for stage, reasons in ordered
    }


def _look_block(trace: Trace) -> tuple[str, float] | None:
    """The first second look: its text, and where it begins as a share of the text before the answer's end."""
    parsed = parse(layout_of(trace.method), trace.text)  # type: ignore[arg-type]
    block = next((block for block in parsed.blocks if block.tag in _LOOK_TAGS), None)
    if block is None:
        return None
    boxes = find_boxes(trace.text)
    end = boxes[-1].end if boxes else len(trace.text)
    return block.content, block.start / max(1, end)


def _repeated(traces: Sequence[Trace]) -> int:
    return sum(count for count in Counter(trace.text for trace in traces).values() if count > 1)


def _words(text: str) -> int:
    return len(text.split())


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "–"


def _bars(title: str, counts: Sequence[int]) -> str:
    table = Table(title, ("tenth", "number", ""))
    most = max(counts, default=0) or 1
    for place, count in enumerate(counts):
        table.add(
            f"{place / _PARTS:.1f} to {(place + 1) / _PARTS:.1f}",
            f"{count:,}",
            "#" * round(20 * count / most),
        )
    return table.markdown
