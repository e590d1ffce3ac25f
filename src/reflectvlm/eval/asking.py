"""Language models that help a benchmark's rule (`Ask`): recorded replies, a server, one after the other.

    ask = FirstOf(asks=(RecordedAsk(path="judge.jsonl"), HttpAsk(url=…, model=…, cache="judge.jsonl")))
    task.marks(replies, ask)

A prompt that nobody answers has None, and what hung on it is not scored; never 0. What a server said is kept
in its cache, and the same file serves as the record of a later run, which then asks nobody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from reflectvlm.eval.types import Ask
from reflectvlm.rewards.chat_client import ChatClient, client_of
from reflectvlm.rewards.chat_reply import read_text
from reflectvlm.rewards.judge_cache import VerdictCache
from reflectvlm.rewards.lanes import side_by_side

_log = logging.getLogger("reflectvlm")
_HASH = re.compile(r"[0-9a-f]{64}")


def prompt_hash(prompt: str) -> str:
    """A prompt's name in a record: the same in every run and on every machine."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class RecordedAsk:
    """Replies from a JSON Lines file, to repeat an evaluation without its language model.

    A line is `{"prompt": …, "reply": "…"}` with the prompt's text or its `prompt_hash`; the cache of an
    `HttpAsk` has such lines. Of equal prompts the first line counts. What is not in the file has no reply.

    Example: `RecordedAsk(path="judge.jsonl")(["Which option?"])`
    """

    path: str
    _replies: Mapping[str, str | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_replies", _recorded(Path(self.path)))

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]:
        return [self._replies.get(prompt_hash(prompt)) for prompt in prompts]


@dataclass(frozen=True, kw_only=True)
class HttpAsk:
    """A model behind an OpenAI-compatible server; its time-outs, retries and pauses are `ChatClient`'s.

    Example: `HttpAsk(url="http://localhost:8000/v1", model="Qwen2.5-72B-Instruct", cache="judge.jsonl")`
    """

    url: str
    """Up to and including `/v1`."""
    model: str
    key_env: str | None = None
    """Name of the environment variable that holds the API key; None: the server wants none."""
    temperature: float = 0.0
    max_tokens: int = 1024
    connect_timeout: float = 10.0
    timeout: float = 120.0
    """Seconds for one attempt from beginning to end."""
    retries: int = 4
    backoff: float = 1.0
    max_backoff: float = 60.0
    concurrency: int = 8
    """Requests at the same time."""
    seed: int = 0
    """Of the random part of the pauses."""
    cache: str | None = None
    """File that keeps replies and refusals; asked for the same again, they are read there."""
    _client: ChatClient = field(init=False, repr=False, compare=False)
    _cache: VerdictCache | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_client", client_of(self))
        if not self.max_tokens > 0:
            raise ValueError(f"HttpAsk.max_tokens is {self.max_tokens}. It must be above 0.")
        object.__setattr__(self, "_cache", VerdictCache(self.cache, _read, _line) if self.cache else None)

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]:
        """Every prompt once, however often it occurs."""
        distinct = list(dict.fromkeys(prompts))
        found = side_by_side([partial(self._said, prompt) for prompt in distinct], self.concurrency)
        said = dict(zip(distinct, found, strict=True))
        if silent := [one.why for one in found if one.text is None]:
            _log.warning(
                "%d of %d prompts have no reply of %s: %s", len(silent), len(found), self.url, silent[-1]
            )
        return [said[prompt].text for prompt in prompts]

    def _said(self, prompt: str) -> _Said:
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": self.temperature,
                "max_tokens": self.max_tokens,
            },
            sort_keys=True,
        ).encode()
        key = hashlib.sha256(f"{self.url}\n".encode() + body).hexdigest()
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            assert isinstance(known, _Said)
            return known
        asked = self._client.ask(body, key, read_text)
        said = _Said(asked.found, asked.told)
        if self._cache is None or not asked.its_word:
            return said
        kept = self._cache.put(key, said, prompt=prompt_hash(prompt), model=self.model)
        assert isinstance(kept, _Said)
        return kept


@dataclass(frozen=True, kw_only=True)
class FirstOf:
    """The first reply that one of them gives; each is asked only what those before it did not answer."""

    asks: Sequence[Ask]

    def __post_init__(self) -> None:
        if not self.asks:
            raise ValueError("FirstOf.asks is empty. Give at least one, or no `ask` at all.")

    def __call__(self, prompts: Sequence[str], /) -> list[str | None]:
        found: list[str | None] = [None] * len(prompts)
        for ask in self.asks:
            places = [place for place, reply in enumerate(found) if reply is None]
            said = ask([prompts[place] for place in places]) if places else []
            for place, reply in zip(places, said, strict=True):
                found[place] = reply
        return found


class _Said(NamedTuple):
    text: str | None
    why: str


def _read(row: Mapping[str, Any]) -> _Said:
    text = row["reply"]
    return _Said(None if text is None else str(text), str(row.get("why", "")))


def _line(said: _Said) -> dict[str, Any]:
    return {"reply": said.text, **({"why": said.why} if said.why else {})}


def _recorded(path: Path) -> dict[str, str | None]:
    if not path.is_file():
        raise ValueError(f"RecordedAsk.path is {str(path)!r}, and there is no such file. Check the path.")
    replies: dict[str, str | None] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, said = str(row["prompt"]), _read(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number} is no recorded reply: {error!r}. A line is a JSON object with prompt, a "
                "text or its sha256, and reply, a text or null."
            ) from error
        replies.setdefault(prompt if _HASH.fullmatch(prompt) else prompt_hash(prompt), said.text)
    return replies
