"""A chat server on this machine that misbehaves in a way that depends on what it is asked alone: the first
times it is asked a text it stumbles, then it answers, and always the same."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STUMBLES = ("429", "500", "slow", "cut", "wrong", "page", "empty")


def says(content: Any, **choice: Any) -> bytes:
    message = {"role": "assistant", "content": content, **choice.pop("message", {})}
    usage = choice.pop("usage", {"prompt_tokens": 11, "completion_tokens": 5})
    return json.dumps(
        {"choices": [{"message": message, "finish_reason": "stop", **choice}], "usage": usage}
    ).encode()


@dataclass
class Unruly:
    """`stumbles` times at most for each text; `delay` seconds for each request."""

    stumbles: int = 2
    delay: float = 0.0
    reply: Callable[[dict[str, Any]], tuple[int, bytes]] | None = None
    """What it says in the end to what is asked; None: what the first word of the text calls for."""
    kinds: tuple[str, ...] = STUMBLES
    slow: float = 1.2
    """Seconds of a slow stumble, after which it says nothing."""
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    """How often each text was answered to its end."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        raw = handler.rfile.read(length)
        if len(raw) < length:
            return  # the client was killed in the middle of its request
        body = json.loads(raw)
        content = body["messages"][-1]["content"]
        # With images it is long, and the same of several models: then it counts by the whole of it.
        text = content if isinstance(content, str) else f"{handler.path} {json.dumps(body, sort_keys=True)}"
        with self.lock:
            times = self.asked[text]
            self.asked[text] += 1
        time.sleep(self.delay)
        digest = hashlib.sha256(text.encode()).digest()
        if times < digest[0] % (self.stumbles + 1):
            self.stumble(handler, self.kinds[digest[1 + times] % len(self.kinds)])
            return
        send(handler, *(self.last_word(text) if self.reply is None else self.reply(body)))
        with self.lock:
            self.answered[text] += 1

    @staticmethod
    def last_word(text: str) -> tuple[int, bytes]:
        """What it says once it stumbles no longer."""
        kind, _, rest = text.partition(" ")
        match kind:
            case "refuse":
                return 200, says(None, message={"refusal": f"Not {rest}."})
            case "long":
                return 200, says(f"and {rest} and", finish_reason="length")
            case "forbidden":
                return 400, b"no such thing"
            case _:
                return 200, says(f"reply to {text}")

    def stumble(self, handler: BaseHTTPRequestHandler, kind: str) -> None:
        match kind:
            case "429":
                send(handler, 429, b"", **{"Retry-After": "0.02"})
            case "500":
                send(handler, 500, b"out of memory")
            case "slow":
                time.sleep(self.slow)
            case "cut":
                send(handler, 200, says("x" * 100), cut=20)
            case "wrong":
                send(handler, 200, b'{"choices": [{"mess')
            case "page":
                send(handler, 200, b"<html>Bad gateway</html>")
            case _:
                send(handler, 200, says(""))


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, cut: int | None = None, **headers: str
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:cut])
    handler.close_connection = True


@contextmanager
def running(server: Unruly) -> Iterator[Unruly]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(OSError):  # the client has gone, perhaps because it was killed
                server.answer(self)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
