"""What the page shows, as plain values: compact, since thousands of rollouts are one JSON text.

Columns instead of rows; a question once, however often it was answered; a token's place and log-prob as
text that the page reads when its answer is opened; curves of at most `MOST_POINTS` points that keep their
extremes.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflectvlm.report.heat import Heat
from reflectvlm.report.notes import notes
from reflectvlm.report.reading import Answer, RunRecord
from reflectvlm.train.console import compare, results
from reflectvlm.train.evaluate import PLAIN_NAMES
from reflectvlm.train.plots import RATES, TITLES, Series

MOST_POINTS = 1500
"""Points of a curve."""
MOST_ANSWERS = 20_000
"""Rollouts of a run on the page; of more, evenly spread ones."""
MOST_BYTES = 24_000_000
"""Of pictures on the page."""

Heats = Mapping[int, Heat]
"""By the place of its answer in `RunRecord.answers`."""

_KINDS = {".png": "image/png", ".jpg": "image/jpeg"}

_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Learning", ("reward", "accuracy", "loss", "useful_groups", "reward/*")),
    ("Looking back", ("back_rate", "layout_rate", "blocks/*", "inserted/*")),
    ("Answers", ("length/mean", "length/max", "truncated", "cut", "unscored")),
    ("Policy", ("kl", "entropy", "clip_fraction", "ratio", "ratio_gap", "grad_norm", "lr")),
    ("Time", ("time/*",)),
    ("More", ("*",)),
)
_MORE_TITLES = {
    "useful_groups": "groups with a signal",
    "blocks/tokens": "tokens inside looks, per answer",
    "blocks/position": "place of a look in its answer",
    "inserted/blocks": "inserted image blocks per answer",
    "inserted/tokens": "inserted tokens per answer",
    "length/max": "longest answer, tokens",
    "truncated": "cut off by the budget",
    "cut": "cut off, nobody waited",
    "unscored": "unscored",
    "clip_fraction": "clipped tokens",
    "ratio": "policy ratio",
    "ratio_gap": "policy ratio, largest gap",
    "lr": "learning rate",
    "time/step": "seconds per step",
    "time/rollout": "seconds of rollouts",
    "time/update": "seconds of updates",
    "time/tokens_per_second": "tokens per second",
}
_SHARES = frozenset({*RATES, "useful_groups", "truncated", "cut", "unscored", "clip_fraction"})


def payload(runs: Sequence[RunRecord], heats: Sequence[Heats] = ()) -> dict[str, Any]:
    """One or two runs as what `assets/` reads; the first is the one that the page is about."""
    prompts = _Prompts()
    listed = [
        _run(run, prompts, heats[number] if number < len(heats) else {}) for number, run in enumerate(runs)
    ]
    images, left_out = _images(prompts.digests, [run.pictures for run in runs])
    return {
        "runs": listed,
        "prompts": prompts.rows,
        "images": images,
        "imagesLeftOut": left_out,
        "panels": list(_panels(runs)),
    }


@dataclass
class _Prompts:
    """Questions of all runs, each once: [sample, question, gold, numbers of its pictures]."""

    rows: list[list[Any]] = field(default_factory=list)
    digests: dict[str, int] = field(default_factory=dict)
    """Number of each picture."""
    _known: dict[tuple[str, str], int] = field(default_factory=dict)

    def number(self, answer: Answer) -> int:
        key = answer.sample, answer.question
        if key not in self._known:
            self._known[key] = len(self.rows)
            self.rows.append([answer.sample, answer.question, answer.gold, []])
        row = self.rows[self._known[key]]
        row[2] = row[2] or answer.gold
        if not row[3]:  # another process's rows come without pictures
            row[3] = [self.digests.setdefault(one, len(self.digests)) for one in answer.images]
        return self._known[key]


def _run(run: RunRecord, prompts: _Prompts, heats: Heats) -> dict[str, Any]:
    table = (
        compare("", results(run.before, run.after), results(run.after, run.before), {}) if run.after else None
    )
    shown = spread(range(len(run.answers)), MOST_ANSWERS, always=heats)
    return {
        "name": run.name,
        "finished": run.finished,
        "steps": run.steps,
        "tag": run.tag,
        "facts": list(map(list, run.facts.items())),
        "overrides": list(run.overrides),
        "settings": list(map(list, run.settings.items())),
        "table": [] if table is None else [list(row) for row in table.rows],
        "notes": {} if table is None else notes(run),
        "series": {key: _series(one) for key, one in run.series.items()},
        "answers": _answers([run.answers[place] for place in shown], prompts),
        "answersLeftOut": len(run.answers) - len(shown),
        "heats": {number: heats[place].as_json() for number, place in enumerate(shown) if place in heats},
    }


def _answers(answers: Sequence[Answer], prompts: _Prompts) -> dict[str, Any]:
    names = list(dict.fromkeys(name for one in answers for name in one.parts))
    stops = list(dict.fromkeys(one.stop for one in answers))
    known = [one.has_tokens for one in answers]
    return {
        "prompt": [prompts.number(one) for one in answers],
        "step": [one.step for one in answers],
        "heldOut": [int(one.held_out) for one in answers],
        "text": [one.text for one in answers],
        "reward": [_short(one.reward) for one in answers],
        "scored": [int(one.scored) for one in answers],
        "parts": {name: [_short(one.parts.get(name)) for one in answers] for name in names},
        "stops": stops,
        "stop": [stops.index(one.stop) for one in answers],
        "length": [one.length for one in answers],
        "version": [one.version for one in answers],
        "starts": [
            starts(one.text, one.offsets) if ok else "" for one, ok in zip(answers, known, strict=True)
        ],
        "logprobs": [hundredths(one.logprobs) if ok else "" for one, ok in zip(answers, known, strict=True)],
        "blocks": {
            number: {"grids": list(map(list, one.grids)), "list": [_block(block) for block in one.blocks]}
            for number, one in enumerate(answers)
            if one.blocks
        },
    }


def starts(text: str, offsets: Sequence[int]) -> str:
    """Where tokens begin, each as its distance from the one before, in the UTF-16 units of a browser's
    texts: `starts("a😀b", (0, 1, 2)) == "0 1 2"`."""
    if text.isascii():
        places = list(offsets)
    else:
        units = [0, *itertools.accumulate(1 + (ord(c) > 0xFFFF) for c in text)]
        places = [units[place] for place in offsets]
    return " ".join(str(b - a) for a, b in itertools.pairwise([0, *places]))


def hundredths(logprobs: Sequence[float | None]) -> str:
    """Minus the log-probs in hundredths, `x` for a forced token: `hundredths([-0.1, None]) == "10 x"`."""
    return " ".join("x" if one is None else str(round(-100 * one)) for one in logprobs)


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most `most` of its points: of each stretch the lowest and the highest, so that no spike is lost."""
    steps, values = series
    if len(steps) <= most:
        return series
    stretches = max(1, most // 2)
    kept: set[int] = set()
    for number in range(stretches):
        stretch = range(number * len(steps) // stretches, (number + 1) * len(steps) // stretches)
        kept |= {min(stretch, key=lambda i: values[i]), max(stretch, key=lambda i: values[i])}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def spread(places: Sequence[int], most: int, always: Mapping[int, Any]) -> list[int]:
    """At most `most` places, evenly spread, and those that must be there."""
    if len(places) <= most:
        return list(places)
    return sorted({*(places[i * len(places) // most] for i in range(most)), *always})


def _panels(runs: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """Which curves there are, in which group, and what they are called."""
    keys = dict.fromkeys(key.removeprefix("eval/") for run in runs for key in run.series)
    twice = {key for key, plain in PLAIN_NAMES.items() if plain in keys}
    left = [key for key in keys if key not in twice]
    for group, patterns in _GROUPS:
        for pattern in patterns:
            stem = pattern.removesuffix("*")
            fits = [key for key in left if key == pattern or (stem != pattern and key.startswith(stem))]
            for key in fits:
                left.remove(key)
                yield {"group": group, "key": key, "title": _title(key), "share": key in _SHARES}


def _title(key: str) -> str:
    known = TITLES.get(key) or _MORE_TITLES.get(key)
    return known or (f"reward: {key.removeprefix('reward/')}" if key.startswith("reward/") else key)


def _images(digests: Mapping[str, int], folders: Sequence[Path]) -> tuple[list[str], int]:
    """Pictures by their number as data URIs, empty where there is none; and how many had no room."""
    found, size, left_out = [], 0, 0
    for digest in digests:
        file = _picture(digest, folders)
        data = b"" if file is None else file.read_bytes()
        if size + len(data) > MOST_BYTES:
            data, left_out = b"", left_out + 1
        size += len(data)
        kind = "" if file is None else _KINDS[file.suffix]
        found.append(f"data:{kind};base64,{base64.b64encode(data).decode()}" if data else "")
    return found, left_out


def _picture(digest: str, folders: Sequence[Path]) -> Path | None:
    if not digest.isalnum():  # it becomes a file's name
        return None
    names = (folder / f"{digest}{suffix}" for folder in folders for suffix in _KINDS)
    return next((name for name in names if name.is_file()), None)


def _series(series: Series) -> list[list[float | None]]:
    steps, values = thin(series)
    return [[*steps], [_short(value) for value in values]]


def _block(block: Mapping[str, Any]) -> list[Any]:
    return [block["after"], block["image"], block.get("keep")]


def _short(value: float | None) -> float | None:
    """Six digits are more than a page shows."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}") if isinstance(value, float) and not value.is_integer() else int(value)
