"""A small file of rows to review, and a server over it: what the tests of `data review` share."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from reflectvlm.curate.review.decisions import Decisions, Drafts
from reflectvlm.curate.review.desk import Desk
from reflectvlm.curate.review.rows import Fields, ReviewRows
from reflectvlm.curate.review.server import ReviewServer
from reflectvlm.data.fetch import ImageLimits
from reflectvlm.data.sources import pick

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\"'>{{7*7}}"


def trace(answer: str = "3", back: str = "Row two holds three marks.") -> str:
    return (
        f"<think>The rows sum to {answer}.</think>\n<back>{back}</back>\n"
        f"<think>So it is.</think> \\boxed{{{answer}}}"
    )


def row(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "question": f"How many marks, {number}?",
        "answer": "3",
        "images": ["page.png"],
        "trace": trace(),
        **more,
    }


def rows_file(folder: Path, rows: list[Mapping[str, Any]], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), "steelblue").save(folder / "page.png")
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def opened(path: Path, fields: Fields | None = None) -> ReviewRows:
    return ReviewRows.open(pick(path), path.name, fields or Fields(), ImageLimits(urls=False))


def desk(path: Path, **options: Any) -> Desk:
    """As the command makes it, with its files beside the rows."""
    folder = path.parent
    return Desk(
        rows=opened(path),
        decisions=Decisions.open(folder / "rows.decisions.jsonl"),
        drafts=Drafts.open(folder / ".drafts"),
        out=folder / "rows.reviewed.jsonl",
        by="ada",
        **options,
    )


@contextlib.contextmanager
def serving(one: Desk) -> Iterator[ReviewServer]:
    with ReviewServer(one) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def accept(one: Desk, place: int, **more: Any) -> dict[str, Any]:
    return one.decide(place, "accept", one.row(place)["of"], **more)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(
    address: str, method: str, path: str, body: bytes | None = None, **headers: str | None
) -> tuple[int, http.client.HTTPResponse, bytes]:
    """A request as our own page sends it; `headers` (`_` for `-`) change it, None leaves one out."""
    parts = urlsplit(address)
    given: dict[str, str | None] = {"Host": parts.netloc, "Connection": "close"}
    if method == "POST":
        given |= {"Origin": f"http://{parts.netloc}", "Content-Type": "application/json"}
        given["Content-Length"] = str(len(body or b""))
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer, answer.read()
    finally:
        connection.close()


def post(address: str, path: str, **said: Any) -> dict[str, Any]:
    status, _, data = asked(address, "POST", urlsplit(address).path + path, json.dumps(said).encode())
    assert status == 200, data
    found: dict[str, Any] = json.loads(data)
    return found
