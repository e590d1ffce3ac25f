"""The page's server: on 127.0.0.1 alone, and only for the page that it wrote itself.

Another page that is open in the same browser can reach any local port. So every address begins with a
random token; `Host` must be this server's own, or a name that was pointed at 127.0.0.1 could speak for it
(DNS rebinding); what changes anything must come as JSON from this origin; and nothing may be framed or read
by others. Of a request's path nothing is ever logged, because it holds the token.

Left out: TLS and users. Whoever reads the address may decide.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from reflectvlm.curate.review.decisions import NotSaved
from reflectvlm.curate.review.desk import Desk, Refused
from reflectvlm.curate.review.page import page, policy
from reflectvlm.data.fetch import BadImage
from reflectvlm.data.rows import BadRow

HOST = "127.0.0.1"
LARGEST = 8 * 2**20
"""Bytes of a request."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_ENDED = "The review has ended. Start it again; all decisions so far are saved."
_CLOSED = "default-src 'none'; frame-ancestors 'none'; sandbox"


class ReviewServer(ThreadingHTTPServer):
    """Serves a desk until somebody finishes. `address` is what people open."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, desk: Desk, port: int = 0) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"port {port} cannot be used: {error.strerror}. Name another one, or leave it out."
            ) from error
        self.desk = desk
        self.token = secrets.token_urlsafe(24)
        self.finished = threading.Event()
        self.ended = False

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def hosts(self) -> tuple[str, str]:
        return f"{HOST}:{self.port}", f"localhost:{self.port}"

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}/{self.token}/"

    def shutdown(self) -> None:
        """Browsers keep connections open: what still comes along one is refused, not written."""
        self.ended = True
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news; what is wrong in here is told to the page (`_answer`)."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "reflectvlm", ""
    timeout = 60
    server: ReviewServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a request's path holds the token."""

    def _answer(self, work: Callable[[str], None]) -> None:
        try:
            work(self._allowed())
        except Refused as refused:
            self._json({"error": str(refused), **refused.more}, refused.status)
        except (BadRow, BadImage) as bad:
            self._json({"error": str(bad)}, 422)
        except NotSaved as error:
            self._json({"error": f"Not saved: {error}"}, 507)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except ValueError as error:  # the file of rows has changed, or the set cannot be written there
            self._json({"error": str(error)}, 409)
        except Exception as error:  # noqa: BLE001 - boundary: one request must not end the review
            self._json({"error": f"{type(error).__name__}: {error}"}, 500)

    def _allowed(self) -> str:
        """The path behind the token. Raises Refused for whoever is not our own page."""
        if self.server.ended:
            raise self._stranger(503, _ENDED)
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            raise self._stranger(421, "This server answers to its own name only.")
        site = self.headers.get("Sec-Fetch-Site", "same-origin")
        if site not in ("same-origin", "none"):
            raise self._stranger(403, "This is for the review's own page.")
        token, _, path = urlsplit(self.path).path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise self._stranger(404, "There is nothing here. Open the address that the review printed.")
        return path

    def _stranger(self, status: int, text: str) -> Refused:
        self.close_connection = True  # what it may have sent is not read
        return Refused(status, text)

    def _get(self, path: str) -> None:
        desk, parts = self.server.desk, path.split("/")
        if path == "":
            self._send(page(desk.rows.name).encode(), "text/html; charset=utf-8", csp=policy())
        elif path == "state":
            self._json(desk.state())
        elif parts[0] == "row" and len(parts) == 2:
            self._json(desk.row(_number(parts[1])))
        elif parts[0] == "image" and len(parts) == 3:
            kind, data = desk.image(_number(parts[1]), _number(parts[2]))
            self._send(data, kind, keep="private, max-age=3600")
        else:
            raise Refused(404, "There is nothing here.")

    def _post(self, path: str) -> None:
        said = self._said()
        desk = self.server.desk
        work: dict[str, Callable[[], Any]] = {
            "check": lambda: desk.check(said["place"], said["texts"], said.get("draft") is True),
            "decide": lambda: desk.decide(
                said["place"], said["do"], said["of"], said.get("texts"), said.get("anyway") is True
            ),
            "undo": lambda: desk.undo(said["standing"]),
            "draft": lambda: desk.draft(said["place"], said["texts"]),
            "search": lambda: {"found": desk.search(str(said["text"]))},
            "finish": lambda: self._finish(said.get("stop") is True),
        }
        if path not in work:
            raise Refused(404, "There is nothing here.")
        try:
            found = work[path]()
        except KeyError as error:
            raise Refused(400, f"{path} needs {error}.") from None
        self._json(found)
        if path == "finish" and said.get("stop") is True:
            self.server.finished.set()

    def _finish(self, stop: bool) -> Mapping[str, Any]:
        written = self.server.desk.finish()
        return {**asdict(written), "told": str(written), "stopped": stop}

    def _said(self) -> dict[str, Any]:
        """The body: JSON from our own page."""
        if self.headers.get_all("Origin", []) not in [[f"http://{host}"] for host in self.server.hosts]:
            raise self._stranger(403, "This is for the review's own page.")
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise self._stranger(415, "Only JSON is read.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise self._stranger(411, "Say how long it is.")
        if int(length[:12]) > LARGEST:
            raise self._stranger(413, f"More than {LARGEST:,} bytes are not read.")
        data = self.rfile.read(int(length))
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            raise Refused(400, "That is no JSON.") from None
        if not isinstance(found, dict):
            raise Refused(400, "That is no JSON object.")
        return found

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(
        self, data: bytes, kind: str, status: int = 200, csp: str = _CLOSED, keep: str = "no-store"
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Cache-Control": keep,
            "Content-Security-Policy": csp,
            **_HEADERS,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise Refused(404, "There is nothing here.")
    return int(text)
