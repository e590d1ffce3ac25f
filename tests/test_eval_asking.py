"""Asking a language model: a real server that misbehaves, its cache, a record, and what has no reply."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from judge_server import KEY, Server, cut, drips, echoes_the_key, reply, says, serve, sleeps
from reflectvlm.eval.asking import FirstOf, HttpAsk, RecordedAsk, prompt_hash

__all__ = ["serve"]  # the fixture


def http(server: Server, **options: Any) -> HttpAsk:
    return HttpAsk(url=server.url, model="m", **{"backoff": 0.01, "timeout": 5.0, "retries": 2, **options})


def test_what_is_sent_and_read(serve: Callable[..., Server]) -> None:
    """Bug: the server is asked for JSON, or told to grade; the reply's line ends are lost."""
    server = serve(reply(200, says("Fine.\nRating: 4")))
    assert http(server, max_tokens=77)(["Rate ünd rate"]) == ["Fine.\nRating: 4"]
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "Rate ünd rate"}],
        "temperature": 0.0,
        "max_tokens": 77,
    }


RECOVERS = [reply(500), reply(429), cut, reply(200, b"<html>"), reply(200, says("")), reply(200, says(None)),
            reply(200, says("half", finish_reason="length"))]  # fmt: skip


@pytest.mark.parametrize("bad", RECOVERS)
def test_a_server_that_stumbles_is_asked_again(serve: Callable[..., Server], bad: Any) -> None:
    """Bug: one bad moment of the server leaves rows without a score."""
    server = serve(bad, reply(200, says("B")))
    assert http(server)(["?"]) == ["B"]
    assert len(server.requests) == 2


NEVER = [
    (reply(500, b"out of memory"), 3, "HTTP 500: 'out of memory'"),
    (reply(401), 1, "HTTP 401"),
    (reply(200, says(None, message={"refusal": "No."})), 1, "refused: 'No.'"),
    (sleeps(3.0), 3, "within 0.3 s"),
    (drips, 3, "within 0.3 s"),
]


@pytest.mark.parametrize(("bad", "requests", "why"), NEVER)
def test_no_reply_is_none_and_told(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture, bad: Any, requests: int, why: str
) -> None:
    """Bug: an empty text instead of None, which a rule reads as a wrong answer; or nobody says why."""
    server = serve(bad)
    with caplog.at_level(logging.WARNING, logger="reflectvlm"):
        assert http(server, timeout=0.3 if "0.3" in why else 5.0)(["?"]) == [None]
    assert len(server.requests) == requests
    (said,) = [text for text in caplog.messages if "have no reply" in text]
    assert "1 of 1 prompts" in said
    assert why in said


def test_order_and_concurrency(serve: Callable[..., Server]) -> None:
    """Bug: replies in the order in which they come; all prompts at once; equal ones asked twice."""
    # The first requests are answered last.
    server = serve(*[sleeps(0.05 * (5 - number), says(f"reply {number}")) for number in range(5)])
    prompts = [f"p{number}" for number in (0, 1, 2, 3, 4, 2)]
    found = http(server, concurrency=2)(prompts)
    asked = [request["body"]["messages"][0]["content"] for request in server.requests]
    assert found == [f"reply {asked.index(prompt)}" for prompt in prompts]
    assert len(server.requests) == 5
    assert server.most_at_once <= 3  # two, and one that is just ending


def test_a_second_run_asks_nobody(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Bug: a repeated evaluation costs the same again, and gives other figures."""
    cache = str(tmp_path / "deep/judge.jsonl")
    server = serve(reply(200, says("B")), reply(200, says(None, message={"refusal": "No."})), reply(500))
    first = http(server, cache=cache, concurrency=1, retries=0)
    assert first(["one", "two", "three"]) == ["B", None, None]
    server.script[:] = [reply(200, says("later"))]
    again = http(server, cache=cache, retries=0)
    # What the server could not do is asked again; what the model said, also that it will not, is kept.
    assert again(["one", "two", "three"]) == ["B", None, "later"]
    assert len(server.requests) == 4
    assert http(server, cache=cache, temperature=0.5)(["one"]) == ["later"]
    recorded = RecordedAsk(path=cache)
    assert recorded(["three", "one", "two", "four"]) == ["later", "B", None, None]
    line = json.loads(Path(cache).read_text().splitlines()[0])
    assert (line["prompt"], line["reply"], line["model"]) == (prompt_hash("one"), "B", "m")


def test_a_cut_line_of_the_cache_costs_its_reply_only(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Bug: a kill while a reply is written makes the cache unreadable."""
    cache = tmp_path / "judge.jsonl"
    server = serve(reply(200, says("B")))
    http(server, cache=str(cache), concurrency=1)(["one", "two"])
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-20])
    assert http(server, cache=str(cache))(["one", "two"]) == ["B", "B"]
    assert len(server.requests) == 3
    assert http(server, cache=str(cache))(["one", "two"]) == ["B", "B"]
    assert len(server.requests) == 3


def test_the_key_appears_nowhere(
    serve: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Bug: an API key in a log, a representation or a cache that somebody publishes."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(echoes_the_key, reply(200, says(f"your key is {KEY}")))
    cache = tmp_path / "judge.jsonl"
    ask = http(server, key_env="JUDGE_KEY", cache=str(cache), concurrency=1)
    said = ask(["one", "two"])
    assert said == [None, "your key is [key]"]
    assert [request["key"] for request in server.requests] == [f"Bearer {KEY}"] * 2
    assert KEY not in "".join([repr(ask), caplog.text, cache.read_text(), str(said)])


def test_a_record(tmp_path: Path) -> None:
    """Bug: the last of equal lines counts, or a damaged line is passed over in silence."""
    path = tmp_path / "said.jsonl"
    rows = [{"prompt": "one", "reply": "A"}, {"prompt": prompt_hash("two"), "reply": "B"},
            {"prompt": "one", "reply": "C"}, {"prompt": "three", "reply": None}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert RecordedAsk(path=str(path))(["two", "one", "three", "?"]) == ["B", "A", None, None]
    path.write_text('{"prompt": "one", "reply": "A"}\n{"prompt": "two"}\n')
    with pytest.raises(
        ValueError, match=r"said.jsonl:2 is no recorded reply: KeyError.*A line is a JSON object"
    ):
        RecordedAsk(path=str(path))
    with pytest.raises(ValueError, match=r"and there is no such file. Check the path"):
        RecordedAsk(path=str(tmp_path / "other"))


class Scripted:
    def __init__(self, **said: str | None) -> None:
        self.said, self.asked = said, []

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]:
        self.asked.append(list(prompts))
        return [self.said.get(prompt) for prompt in prompts]


def test_one_after_the_other() -> None:
    """Bug: a server is asked what the record knows; or replies get to the wrong prompts."""
    first, second = Scripted(a="1", c=None), Scripted(b="2", d="4")
    both = FirstOf(asks=(first, second, Scripted()))
    assert both(["d", "a", "c", "b"]) == ["4", "1", None, "2"]
    assert second.asked == [["d", "c", "b"]]
    both(["a"])
    assert len(second.asked) == 1
    with pytest.raises(ValueError, match=r"FirstOf.asks is empty. Give at least one"):
        FirstOf(asks=())


def test_what_a_user_wrote_is_checked_at_once() -> None:
    """Bug: a wrong address is noticed when the replies have been made; the message names another class."""
    with pytest.raises(ValueError, match=r"HttpAsk.url is 'localhost'. Write 'http://host:port/v1'"):
        HttpAsk(url="localhost", model="m")
    with pytest.raises(ValueError, match=r"HttpAsk.retries is -1"):
        HttpAsk(url="http://h/v1", model="m", retries=-1)
    with pytest.raises(ValueError, match=r"HttpAsk.key_env is 'NOT_SET_ANYWHERE'"):
        HttpAsk(url="http://h/v1", model="m", key_env="NOT_SET_ANYWHERE")
