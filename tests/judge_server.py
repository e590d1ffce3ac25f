"""A chat server on this machine that answers by a script, a judge that asks it, and answers to be judged."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from reflectvlm.rewards import HttpJudge, Verdict
from reflectvlm.types import Prompt, Rollout, Sample

KEY = "sk-very-secret-0123456789"


def says(content: Any, **choice: Any) -> bytes:
    """A chat completion with this content."""
    message = {"role": "assistant", "content": content, **choice.pop("message", {})}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop", **choice}]}).encode()


GOOD = says('{"score": 1, "why": "the same number"}')


@dataclass
class Server:
    """Answers the requests with `script`, one entry each, the last one for all that follow."""

    script: list[Any]
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            place = min(len(self.requests), len(self.script) - 1)
            body = handler.rfile.read(int(handler.headers["Content-Length"]))
            seen = {
                "path": handler.path,
                "key": handler.headers.get("Authorization"),
                "body": json.loads(body),
            }
            self.requests.append(seen)
            self.times.append(time.monotonic())
        try:
            self.script[place](handler)
        except OSError:
            pass  # the client has gone, as it should
        finally:
            with self.lock:
                self.at_once -= 1


def reply(status: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Promises more than it sends, and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(GOOD)))
    handler.end_headers()
    handler.wfile.write(GOOD[:20])
    handler.wfile.flush()
    handler.connection.close()


def drips(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then: no single read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def sleeps(seconds: float, then: bytes = GOOD) -> Callable[[BaseHTTPRequestHandler], None]:
    def send(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        reply(200, then)(handler)

    return send


def echoes_the_key(handler: BaseHTTPRequestHandler) -> None:
    reply(400, f"bad header {handler.headers.get('Authorization')}".encode())(handler)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Real servers, on this machine's own address."""
    running: list[ThreadingHTTPServer] = []

    def start(*script: Any) -> Server:
        server = Server(list(script))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, *args: Any) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(http)
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def judge(server: Server, **options: Any) -> HttpJudge:
    return HttpJudge(url=server.url, model="m", **{"backoff": 0.01, "timeout": 5.0, **options})


def ask(judge: HttpJudge, answer: str = "five", images: Any = ()) -> Verdict:
    return judge("2 + 3?", "5", answer, images)


def rollouts(*texts: str, name: str = "row", images: Any = ()) -> tuple[Rollout, ...]:
    prompt = Prompt(sample=Sample(id=name, question="2 + 3?", answer="5", images=images), spans=())
    return tuple(Rollout(prompt=prompt, spans=(), text=text, stop="eos") for text in texts)
