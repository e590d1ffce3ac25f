"""The run on a terminal: a live view where there is one, else single plain lines.

It never stops a run: a closed pipe (`| head`) or a stream that cannot encode a character only ends
or bends what is printed. Left out: keys that `KNOWN` does not name; `metrics.jsonl` has them all.
"""

from __future__ import annotations

import fnmatch
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO, cast

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from reflectvlm.html import pieces, tag_color
from reflectvlm.train.evaluate import PLAIN_NAMES
from reflectvlm.train.printing import SafeStream, Writable
from reflectvlm.train.reflections import for_display
from reflectvlm.train.table import Table
from reflectvlm.types import ScoredGroup


class Known(NamedTuple):
    """A key (or pattern) the console shows, its label (`*` stands for the pattern's part) and how."""

    key: str
    label: str
    format: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}s"


_SHARES = ("accuracy", "f1", "overall", "score_strict", "chair_i", "circular", "vanilla", "unscored")
"""Headlines of benchmarks that are shares; others may be points, as MME's total and MMHal's rating are."""


KNOWN: tuple[Known, ...] = (
    Known("loss", "loss", _plain),
    Known("reward", "reward", _plain),
    Known("reward/*", "reward/*", _plain),
    Known("unscored", "unscored", _percent),
    Known("accuracy", "accuracy", _percent),
    Known("eval/accuracy", "eval accuracy", _percent),
    *(Known(f"official/{name}", f"official {name}", _percent) for name in _SHARES),
    Known("official/*", "official *", _plain),
    *(Known(f"strict/{name}", f"strict {name}", _percent) for name in _SHARES),
    Known("strict/*", "strict *", _plain),
    Known("missing", "rows not asked", _plain),
    Known("back_rate", "looks back", _percent),
    Known("layout_rate", "valid layout", _percent),
    Known("blocks/count", "looks per answer", _count),
    Known("blocks/tokens_each", "tokens per look", _count),
    Known("blocks/empty", "empty looks", _percent),
    Known("length/mean", "answer tokens", _count),
    Known("kl", "KL", _plain),
    Known("entropy", "entropy", _plain),
    Known("grad_norm", "grad norm", _plain),
    Known("lr", "learning rate", _plain),
    Known("time/tokens_per_second", "tokens/s", _count),
    Known("time/step", "step time", _seconds),
)
"""What is shown, in this order."""

_TREND = 12  # values in a trend: the newest ones
_TRENDS = ("reward", "accuracy", "loss", "back_rate")
_BARS = "▁▂▃▄▅▆▇█"
_TAG_STYLES = ("magenta", "cyan", "yellow", "green", "blue", "red")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Console:
    """A `Tracker` for people. Call `close` in a `finally`: it gives the terminal its cursor back."""

    stage: str
    total_steps: int
    labels: Mapping[str, str] | None = None
    """Key -> what to call it, over the labels of `KNOWN`."""
    every: int = 10
    """Steps between two lines when there is no terminal; the first and last step always print."""
    file: Writable | None = None
    """By default standard output, looked up when the run starts."""
    width: int | None = None
    clock: Callable[[], float] = time.monotonic
    _rich: RichConsole | None = field(default=None, init=False, repr=False)
    _live: Live | None = field(default=None, init=False, repr=False)
    _values: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _history: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)
    _sample: Text | None = field(default=None, init=False, repr=False)
    _first: tuple[int, float] | None = field(default=None, init=False, repr=False)
    _printed: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"Console.every is {self.every}. It must be at least 1.")

    def start(self, card: Mapping[str, Any]) -> None:  # noqa: ARG002  the run folder keeps the card
        out = self._out()
        if _can_redraw(out) and self._live is None:
            # No refresh thread: the view changes when metrics arrive, and a broken pipe is met here.
            self._live = Live(console=out, auto_refresh=False, transient=False)
            self._live.start()

    def metrics(self, step: int, values: Mapping[str, float | int]) -> None:
        if self._first is None:
            self._first = (step, self.clock())
        told = for_display(values)
        shown = {key: float(value) for key, value in told.items() if _known(key) is not None}
        if shown.get("unscored") == 0:  # a line tells of it only where there is something to tell
            del shown["unscored"]
            self._values.pop("unscored", None)
        self._values.update(shown)
        for key in _TRENDS:
            if key in shown and math.isfinite(shown[key]):
                self._history.setdefault(key, deque(maxlen=_TREND)).append(shown[key])
        if self._live is not None:
            self._live.update(self._view(step), refresh=True)
        elif shown and self._due(step, shown):
            self._printed = step
            self._out().print(Text(self._line(step, shown)), soft_wrap=True)

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        rollout = next((one for group in groups for one in group.rollouts), None)
        if rollout is not None:
            self._sample = colored(rollout.text)
            if self._live is not None:
                self._live.update(self._view(step), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, title: str, before: Mapping[str, float | int], after: Mapping[str, float | int]) -> Table:
        """Print what changed, and return it."""
        comparison = compare(title, before, after, self.labels or {})
        comparison.show(self._out())
        return comparison

    def say(self, line: str) -> None:
        """One plain line, under the live view."""
        self._out().print(Text(_CONTROL.sub("", line)), soft_wrap=True)

    def _out(self) -> RichConsole:
        if self._rich is None:
            file = self.file if self.file is not None else sys.stdout
            stream = cast(TextIO, SafeStream(file))
            self._rich = RichConsole(file=stream, width=self.width, highlight=False, force_jupyter=False)
        return self._rich

    def _due(self, step: int, shown: Mapping[str, float]) -> bool:
        if self._printed is None or any(key.startswith("eval/") for key in shown):
            return True
        return step - self._printed >= self.every or (step >= self.total_steps and step != self._printed)

    def _rows(self, values: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
        """Key, label, value, in the order of `KNOWN`."""
        for key in in_order(values):
            yield key, label_of(key, self.labels or {}), format_value(key, values[key])

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        """What was measured at this step, and nothing older."""
        parts = [f"{self.stage} {step}/{self.total_steps}"]
        parts += [f"{label.removeprefix('· ')} {value}" for _, label, value in self._rows(values)]
        if eta := self._eta(step):
            parts.append(f"ETA {eta}")
        return " | ".join(_CONTROL.sub("", part) for part in parts)

    def _eta(self, step: int) -> str:
        if step >= self.total_steps or self._first is None:
            return ""
        first, began = self._first
        pace = (self.clock() - began) / (step - first) if step > first else self._values.get("time/step")
        return "" if pace is None or not math.isfinite(pace) else duration(pace * (self.total_steps - step))

    def _view(self, step: int) -> RenderableType:
        done = min(1.0, step / self.total_steps) if self.total_steps > 0 else 1.0
        eta = self._eta(step)
        title = Text.assemble(
            (self.stage, "bold"), f"  step {step}/{self.total_steps}", f"  {100 * done:.0f}%"
        )
        parts: list[RenderableType] = [_bar(done), self._grid()]
        if self._sample is not None:
            sample = self._sample.copy()
            # A long answer must not push the numbers off the screen.
            sample.truncate(max(40, 5 * (self._out().width - 6)), overflow="ellipsis")
            parts.append(Panel(sample, title="last sample", title_align="left", box=box.ROUNDED, style="dim"))
        return Panel(
            Group(*parts),
            title=title,
            title_align="left",
            subtitle=f"ETA {eta}" if eta else None,
            subtitle_align="right",
            box=box.ROUNDED,
        )

    def _grid(self) -> RichTable:
        """Label, value, trend; in two columns side by side where there is room."""
        rows = list(self._rows(self._values))
        columns = 2 if self._out().width >= 80 else 1
        trends = self._out().width >= 36
        grid = RichTable.grid(padding=(0, 1), expand=True)
        for _ in range(columns):
            grid.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
            grid.add_column(justify="right", no_wrap=True, min_width=8, style="bold")
            if trends:
                grid.add_column(no_wrap=True, width=_TREND, style="cyan")
        height = math.ceil(len(rows) / columns)
        for index in range(height):
            cells: list[Text] = []
            for key, label, value in rows[index::height]:
                cells += [Text(label), Text(value)]
                if trends:
                    cells.append(Text(sparkline(self._history.get(key, ()))))
            grid.add_row(*cells)
        return grid


def compare(
    title: str, before: Mapping[str, float | int], after: Mapping[str, float | int], labels: Mapping[str, str]
) -> Table:
    """Every key of either side that is for display: known ones first and in order, with the change where
    both exist."""
    told = {**for_display(before), **for_display(after)}
    keys = in_order(told)
    keys += [key for key in told if key not in keys]
    table = Table(title, ("metric", "before", "after", "change"))
    for key in keys:
        old, new = before.get(key, math.nan), after.get(key, math.nan)
        values = format_value(key, old), format_value(key, new), _change(key, old, new)
        table.add(label_of(key, labels), *values)
    return table


def results(
    values: Mapping[str, float | int], beside: Mapping[str, float | int] | None = None
) -> dict[str, float | int]:
    """What the table at a run's end is about: held-out rates and lengths. Of two names for one value, here
    and in the column `beside`, the plainer; the reward as a sum only where there is no accuracy; what is
    unscored only where it is some."""
    twice = {
        key
        for key, plain in PLAIN_NAMES.items()
        if plain in values
        and all(key not in one or one[key] == one.get(plain) for one in (values, beside or {}))
    }
    left_out = twice | ({"reward"} if "accuracy" in values else set())
    return {
        key: values[key]
        for key in in_order(values)
        if key not in left_out and (key, values[key]) != ("unscored", 0)
    }


def in_order(values: Mapping[str, float | int]) -> list[str]:
    """The keys that the console knows, in the order of `KNOWN`."""
    return [key for known in KNOWN for key in values if _known(key) is known]


def label_of(key: str, labels: Mapping[str, str]) -> str:
    if key in labels:
        return labels[key]
    known = _known(key)
    if known is None:
        return key
    return known.label.replace("*", key.removeprefix(known.key.removesuffix("*")))


def format_value(key: str, value: float) -> str:
    known = _known(key)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    return (known.format if known is not None else _plain)(value)


def duration(seconds: float) -> str:
    """`duration(3725) == "1:02:05"`"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def sparkline(values: Sequence[float]) -> str:
    """One block per value between the smallest and the largest: `sparkline([0, 1]) == "▁█"`."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = high - low
    return "".join(_BARS[round(7 * (value - low) / span) if span else 3] for value in values)


def colored(text: str) -> Text:
    """A sampled text with its tags in colour. Control characters go: a model must not be able to
    clear the screen."""
    out = Text()
    for piece in pieces(_CONTROL.sub("", text)):
        style = "" if piece.tag is None else f"bold {_TAG_STYLES[tag_color(piece.tag, len(_TAG_STYLES))]}"
        out.append(piece.text, style)
    return out


def _bar(done: float) -> RichTable:
    line = RichTable.grid(expand=True)  # a bar alone ends without a line break and swallows what follows
    line.add_row(
        ProgressBar(
            total=1.0, completed=done, style="bright_black", complete_style="cyan", finished_style="green"
        )
    )
    return line


def _known(key: str) -> Known | None:
    return next((known for known in KNOWN if fnmatch.fnmatchcase(key, known.key)), None)


def _change(key: str, old: float, new: float) -> str:
    delta = new - old
    if not math.isfinite(delta):
        return "–"
    shown = format_value(key, delta)
    shown = shown.replace("%", " pp")  # a difference of rates is in percentage points
    return shown if shown.startswith("-") else f"+{shown}"


def _can_redraw(out: RichConsole) -> bool:
    return out.is_terminal and not out.is_dumb_terminal and out.file.isatty()
