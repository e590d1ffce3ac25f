"""What is kept of judges: a cache that survives kills, verdicts on record, and no key anywhere."""

from __future__ import annotations

import fcntl
import html
import json
import logging
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from judge_server import GOOD, KEY, ask, echoes_the_key, judge, reply, rollouts, says, serve
from reflectvlm.protocols import Judge
from reflectvlm.rewards import Accuracy, Judged, RecordedJudge, RewardError, RuleJudge, Verdict
from reflectvlm.rewards.judge_cache import VerdictCache
from reflectvlm.rewards.verdict import case_of

__all__ = ["serve"]  # the fixture


def test_f3_a_second_run_asks_nothing_and_says_the_same(serve: Any, tmp_path: Path) -> None:
    """Bug: an evaluation that is repeated costs the same again and gives another number."""
    cache = str(tmp_path / "deep" / "judge.jsonl")
    server = serve(
        reply(200, says('{"score": 0.5}')),
        reply(200, says(None, message={"refusal": "No."})),
        reply(200, says("nonsense")),
        reply(500),
    )
    first = judge(server, cache=cache, retries=0)
    answers = ["half", "bad", "odd", "later"]
    verdicts = [ask(first, answer) for answer in answers]
    assert [one.score for one in verdicts] == [0.5, None, None, None]
    server.script[:] = [reply(200, GOOD)]
    again = judge(server, cache=cache, retries=0)
    assert [ask(again, answer) for answer in answers[:3]] == verdicts[:3]
    assert len(server.requests) == 4
    # What the server could not do is no verdict of the judge's: it is asked for once more.
    assert ask(again, "later").score == 1.0
    # Another model, another question, another image or another instruction is another request.
    ask(judge(server, cache=cache, temperature=0.5), "half")
    ask(again, "half", (Image.new("RGB", (1, 1)),))
    assert len(server.requests) == 7
    recorded = RecordedJudge(path=cache)
    assert recorded("2 + 3?", "5", "half").score == 0.5
    assert recorded("2 + 3?", "5", "half", (Image.new("RGB", (1, 1)),)).score == 1.0
    assert recorded("2 + 3?", "6", "half").score is None


@pytest.mark.parametrize(
    ("body", "requests"),
    [(b"<html>Bad gateway</html>", 2), (b'{"error": "busy"}', 2), (b'{"choices": []}', 2), (says("no"), 1)],
)
def test_f3_what_is_no_chat_completion_is_not_remembered(
    serve: Any, tmp_path: Path, body: bytes, requests: int
) -> None:
    """Bug: a proxy's page, sent with status 200, is the model's word on an answer for ever."""
    server = serve(reply(200, body), reply(200, GOOD))
    asked = judge(server, cache=str(tmp_path / "judge.jsonl"), retries=0)
    assert ask(asked).score is None
    # A reply of the model that is no verdict is remembered, so that a second run is identical.
    assert ask(asked).score == (1.0 if requests == 2 else None)
    assert len(server.requests) == requests


def test_f3_a_cut_line_costs_its_verdict_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a kill in the middle of a line makes the whole cache unreadable, or joins two lines."""
    path = tmp_path / "judge.jsonl"
    VerdictCache(path).put("a", Verdict(score=1.0, why="é\n\ud800"))
    one = path.read_bytes()
    VerdictCache(path).put("b", Verdict(score=0.0))
    two = path.read_bytes()
    for size in range(len(one), len(two) - 1):  # the whole line without its end of line would be a verdict
        path.write_bytes(two[:size])
        cache = VerdictCache(path)
        assert [found and found.score for found in map(cache.get, "ab")] == [1.0, None]
        cache.put("c", Verdict(score=0.25))
        fresh = VerdictCache(path)
        assert [found and found.score for found in map(fresh.get, "abc")] == [1.0, None, 0.25]
    assert any("cut or damaged" in text for text in caplog.messages)


WRITER = """
import sys
from reflectvlm.rewards.judge_cache import VerdictCache
from reflectvlm.rewards.verdict import Verdict
path, name = sys.argv[1:]
cache = VerdictCache(path)
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    said = cache.put(f"shared {i}", Verdict(score=0.5, why=name * 50))
    cache.put(f"{name} {i}", Verdict(score=1.0, why=name * 5000))
    print(said.why[:1], end="")
"""


def test_f3_two_processes_share_a_cache(tmp_path: Path) -> None:
    """Bug: two jobs on one cache write into each other's lines, or go on with different verdicts."""
    path = tmp_path / "judge.jsonl"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for name in "xy"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    said = [writer.communicate("go\n", timeout=60)[0] for writer in writers]
    assert said[0] == said[1]  # both go on with the verdict that was first
    assert len(said[0]) == 300
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == 900


def test_f3_the_first_verdict_in_the_file_counts(tmp_path: Path) -> None:
    """Bug: two processes look, find nothing, and both write: from then on they disagree."""
    path = tmp_path / "judge.jsonl"
    said: list[Verdict] = []
    writer = threading.Thread(target=lambda: said.append(VerdictCache(path).put("a", Verdict(score=1.0))))
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()  # it waits for the lock
        other.write(b'{"key": "a", "score": 0.0, "why": "first"}\n')
    writer.join(10)
    assert said == [Verdict(score=0.0, why="first")]
    assert path.read_text().count("\n") == 1


def test_f3_a_full_disk_costs_a_rerun_and_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a cache that cannot be written ends the run."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = VerdictCache(blocked / "judge.jsonl")
    with caplog.at_level(logging.WARNING, logger="reflectvlm"):
        assert cache.put("a", Verdict(score=1.0)).score == 1.0
        cache.put("b", Verdict(score=1.0))
    assert len([text for text in caplog.messages if "cannot be written" in text]) == 1
    assert cache.get("b") == Verdict(score=1.0)


def test_rule_and_recorded_judge(tmp_path: Path) -> None:
    """Bug: evaluation and training disagree about what is right."""
    rule = RuleJudge(accuracy=Accuracy(kind="number"))
    assert isinstance(rule, Judge)
    assert rule("?", "5", r"\boxed{5.0}").score == 1.0
    assert rule("?", "5", r"\boxed{6}") == Verdict(score=0.0, why="is not the gold answer")
    slow = RuleJudge(accuracy=Accuracy(kind="math", timeout=0.01))
    assert slow("?", "2", r"\boxed{\int_0^1 \sqrt{x^7 + 3} \, dx}").score is None
    path = tmp_path / "said.jsonl"
    path.write_text(
        '{"question": "?", "gold": "5", "answer": "five", "score": 1, "why": "same"}\n'
        '\n{"question": "?", "gold": "5", "answer": "five", "score": 0}\n'
        '{"question": "?", "gold": "5", "answer": "six", "score": null, "why": "blurred"}\n'
    )
    recorded = RecordedJudge(path=str(path))
    assert isinstance(recorded, Judge)
    assert recorded("?", "5", "five") == Verdict(score=1.0, why="same")
    assert recorded("?", "5", "six") == Verdict(score=None, why="blurred")
    assert "has no verdict" in recorded("?", "5", "seven").why
    reward = Judged(judge=recorded)
    assert isinstance(reward.many([rollouts("five")])[0], RewardError)


def test_cases_differ_by_content_only() -> None:
    """Bug: two images of equal bytes and different size, or texts that join alike, share a verdict."""
    names = [
        case_of("a", "b", "c"),
        case_of("ab", "", "c"),
        case_of("a", "b", "c", (Image.new("RGB", (2, 1)),)),
        case_of("a", "b", "c", (Image.new("RGB", (1, 2)),)),
        case_of("a", "b", "c\ud800"),
    ]
    assert len(set(names)) == 5
    assert case_of("a", "b", "c") == names[0]


def test_f3_the_key_appears_nowhere(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: an API key in a log, a traceback, a run folder or a cache that somebody publishes."""
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")  # as `$(cat file)` in some shells leaves it
    server = serve(echoes_the_key, reply(200, GOOD))
    cache = tmp_path / "judge.jsonl"
    secret = judge(server, key_env="JUDGE_KEY", cache=str(cache))
    caplog.set_level(logging.DEBUG)
    refused = ask(secret, "a")
    assert refused.why == "HTTP 400: 'bad header Bearer [key]'"
    assert ask(secret, "b").score == 1.0
    assert [request["key"] for request in server.requests] == [f"Bearer {KEY}"] * 2
    everything = [
        repr(secret),
        refused.why,
        cache.read_text(),
        caplog.text,
        json.dumps(server.requests[0]["body"]),
    ]
    assert [text for text in everything if "secret-0123" in text] == []


ODD_KEY = 'sk-a/b+c="<d>&e'


@pytest.mark.parametrize(
    "send",
    [
        pytest.param(lambda key: reply(400, b"x" * 145 + b" bad " + key), id="cut at 160"),
        pytest.param(lambda key: reply(400, b" " * 290 + key), id="cut at 300"),
        pytest.param(lambda key: reply(200, b"no " * 50 + key), id="no completion"),
        pytest.param(
            lambda key: reply(200, says(json.dumps({"score": 1, "why": key.decode()}))), id="a verdict's why"
        ),
        pytest.param(
            lambda key: reply(200, says(json.dumps({"score": 1, "why": "w" * 995 + key.decode()}))),
            id="cut at 1000",
        ),
        pytest.param(lambda key: reply(200, says("so " * 50 + key.decode())), id="cut reply"),
        pytest.param(
            lambda key: reply(400, json.dumps({"key": key.decode()}).replace("/", "\\/").encode()),
            id="in JSON",
        ),
        pytest.param(
            lambda key: reply(400, b"?k=" + urllib.parse.quote(key.decode(), safe="").encode()),
            id="in an address",
        ),
        pytest.param(lambda key: reply(400, html.escape(key.decode()).encode()), id="in a page"),
    ],
)
@pytest.mark.parametrize("key", [KEY, ODD_KEY])
def test_f3_no_part_of_the_key_is_kept(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, send: Any
) -> None:
    """Bug: a message is cut in the middle of the key, or holds it escaped, so that it is not found."""
    monkeypatch.setenv("JUDGE_KEY", key)
    cache = tmp_path / "judge.jsonl"
    asked = judge(serve(send(key.encode())), key_env="JUDGE_KEY", cache=str(cache), retries=0)
    kept = ask(asked).why + (cache.read_text() if cache.exists() else "")
    assert key[:4] not in kept
    assert key[-4:] not in kept


def test_f3_a_key_that_has_gone_strikes_nothing_out(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an empty key is found between all letters, and every reason is unreadable."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    asked = judge(serve(reply(401, b"who are you")), key_env="JUDGE_KEY", retries=0)
    monkeypatch.setenv("JUDGE_KEY", "")
    assert "[key]" not in ask(asked).why
