"""A model behind an OpenAI-compatible server as a judge (`POST /chat/completions`).

Every question ends within its time-outs with a verdict or with a reason why there is none. Asked again,
after a growing pause or as long as the server's `Retry-After` says: no connection, a time-out, a cut body,
408, 409, 425, 429, 5xx, and a reply that is no verdict. Not asked again: a refusal and other 4xx.

The API key is read from the environment when it is needed; only the variable's name is ever kept, and the
key itself is struck out of everything a server sends back, before it is read. Redirects are not followed:
they would take the key elsewhere. Pauses and requests end soon when nobody waits for the verdict any more
(`lanes.still_wanted`). Left out: streaming, batches, tools.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import html
import json
import os
import random
import re
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from reflectvlm.rewards.judge_cache import VerdictCache
from reflectvlm.rewards.judge_reply import (
    INSTRUCTION,
    BadReply,
    NoCompletion,
    Refusal,
    messages,
    read_reply,
)
from reflectvlm.rewards.lanes import SLICE_SECONDS, pause, still_wanted
from reflectvlm.rewards.verdict import Verdict, case_of
from reflectvlm.rewards.worker import awaited

if TYPE_CHECKING:
    from PIL.Image import Image

_ASK_AGAIN = frozenset({408, 409, 425, 429})
_MAX_BODY_BYTES = 1 << 20


class _Failed(Exception):
    """An attempt without a verdict; `wait` is what the server asked for, None if it asked for nothing."""

    def __init__(self, reason: str, *, again: bool, wait: float | None = None, said: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait = reason, again, wait
        self.said = said
        """The model itself said this: it is remembered, so that a second run is identical."""


@dataclass(frozen=True, kw_only=True)
class HttpJudge:
    """Example: `HttpJudge(url="http://localhost:8000/v1", model="Qwen2.5-72B-Instruct",
    key_env="JUDGE_KEY", cache="runs/judge.jsonl")("2 + 3?", "5", "five").score`
    """

    url: str
    """Up to and including `/v1`."""
    model: str
    key_env: str | None = None
    """Name of the environment variable that holds the API key; None: the server wants none."""
    instruction: str = INSTRUCTION
    temperature: float = 0.0
    max_tokens: int = 512
    json_mode: bool = True
    """Asks the server for `response_format: json_object`; turn it off for one that does not know it."""
    max_characters: int = 20_000
    """Of a longer answer only the end is judged."""
    connect_timeout: float = 10.0
    timeout: float = 60.0
    """Seconds for one attempt from beginning to end, however slowly the server sends."""
    retries: int = 4
    backoff: float = 1.0
    """Seconds before the second attempt; doubled each time, of which a random part from a half on."""
    max_backoff: float = 60.0
    """Longest pause. A server that asks for a longer one is not asked again."""
    concurrency: int = 8
    """Requests at the same time, whoever asks."""
    seed: int = 0
    """Of the random part of the pauses."""
    cache: str | None = None
    """File that keeps verdicts and refusals; asked for the same again, the judge reads it there."""
    _cache: VerdictCache | None = field(default=None, init=False, repr=False, compare=False)
    _free: threading.BoundedSemaphore = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_url(self.url)
        _check_key(self.key_env)
        positive = ("connect_timeout", "timeout", "backoff", "max_backoff", "concurrency", "max_tokens")
        for name in (*positive, "max_characters"):
            if not getattr(self, name) > 0:
                raise ValueError(f"HttpJudge.{name} is {getattr(self, name)}. It must be above 0.")
        if self.retries < 0:
            raise ValueError(f"HttpJudge.retries is {self.retries}. It must be 0 or more.")
        object.__setattr__(self, "_free", threading.BoundedSemaphore(self.concurrency))
        object.__setattr__(self, "_cache", VerdictCache(self.cache) if self.cache else None)

    def __call__(self, question: str, gold: str, answer: str, images: Sequence[Image] = (), /) -> Verdict:
        body = self._body(question, gold, answer, images)
        key = hashlib.sha256(f"{self.url}\n".encode() + body).hexdigest()
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            return known
        with self._place():
            verdict, said = self._ask(body, key)
        if self._cache is None or not said:
            return verdict
        case = case_of(question, gold, answer, images)
        return self._cache.put(key, verdict, case=case, model=self.model)

    def _body(self, question: str, gold: str, answer: str, images: Sequence[Image]) -> bytes:
        chat = messages(self.instruction, question, gold, answer, images, self.max_characters)
        request: dict[str, Any] = {
            "model": self.model,
            "messages": chat,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.json_mode:
            request["response_format"] = {"type": "json_object"}
        return json.dumps(request, sort_keys=True).encode()

    def _ask(self, body: bytes, key: str) -> tuple[Verdict, bool]:
        """The verdict, and whether it is the model's word (and not that of a broken server)."""
        for attempt in range(self.retries + 1):
            try:
                return read_reply(self._post(body)), True
            except Refusal as error:
                return self._unscored(str(error)), True
            except BadReply as error:
                failed = _Failed(str(error), again=True, said=not isinstance(error, NoCompletion))
            except _Failed as error:
                failed = error
            seconds = self._pause(failed.wait, key, attempt)
            if not failed.again or attempt == self.retries or seconds is None:
                break
            pause(seconds)
        times = f" ({attempt + 1} attempts)" if attempt else ""
        return self._unscored(f"{failed.reason}{times}"), failed.said

    def _pause(self, asked_for: float | None, key: str, attempt: int) -> float | None:
        """Seconds before the next attempt; None if the server wants more than we allow."""
        if asked_for is not None:
            return asked_for if asked_for <= self.max_backoff else None
        chance = random.Random(f"{self.seed} {key} {attempt}").uniform(0.5, 1.0)
        return float(min(self.max_backoff, self.backoff * 2**attempt) * chance)

    def _post(self, body: bytes) -> bytes:
        """The body of a reply with status 200."""
        found: bytes = awaited(_while_wanted(self._posted(body)))
        return found

    async def _posted(self, body: bytes) -> bytes:
        import httpx

        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {_key(self.key_env)}"
        try:
            async with (
                asyncio.timeout(self.timeout),
                httpx.AsyncClient(
                    timeout=httpx.Timeout(self.timeout, connect=self.connect_timeout),
                    verify=_certificates() if self.url.startswith("https") else False,
                ) as client,
                client.stream(
                    "POST", self.url.rstrip("/") + "/chat/completions", content=body, headers=headers
                ) as response,
            ):
                found = self._struck((await _read(response)).decode("latin-1")).encode("latin-1")
                return _checked(response.status_code, response.headers, found)
        except (TimeoutError, httpx.TimeoutException):
            raise _Failed(f"no reply of the judge within {self.timeout:g} s", again=True) from None
        except httpx.HTTPError as error:
            raise _Failed(f"no reply of the judge: {type(error).__name__}: {error}", again=True) from None

    def _unscored(self, reason: str) -> Verdict:
        return Verdict(score=None, why=self._struck(reason))

    def _struck(self, text: str) -> str:
        """Without the key, whose characters may be escaped, as in JSON or in an address."""
        key = _key(self.key_env) if self.key_env is not None else ""
        if not key:
            return text
        return re.sub("".join(map(_as_written, key)), "[key]", text)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the requests that may be under way at the same time."""
        while not self._free.acquire(timeout=SLICE_SECONDS):
            still_wanted()
        try:
            yield
        finally:
            self._free.release()


async def _while_wanted(request: Coroutine[Any, Any, bytes]) -> bytes:
    """What a request gives; it is cut off when nobody waits for it any more."""
    task = asyncio.ensure_future(request)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=SLICE_SECONDS)
            still_wanted()
    finally:
        task.cancel()
    return task.result()


async def _read(response: Any) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            raise _Failed("the judge's reply is larger than 1 MiB", again=False)
    return bytes(body)


def _checked(status: int, headers: Any, body: bytes) -> bytes:
    if status == 200:
        return body
    said = " ".join(body[:300].decode(errors="replace").split())[:160]
    again = status in _ASK_AGAIN or status >= 500
    raise _Failed(f"HTTP {status}: {said!r}", again=again, wait=_retry_after(headers.get("retry-after")))


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or from a date; None if the server said nothing we understand."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


@lru_cache(maxsize=1)
def _certificates() -> Any:
    """Reading them takes longer than many a request."""
    import httpx

    return httpx.create_ssl_context()


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"HttpJudge.url is {url!r}. Write 'http://host:port/v1' or 'https://host/v1'.")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "HttpJudge.url holds a user, a password or a query, which would be logged. "
            "Put the key into an environment variable and name it: key_env='JUDGE_KEY'."
        )


def _check_key(name: str | None) -> None:
    if name is None:
        return
    if not name.isidentifier():
        # Not repeated here: somebody has put the key itself where its variable's name belongs.
        raise ValueError(
            "HttpJudge.key_env is no name of an environment variable. Export the key and name the "
            "variable: key_env='JUDGE_KEY'."
        )
    if not os.environ.get(name, "").strip():
        raise ValueError(
            f"HttpJudge.key_env is {name!r}, and that environment variable is not set. Export it, or leave "
            "key_env out for a server without a key."
        )
    if not _key(name).isascii() or not _key(name).isprintable():
        raise ValueError(
            f"The environment variable {name} holds characters that no key has. Export it again."
        )


def _as_written(character: str) -> str:
    """Pattern of a character of the key: plain, or as JSON (in JSON), a page or an address has it."""
    plain, code = re.escape(character), f"{ord(character):02x}"
    named = re.escape(html.escape(character))
    return rf"(?:\\{{0,3}}{plain}|{named}|(?i:\\{{1,2}}u00{code}|%{code}|&#x{code};|&#{ord(character)};))"


def _key(name: str) -> str:
    return os.environ.get(name, "").strip()
