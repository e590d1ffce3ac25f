"""Calls that are kept: once each, in their order, counted, estimated, and given up when nobody answers."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.curate.call_counts import Outcome
from reflectvlm.curate.call_progress import Progress
from reflectvlm.curate.calls import Calls, Prices
from reflectvlm.curate.teachers.reasons import nothing
from reflectvlm.curate.types import Request, Said, Teacher
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.rewards import judge_cache


def ask(text: str, purpose: str = "answer", row: str = "1", **options: int) -> Request:
    return Request(row=row, purpose=purpose, text=text, **options)  # type: ignore[arg-type]


@dataclass
class Scripted:
    """Says `said` to a text, else the text in capitals for ten and two tokens and half a second."""

    name: str = "scripted"
    concurrency: int = 1
    batch: int = 1
    said: dict[str, Said] = field(default_factory=dict)
    seconds: float = 0.5
    before: Callable[[str], None] = lambda _: None
    batches: list[list[str]] = field(default_factory=list)

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        self.batches.append([one.text for one in requests])
        for one in requests:
            self.before(one.text)
        return [
            self.said.get(
                one.text, Said(text=one.text.upper(), prompt_tokens=10, tokens=2, seconds=self.seconds)
            )
            for one in requests
        ]

    @property
    def asked(self) -> list[str]:
        return [text for batch in self.batches for text in batch]


def texts(said: Sequence[Said]) -> list[str | None]:
    return [one.text for one in said]


def test_asked_once_and_in_their_order(tmp_path: Path) -> None:
    """Bug: an equal request, or one of an earlier run, is paid for again; replies stand at other rows."""
    teacher = Scripted(concurrency=3)
    calls = Calls(teacher, cache=tmp_path / "new" / "replies.jsonl")
    assert isinstance(calls, Teacher)
    asked = [ask("c"), ask("a", row="2"), ask("b"), ask("a", row="3"), ask("a", number=1)]
    assert texts(calls(asked)) == ["C", "A", "B", "A", "A"]
    assert sorted(teacher.asked) == ["a", "a", "b", "c"]
    again = Scripted()
    second = Calls(again, cache=tmp_path / "new" / "replies.jsonl")
    assert texts(second([*reversed(asked), ask("d")])) == ["A", "A", "B", "A", "C", "D"]
    assert again.asked == ["d"]
    assert Calls(again).__call__([]) == []
    other = Scripted(name="other")
    Calls(other, cache=tmp_path / "new" / "replies.jsonl")([ask("a")])
    assert other.asked == ["a"]  # another teacher says something else


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.sampled_from("abcdefgh"), max_size=20),
    batch=st.integers(1, 5),
    concurrency=st.integers(1, 4),
    known=st.sets(st.sampled_from("abcdefgh")),
)
def test_replies_stand_at_their_rows(rows: list[str], batch: int, concurrency: int, known: set[str]) -> None:
    """Bug: with some size of a batch, or something known before, replies are swapped or left out."""
    teacher = Scripted(batch=batch, concurrency=concurrency)
    calls = Calls(teacher)
    calls([ask(text) for text in sorted(known)])
    teacher.batches.clear()
    assert texts(calls([ask(text) for text in rows])) == [text.upper() for text in rows]
    assert len(teacher.asked) <= len({*rows})
    assert {*rows} - known <= {*teacher.asked} <= {*rows}
    assert calls.counts.total.requests == len({*rows} | known)


def test_a_batch_that_is_partly_known_is_asked_whole(tmp_path: Path) -> None:
    """Bug: after a kill a policy decodes other rows together, and its last bits differ."""
    file = tmp_path / "replies.jsonl"
    asked = [ask(text) for text in "abcdefg"]
    first = Scripted(batch=3)
    whole = Calls(first, cache=file)(asked)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))  # killed when it had written the first of the second batch
    second = Scripted(batch=3)
    assert Calls(second, cache=file)(asked) == whole
    assert first.batches == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert second.batches == [["d", "e", "f"], ["g"]]
    assert sorted(file.read_text().splitlines()) == sorted("".join(lines).splitlines())


def test_threads_do_not_ask_for_the_same_at_the_same_time() -> None:
    """Bug: two stages that run side by side both pay for a question that they share."""
    first_is_in, go_on = threading.Event(), threading.Event()

    def slow(text: str) -> None:
        if text == "a":
            first_is_in.set()
            assert go_on.wait(20)

    teacher = Scripted(before=slow)
    calls = Calls(teacher)
    found: dict[str, list[Said]] = {}
    one = threading.Thread(target=lambda: found.update(one=calls([ask("a"), ask("b")])))
    two = threading.Thread(target=lambda: found.update(two=calls([ask("a"), ask("c")])))
    one.start()
    assert first_is_in.wait(20)
    two.start()
    two.join(0.3)
    go_on.set()
    one.join(20)
    two.join(20)
    assert texts(found["one"]) == ["A", "B"]
    assert texts(found["two"]) == ["A", "C"]
    assert Counter(teacher.asked) == {"a": 1, "b": 1, "c": 1}


def test_only_its_own_word_is_kept(tmp_path: Path) -> None:
    """Bug: a server that was down for a minute has refused these rows for ever; or a refusal is paid for by
    every run."""
    bad = {
        "refused": nothing("refused", "'No.'", tokens=3),
        "cut": nothing("cut", "at 5 tokens", tokens=5),
        "down": nothing("http 5xx", "HTTP 500"),
        "late": nothing("timeout", "within 60 s"),
    }
    file = tmp_path / "replies.jsonl"
    asked = [ask(text) for text in (*bad, "good")]
    said = Calls(Scripted(said=bad), cache=file)(asked)
    again = Scripted()
    second = Calls(again, cache=file)(asked)
    assert again.asked == ["down", "late"]
    assert texts(second) == [None, None, "DOWN", "LATE", "GOOD"]
    assert second[:2] == said[:2]


def test_counts_after(tmp_path: Path) -> None:
    """Bug: a report of a resumed run differs from that of a whole one; a trial counts twice; money is
    reckoned with the wrong price."""
    file = tmp_path / "replies.jsonl"
    bad = {"x": nothing("refused", "'No.'", prompt_tokens=10, tokens=4), "y": nothing("http 4xx", "HTTP 400")}
    asked = [ask("a"), ask("b"), ask("x", "judge"), ask("y", "judge"), ask("a", row="9")]
    prices = Prices(prompt=1e5, reply=1e6)  # a tenth and one a token
    whole = Calls(Scripted(said=bad), cache=tmp_path / "whole.jsonl", prices=prices)
    whole(asked)
    Calls(Scripted(said=bad), cache=file)(asked[:1])
    calls = Calls(Scripted(said=bad), cache=file, prices=prices)
    calls.estimate(asked, trials=1)
    calls(asked)
    calls(asked)
    found = calls.counts
    assert found.errors == whole.counts.errors == {"http 4xx": 1, "refused": 1}
    answer, judge = found.by_purpose["answer"], found.by_purpose["judge"]
    assert (answer.requests, answer.replies, answer.new, answer.prompt_tokens, answer.tokens) == (
        2,
        2,
        1,
        20,
        4,
    )
    assert (judge.requests, judge.replies, judge.new, judge.prompt_tokens, judge.tokens) == (2, 0, 2, 10, 4)
    assert (found.total.new_prompt_tokens, found.total.new_tokens) == (20, 6)
    assert found.money == whole.counts.money == pytest.approx(30 / 10 + 8)
    assert found.new_money == pytest.approx(20 / 10 + 6)
    assert json.loads(json.dumps(found.row()))["by_purpose"]["judge"]["requests"] == 2
    assert found.lines() == [
        "answer: 2 requests, 2 replies, 1 asked now, 20 + 4 tokens",
        "judge: 2 requests, 0 replies, 2 asked now, 10 + 4 tokens",
        "in all: 4 requests, 2 replies, 3 asked now, 30 + 8 tokens",
        "no reply: http 4xx 1, refused 1",
        "money: 11.00, of which now 8.00",
    ]


@dataclass
class Limited(Scripted):
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


def test_estimates_before(tmp_path: Path) -> None:
    """Bug: the cache is not taken off; the trials are paid for twice; time is that of one call after the
    other, or knows nothing of the limits."""
    asked = [ask(f"q{number:03}") for number in range(100)]
    teacher = Limited(concurrency=5)
    calls = Calls(teacher, cache=tmp_path / "r.jsonl", prices=Prices(prompt=2.0, reply=10.0))
    calls(asked[:20])
    found = calls.estimate([*asked, asked[0]], trials=4)
    assert (found.calls, found.cached, found.trials) == (80, 20, 4)
    assert sorted(teacher.asked[20:]) == ["q030", "q050", "q070", "q090"]  # from all over, side by side
    assert (found.prompt_tokens, found.tokens) == (800, 160)
    assert found.seconds == pytest.approx(80 * 0.5 / 5)
    assert found.money == pytest.approx((800 * 2 + 160 * 10) / 1e6)
    assert str(found) == (
        "80 calls to make, 20 in the cache; about 800 + 160 tokens, time 0:00:08, money 0.00 (4 trial calls)"
    )
    calls(asked)
    assert len(teacher.asked) == 100
    done = calls.estimate(asked)
    assert (str(done), done.seconds) == ("0 calls to make, 100 in the cache", 0.0)
    # 80 requests at 10 a minute; 960 tokens at 60 a minute, which is slower.
    for limits, seconds in (((10, None), 480.0), ((10, 60), 960.0)):
        limited = Limited(requests_per_minute=limits[0], tokens_per_minute=limits[1])
        assert Calls(limited).estimate(asked[:80]).seconds == pytest.approx(seconds)


def test_a_batch_is_tried_and_forgotten() -> None:
    """Bug: a trial's replies, said in other company than in the work, depend on where a run was killed."""
    teacher = Scripted(batch=4)
    calls = Calls(teacher)
    asked = [ask(f"q{number}") for number in range(8)]
    found = calls.estimate(asked)
    assert (found.calls, found.trials, found.seconds) == (8, 4, 4.0)
    assert teacher.batches == [["q1", "q3", "q5", "q7"]]
    assert calls.counts.total.requests == 0
    calls(asked)
    assert teacher.batches[1:] == [["q0", "q1", "q2", "q3"], ["q4", "q5", "q6", "q7"]]
    assert Calls(teacher).estimate(asked, trials=0).trials == 0


def test_requests_that_are_turned_down_for_their_own_sake_end_nothing() -> None:
    """Bug: eight answers about each of three images that the server finds too large are 24 failures in a row,
    and no start of the work gets past them; or a server that wants none of our requests is asked 40,000."""
    large = {f"q{number}": nothing("http 4xx", "HTTP 400: 'too long'") for number in range(1, 40)}
    asked = [ask(f"q{number}") for number in range(41)]
    assert texts(Calls(Scripted(said=large), give_up=20)(asked))[-1] == "Q40"
    with pytest.raises(ValueError, match="20 calls in a row did not reach"):
        Calls(Scripted(said=large), give_up=20)(asked[1:])
    barred = {text: nothing("http 4xx", "HTTP 401: 'no'") for text in large}
    with pytest.raises(ValueError, match="20 calls in a row did not reach"):
        Calls(Scripted(said=barred), give_up=20)(asked)


def test_a_resumed_work_with_nothing_left_but_what_is_turned_down_ends(tmp_path: Path) -> None:
    """Bug: the next start asks only what was turned down, takes the server for one that never answered, and
    no start gets past it."""
    large = {f"q{number}": nothing("http 4xx", "HTTP 400: 'too long'") for number in range(1, 40)}
    asked = [ask(f"q{number}") for number in range(40)]
    Calls(Scripted(said=large), cache=tmp_path / "r.jsonl", give_up=20)(asked)
    again = Calls(Scripted(said=large), cache=tmp_path / "r.jsonl", give_up=20)
    assert [said.text for said in again(asked[1:])] == [None] * 39
    refusal = {"q0": nothing("refused", "'No.'")}  # is kept, and is no answer
    Calls(Scripted(said=refusal), cache=tmp_path / "s.jsonl")(asked[:1])
    with pytest.raises(ValueError, match="20 calls in a row did not reach"):
        Calls(Scripted(said=large), cache=tmp_path / "s.jsonl", give_up=20)(asked[1:])


def test_a_trial_is_like_the_work_and_not_like_its_beginning() -> None:
    """Bug: several answers about one image are tried as answers about as many images, and what a policy takes
    to begin, such as its first kernels, is reckoned for each of 10,000 batches: hours in place of minutes."""
    teacher = Scripted(batch=4)
    asked = [ask(f"q{row}", row=str(row), number=number) for row in range(4) for number in range(4)]
    Calls(teacher).estimate(asked)
    assert teacher.batches == [["q2"] * 4]

    def slow_first(_: str) -> None:
        teacher.seconds = 60.0 if len(teacher.batches) == 1 else 0.5

    teacher = Scripted(batch=2, before=slow_first)
    found = Calls(teacher).estimate([ask(f"q{number:02}") for number in range(16)])
    assert (found.calls, found.trials, found.seconds) == (16, 4, 8.0)
    assert teacher.batches == [["q02", "q06"], ["q10", "q14"]]
    # Of three rows the one in the middle is tried, which has fewer requests than a batch.
    uneven = [
        ask(f"q{row}", row=row, number=number)
        for row, n in zip("abc", (15, 2, 15), strict=True)
        for number in range(n)
    ]
    teacher = Scripted(batch=4)
    found = Calls(teacher).estimate(uneven)
    assert (teacher.batches, found.trials, found.seconds) == ([["qb"], ["qb"]], 2, 16.0)


def test_estimates_without_a_reply() -> None:
    """Bug: an estimate of nothing at all, or a division by zero, where no trial was made or worked."""
    asked = [ask("x" * 40), ask("y" * 40)]
    silent = Calls(Scripted()).estimate(asked, trials=0)
    assert (silent.prompt_tokens, silent.tokens, silent.seconds, silent.money) == (20, None, None, None)
    assert str(silent).endswith("about 20 + ? tokens, time unknown (no trial calls)")
    down = {one.text: nothing("http 5xx", "HTTP 500") for one in asked}
    found = Calls(Scripted(said=down)).estimate(asked)
    assert (found.tokens, found.errors) == (None, {"http 5xx": 2})
    assert str(found).endswith("(2 trial calls, 2 without a reply: http 5xx)")


def test_a_teacher_that_nobody_reaches_ends_the_work(tmp_path: Path) -> None:
    """Bug: a server that died at midnight has 40,000 rows without a reply in the morning."""
    down = {f"q{number}": nothing("no connection", "ConnectError") for number in range(5, 60)}
    down["q20"] = nothing("refused", "'No.'")  # it was there
    teacher = Scripted(said=down)
    calls = Calls(teacher, cache=tmp_path / "r.jsonl", give_up=20)
    with pytest.raises(
        ValueError, match=r"20 calls in a row did not reach scripted.*no connection: ConnectError"
    ):
        calls([ask(f"q{number}") for number in range(60)])
    assert len(teacher.asked) == 41  # q21 to q40
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 6
    assert len(Calls(Scripted(said=down), give_up=None)([ask(f"q{number}") for number in range(60)])) == 60


def test_a_reply_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: on a full disk all goes on, and the next run pays for it again."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file of replies .*cannot be written: .*Make room or name another"):
        Calls(Scripted(), cache=tmp_path / "file" / "r.jsonl")
    with pytest.raises(ValueError, match=r"file of replies .* is a folder"):
        Calls(Scripted(), cache=tmp_path)
    teacher, file = Scripted(), tmp_path / "r.jsonl"
    calls = Calls(teacher, cache=file)
    monkeypatch.setattr(judge_cache, "os", FullDisk())
    with pytest.raises(ValueError, match="cannot be written: No space left"):
        calls([ask(text) for text in "abcdef"])
    assert teacher.asked == ["a"]
    monkeypatch.undo()
    assert texts(Calls(teacher, cache=file)([ask("a")])) == ["A"]  # the cut line spoils nothing
    assert texts(Calls(Scripted(said={"a": nothing("missing", "")}), cache=file)([ask("a")])) == ["A"]


class FullDisk:
    """`os` on a disk with room for nine more bytes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data[:9])


def test_an_error_of_a_teacher_ends_the_work_soon() -> None:
    """Bug: one thread fails, and the others work on through the night before anybody is told."""

    def fails(text: str) -> None:
        time.sleep(0.01)
        if text == "q3":
            raise RuntimeError("out of memory")

    teacher = Scripted(concurrency=3, before=fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        Calls(teacher)([ask(f"q{number}") for number in range(200)])
    assert len(teacher.asked) < 20


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_stop_keeps_what_was_said(tmp_path: Path, concurrency: int) -> None:
    """Bug: the work goes on after a stop, or a reply that has come is not in the file."""
    stop: list[str] = []

    def stop_at(text: str) -> None:
        time.sleep(0.005)
        stop.extend([text] * (text == "q7"))

    teacher = Scripted(concurrency=concurrency, before=stop_at)
    file = tmp_path / "r.jsonl"
    asked = [ask(f"q{number}") for number in range(200)]
    with pytest.raises(Abandoned), abandonable(lambda: bool(stop)):
        Calls(teacher, cache=file)(asked)
    kept = {json.loads(line)["reply"].lower() for line in file.read_text().splitlines()}
    assert 7 <= len(kept) < 200
    if concurrency == 1:
        assert kept == {*teacher.asked}
    again = Scripted()
    assert texts(Calls(again, cache=file)(asked)) == [one.text.upper() for one in asked]
    assert {*again.asked} == {one.text for one in asked} - kept


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    """Bug: a missing picture ends everything, or the teacher is asked without it."""
    teacher = Scripted()
    calls = Calls(teacher)
    lost = Request(row="2", purpose="answer", text="b", images=("none.png",), root=tmp_path)
    said = calls([ask("a"), lost])
    assert texts(said) == ["A", None]
    assert said[1].why.startswith("image: ")
    assert teacher.asked == ["a"]
    assert calls.counts.errors == {"image": 1}


def test_progress_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: hours of silence; or a pace that counts what was known before as fast work; or the last state is
    told twice, or not at all."""
    now = [0.0]
    progress = Progress(total=1000, every=10.0, clock=lambda: now[0])
    said = Said(text="x", prompt_tokens=30, tokens=5)
    with caplog.at_level(logging.INFO, logger="reflectvlm"):
        progress.add([Outcome("a", said, False)] * 400)
        assert caplog.messages == []
        now[0] = 10.0
        progress.add([Outcome("a", said, True)] * 39 + [Outcome("a", nothing("refused", "no"), True)])
        progress.end()
    # 40 asked in 10 s are 4 a second; 560 are left, which is 140 s.
    line = (
        "440 of 1,000 requests (400 known before), 4 a second, 0:02:20 to go, 1,170 + 195 tokens, refused 1"
    )
    assert caplog.messages == [line]
    with caplog.at_level(logging.INFO, logger="reflectvlm"):
        progress.add([Outcome("a", said, True)])
        progress.end()
    assert caplog.messages[1].startswith("441 of 1,000 requests")
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Calls(Scripted(), give_up=0), r"Calls.give_up is 0. It must be at least 1"),
        (lambda: Prices(prompt=-1), r"Prices.prompt is -1"),
        (lambda: Prices(reply=float("nan")), r"Prices.reply is nan"),
    ],
)
def test_wrong_settings(make: Callable[[], object], match: str) -> None:
    """Bug: a wrong price or limit is found out after the calls."""
    with pytest.raises(ValueError, match=match):
        make()
