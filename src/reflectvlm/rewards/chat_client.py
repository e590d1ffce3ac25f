"""The connection to a model behind an OpenAI-compatible server (`POST /chat/completions`).

Every question ends within its time-outs with what is read in the reply or with a reason why there is
nothing. Asked again, after a growing pause or as long as the server's `Retry-After` says: no connection, a
time-out, a cut body, 408, 409, 425, 429, 5xx, and a reply without what is wanted. Not asked again: a refusal
and other 4xx.

The API key is read from the environment when it is needed; only the variable's name is ever kept, and the
key itself is struck out of everything a server sends back, before it is read. Redirects are not followed:
they would take the key elsewhere. Pauses and requests end soon when nobody waits for the reply any more
(`lanes.still_wanted`). Left out: streaming, batches, tools.
"""

from __future__ import annotations

import asyncio
import email.utils
import html
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from reflectvlm.rewards.chat_pace import Pace
from reflectvlm.rewards.chat_reply import BadReply, NoCompletion
from reflectvlm.rewards.lanes import SLICE_SECONDS, pause, still_wanted
from reflectvlm.rewards.worker import awaited

Found = TypeVar("Found")

_ASK_AGAIN = frozenset({408, 409, 425, 429})
_BUSY = frozenset({429, 503})
"""The server has too much to do: with a pace, others wait as well."""
_MAX_BODY_BYTES = 1 << 20


class Asked(NamedTuple, Generic[Found]):
    """How a question ended."""

    found: Found | None
    why: str = ""
    """Why nothing was found."""
    kind: str = ""
    """The same in one word, for counts: refused, empty, garbled or unread (`chat_reply`), http 3xx to 5xx,
    timeout, no connection, too large."""
    its_word: bool = True
    """The model itself said this, and not a broken server: it may be remembered, so that a second run is
    identical."""
    attempts: int = 1

    @property
    def told(self) -> str:
        """`why` for people."""
        return f"{self.why} ({self.attempts} attempts)" if self.attempts > 1 else self.why


class _Failed(Exception):
    """An attempt without a reply; `wait` is what the server asked for, None if it asked for nothing."""

    def __init__(
        self,
        reason: str,
        kind: str,
        *,
        again: bool,
        wait: float | None = None,
        busy: bool = False,
        its_word: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.again, self.wait = reason, kind, again, wait
        self.busy, self.its_word = busy, its_word


@dataclass(frozen=True, kw_only=True)
class ChatClient:
    """Example: `ChatClient(url="http://localhost:8000/v1").ask(body, "a key", read_chat).found`"""

    url: str
    """Up to and including `/v1`."""
    key_env: str | None = None
    """Name of the environment variable that holds the API key; None: the server wants none."""
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
    owner: str = "ChatClient"
    """Whose settings these are, in errors."""
    who: str = "the judge"
    """Whose reply it is, in reasons."""
    pace: Pace | None = None
    """None: as fast as the server answers."""
    _free: threading.BoundedSemaphore = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_url(self.url, self.owner)
        _check_key(self.key_env, self.owner)
        for name in ("connect_timeout", "timeout", "backoff", "max_backoff", "concurrency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.owner}.{name} is {getattr(self, name)}. It must be above 0.")
        if self.retries < 0:
            raise ValueError(f"{self.owner}.retries is {self.retries}. It must be 0 or more.")
        object.__setattr__(self, "_free", threading.BoundedSemaphore(self.concurrency))

    def ask(self, body: bytes, key: str, read: Callable[[bytes], Found], tokens: float = 0.0) -> Asked[Found]:
        """What `read` finds in the reply to `body`, or why there is nothing. `read` raises `BadReply`; `key`
        decides the random part of pauses; `tokens` is about how many it will take, for the pace, which the
        caller tells what a reply took (`Pace.end`)."""
        with self._place():
            return self._asked(body, key, read, tokens)

    def _asked(self, body: bytes, key: str, read: Callable[[bytes], Found], tokens: float) -> Asked[Found]:
        for attempt in range(self.retries + 1):
            if self.pace is not None:
                self.pace.begin(tokens)
            try:
                return Asked(read(self._post(body)))
            except BadReply as error:
                its_word = not isinstance(error, NoCompletion)
                failed = _Failed(str(error), error.kind, again=error.again, its_word=its_word)
            except _Failed as error:
                failed = error
            if self.pace is not None:
                self.pace.end(tokens, 0.0)
            seconds = self._pause(failed.wait, key, attempt)
            if not failed.again or attempt == self.retries or seconds is None:
                break
            if failed.busy and self.pace is not None:
                self.pace.hold(seconds)
            pause(seconds)
        return Asked(None, self._struck(failed.reason), failed.kind, failed.its_word, attempt + 1)

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
                found = self._struck((await _read(response, self.who)).decode("latin-1")).encode("latin-1")
                return _checked(response.status_code, response.headers, found)
        except (TimeoutError, httpx.TimeoutException):
            why = f"no reply of {self.who} within {self.timeout:g} s"
            raise _Failed(why, "timeout", again=True) from None
        except httpx.HTTPError as error:
            why = f"no reply of {self.who}: {type(error).__name__}: {error}"
            raise _Failed(why, "no connection", again=True) from None

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


def client_of(owner: Any, **more: Any) -> ChatClient:
    """The connection that a dataclass's own fields describe."""
    own = {one.name for one in fields(owner)}
    shared = {one.name for one in fields(ChatClient) if one.init} & own
    settings = {name: getattr(owner, name) for name in shared}
    return ChatClient(**settings, owner=type(owner).__name__, **more)


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


async def _read(response: Any, who: str) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            raise _Failed(f"{who}'s reply is larger than 1 MiB", "too large", again=False)
    return bytes(body)


def _checked(status: int, headers: Any, body: bytes) -> bytes:
    if status == 200:
        return body
    said = " ".join(body[:300].decode(errors="replace").split())[:160]
    again = status in _ASK_AGAIN or status >= 500
    raise _Failed(
        f"HTTP {status}: {said!r}",
        f"http {status // 100}xx",
        again=again,
        wait=_retry_after(headers.get("retry-after")),
        busy=status in _BUSY,
    )


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


def _check_url(url: str, owner: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{owner}.url is {url!r}. Write 'http://host:port/v1' or 'https://host/v1'.")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"{owner}.url holds a user, a password or a query, which would be logged. "
            "Put the key into an environment variable and name it: key_env='JUDGE_KEY'."
        )


def _check_key(name: str | None, owner: str) -> None:
    if name is None:
        return
    if not name.isidentifier():
        # Not repeated here: somebody has put the key itself where its variable's name belongs.
        raise ValueError(
            f"{owner}.key_env is no name of an environment variable. Export the key and name the "
            "variable: key_env='JUDGE_KEY'."
        )
    if not os.environ.get(name, "").strip():
        raise ValueError(
            f"{owner}.key_env is {name!r}, and that environment variable is not set. Export it, or leave "
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
