"""The console: right numbers, few lines, and never the end of a run."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reflectvlm.train.console import (
    Console,
    colored,
    compare,
    duration,
    format_value,
    in_order,
    label_of,
    results,
    sparkline,
)
from reflectvlm.types import Prompt, Rollout, Sample, ScoredGroup


def group(text: str) -> ScoredGroup:
    prompt = Prompt(sample=Sample(id="s", question="", answer=""), spans=())
    rollout = Rollout(prompt=prompt, spans=(), text=text, stop="eos")
    return ScoredGroup(rollouts=(rollout,), rewards=(1.0,), parts={}, scored=(True,))


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich looks at these; a test must not depend on who runs it."""
    for name in (
        "FORCE_COLOR",
        "NO_COLOR",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
        "COLUMNS",
        "LINES",
        "COLORTERM",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_plain_lines_without_a_terminal() -> None:
    """Prevents log files with a line per step or with control codes; the estimate is 2 s a step."""
    out, clock = io.StringIO(), Clock()
    console = Console("RL", 100, every=10, file=out, clock=clock)
    console.start({})
    for step in range(1, 101):
        clock.now = 2.0 * step
        console.metrics(step, {"accuracy": 0.5, "loss": 0.25, "reward/format": 1.0, "secret/key": 7.0})
        console.rollouts(step, [group("x")])
    console.close()
    lines = out.getvalue().splitlines()
    # Steps 1, 11, ..., 91 and the last.
    assert [line.split(" | ")[0] for line in lines] == [f"RL {s}/100" for s in [*range(1, 92, 10), 100]]
    # At step 11 there are 89 steps of 2 s to go: 178 s.
    assert lines[1] == "RL 11/100 | loss 0.25 | reward/format 1 | accuracy 50.0% | ETA 0:02:58"
    assert lines[-1] == "RL 100/100 | loss 0.25 | reward/format 1 | accuracy 50.0%"
    assert "\x1b" not in out.getvalue()


def test_an_evaluation_always_prints_and_unknown_keys_never() -> None:
    """Prevents an evaluation from falling between two lines, and lines without any number."""
    out = io.StringIO()
    console = Console("RL", 100, every=50, file=out)
    console.metrics(1, {"private/x": 1.0})
    assert out.getvalue() == ""
    console.metrics(2, {"loss": 1.0})
    console.metrics(3, {"loss": 1.0})
    console.metrics(3, {"eval/accuracy": 0.75})
    assert len(out.getvalue().splitlines()) == 2
    assert "eval accuracy 75.0%" in out.getvalue()


def test_a_line_tells_of_its_own_step() -> None:
    """Bug: the last step prints twice, and lines between evaluations carry the value of an older one."""
    out = io.StringIO()
    console = Console("RL", 3, every=1, file=out, clock=Clock())
    console.metrics(1, {"reward": 0.5, "loss": 1.0})
    console.metrics(1, {"eval/accuracy": 0.75})
    console.metrics(2, {"reward": 0.25})
    console.metrics(3, {"reward": 1.0, "loss": 2.0})
    console.metrics(3, {"eval/accuracy": 0.5})
    assert [line.split(" | ETA")[0] for line in out.getvalue().splitlines()] == [
        "RL 1/3 | loss 1 | reward 0.5",
        "RL 1/3 | eval accuracy 75.0%",
        "RL 2/3 | reward 0.25",
        "RL 3/3 | loss 2 | reward 1",
        "RL 3/3 | eval accuracy 50.0%",
    ]


def test_unscored_is_shown_where_there_is_any() -> None:
    """Bug: a reward that fails half of the time can only be seen in a file; or `unscored 0` on all lines."""
    out = io.StringIO()
    console = Console("RL", 2, every=1, file=out)
    console.metrics(1, {"reward": 1.0, "reward/short": math.nan, "unscored": 0.5})
    console.metrics(2, {"reward": 1.0, "unscored": 0.0})
    first, second = out.getvalue().splitlines()
    assert "reward/short – | unscored 50.0%" in first
    assert second == "RL 2/2 | reward 1"


def test_the_last_table_says_each_thing_once() -> None:
    """Bug: accuracy twice, under two names, among ten rows; a title that wraps at the table's width."""
    rates = {"accuracy": 0.5, "back_rate": 1.0, "layout_rate": 1.0, "length/mean": 70.0}
    rest = {"reward": 0.5, "reward/accuracy": 0.5, "reward/format": 1.0, "length/max": 80.0, "truncated": 0.1}
    assert results(rates | rest | {"unscored": 0.0}) == rates
    assert results(rates | rest | {"reward/short": 0.2, "unscored": 0.1}).keys() == rates.keys() | {
        "reward/short",
        "unscored",
    }
    # A rubric with another rule than the scorer's, in either column: both are told.
    other = rates | rest | {"reward/accuracy": 0.75}
    assert results(other) == rates | {"reward/accuracy": 0.75}
    assert results(rates | rest, other) == rates | {"reward/accuracy": 0.5}
    # Without an accuracy the reward is what there is.
    assert results({"reward": 0.5, "reward/mine": 0.5}) == {"reward": 0.5, "reward/mine": 0.5}
    out = Terminal()
    title = "lookback_rl-semantic with a long name: held-out rows, greedy"
    Console("RL", 1, file=out, width=50).table(title, rates, rates)
    assert title in out.getvalue().splitlines()[0]


@pytest.mark.parametrize("width", [20, 40, 100])
def test_live_view(width: int) -> None:
    """Prevents a view that breaks on narrow screens, or leaves the cursor hidden at the end."""
    out, clock = Terminal(), Clock()
    console = Console("SFT", 4, {"loss": "my loss"}, file=out, width=width, clock=clock)
    console.start({})
    for step in (1, 2):
        clock.now += 60.0
        console.metrics(step, {"loss": float(step), "reward": 0.5, "time/tokens_per_second": 12345.0})
        console.rollouts(step, [group("<back>look</back> 7 " + "long " * 500)])
    console.close()
    console.close()
    shown = out.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "my loss"[: max(2, width // 6)] in shown
    if width == 100:
        assert "my loss" in shown
        assert "12,345" in shown
        assert "step 2/4  50%" in shown
        assert "ETA 0:02:00" in shown
        assert "▁█" in shown
        assert "<back>" in shown


def test_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents cursor codes on a terminal that cannot move its cursor."""
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    console = Console("RL", 2, file=out)
    console.start({})
    console.metrics(1, {"loss": 1.0})
    console.close()
    assert out.getvalue() == "RL 1/2 | loss 1\n"


def test_a_model_cannot_drive_the_terminal() -> None:
    """Prevents sampled escape codes (clear screen, set title) from being obeyed."""
    text = colored("a\x1b[2J\x9b31m\r\x07\n<back>\tb")
    assert text.plain == "a[2J31m\n<back>\tb"
    assert [text.plain[span.start : span.end] for span in text.spans] == ["<back>"]


class Broken(io.StringIO):
    """A stream that raises at every write."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.tries = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:  # noqa: ARG002
        self.tries += 1
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space"), ValueError("I/O on closed file")]
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_broken_stream_never_stops_a_run(
    error: Exception, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents `| head` from ending a training: rich alone would raise SystemExit here."""
    if not terminal:
        monkeypatch.setenv("TERM", "dumb")
    out = Broken(error)
    console = Console("RL", 3, every=1, file=out)
    console.start({})
    for step in (1, 2, 3):
        console.metrics(step, {"loss": 1.0})
    console.close()
    console.table("t", {"loss": 1.0}, {"loss": 2.0})
    assert out.tries == 1


SCRIPT = """
import sys
from reflectvlm.train.console import Console
console = Console("RL", 3000, every=1)
console.start({})
for step in range(1, 3001):
    console.metrics(step, {"loss": 1.0, "accuracy": 0.5})
console.close()
sys.stderr.write("trained to the end")
"""


@pytest.mark.parametrize("how", ["| head -n 1", ">&-", "> /dev/full"])
def test_real_shells(tmp_path: Path, how: str) -> None:
    """Prevents what a fake stream cannot show: exit code 120 from Python's last flush, stdout = None."""
    if "full" in how and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "run.py").write_text(SCRIPT)
    command = f"set -o pipefail; {sys.executable} {tmp_path}/run.py {how}"
    # Unbuffered output would have nothing left for the last flush.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=variables)
    assert (done.returncode, done.stderr) == (0, "trained to the end")


def test_characters_the_stream_lacks_are_replaced() -> None:
    """Prevents a UnicodeEncodeError in the C locale from a reward's name."""
    raw = io.BytesIO()
    console = Console("RL é", 2, file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.metrics(1, {"reward/réponse": 1.0})
    console.table("t", {"loss": math.nan}, {"loss": 1.0})
    assert b"RL ? 1/2 | reward/r?ponse 1\n" in raw.getvalue()


def test_table() -> None:
    """Prevents a change with the wrong sign or unit, unknown keys lost, and NaN shown as a number."""
    out = io.StringIO()
    console = Console("RL", 1, {"kl": "divergence"}, file=out, width=80)
    before = {"mine|x": 1.0, "accuracy": 0.25, "loss": 2.0}
    comparison = console.table("Held out", before, {"accuracy": 0.75, "loss": 1.5, "kl": math.nan})
    assert comparison.markdown == (
        "### Held out\n\n"
        "| metric     | before | after |   change |\n| ---------- | -----: | ----: | -------: |\n"
        "| loss       |      2 |   1.5 |     -0.5 |\n"
        "| accuracy   |  25.0% | 75.0% | +50.0 pp |\n"
        "| divergence |      – |     – |        – |\n"
        "| mine\\|x    |      1 |     – |        – |\n"
    )
    assert out.getvalue() == comparison.markdown  # no terminal: the file's text
    assert compare("t", {}, {}, {}).rows == []
    drawn = Terminal()
    Console("RL", 1, file=drawn, width=60).table("Held out", before, before)
    assert "+0.0 pp" in drawn.getvalue()
    assert "---" not in drawn.getvalue()


def test_a_benchmark_s_shares_are_per_cent() -> None:
    """Bug: accuracy as 44.2% above an official accuracy of 0.442; or points, 1495.2, as 149,520%."""
    found = {"accuracy": 0.442, "official/accuracy": 0.442, "strict/f1": 0.442, "official/unscored": 0.25}
    found |= {"strict/unscored": 0.25, "official/total": 1495.2, "strict/rating": 2.5}
    shown = {key: format_value(key, value) for key, value in found.items()}
    assert [*shown.values()] == ["44.2%", "44.2%", "44.2%", "25.0%", "25.0%", "1495", "2.5"]
    assert [label_of(key, {}) for key in found][1:3] == ["official accuracy", "strict f1"]
    assert label_of("official/total", {}) == "official total"
    assert sorted(in_order(found)) == sorted(found)


def test_order_and_small_parts() -> None:
    """Prevents the order from following the dictionary, and trends that divide by zero."""
    assert in_order({"lr": 1.0, "reward/b": 1.0, "x": 1.0, "reward": 1.0, "loss": 1.0}) == [
        "loss",
        "reward",
        "reward/b",
        "lr",
    ]
    assert (sparkline([0.0, 1.0]), sparkline([2.0, 2.0]), sparkline([1.0])) == ("▁█", "▄▄", "")
    assert duration(3725.4) == "1:02:05"
    with pytest.raises(ValueError, match="every is 0"):
        Console("RL", 1, every=0)
