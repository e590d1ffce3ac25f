"""The server of `data review` answers its own page and nobody else."""

from __future__ import annotations

import base64
import json
import re
import socket
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from reflectvlm.curate.review.page import _asset, page, policy
from reflectvlm.curate.review.server import LARGEST, ReviewServer
from reviewing import EVIL, asked, desk, post, row, rows_file, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReviewServer]:
    with serving(desk(rows_file(tmp_path, [row(0), row(1, trace=EVIL, question=EVIL)]))) as one:
        yield one


def drop(server: ReviewServer, **headers: Any) -> int:
    """Status of a decision with other headers; 200 if it was written."""
    body = json.dumps({"place": 0, "do": "drop", "of": server.desk.rows.digests[0]}).encode()
    path = headers.pop("path", f"/{server.token}/decide")
    return asked(server.address, "POST", path, headers.pop("body", body), **headers)[0]


def test_its_own_page_is_served(server: ReviewServer) -> None:
    """Bug: rules so strict that nobody gets in."""
    for host in server.hosts:
        assert drop(server, Host=host, Origin=f"http://{host}") == 200
    assert drop(server, Sec_Fetch_Site="same-origin", Content_Type="application/json; charset=utf-8") == 200
    status, _, data = asked(server.address, "GET", f"/{server.token}/", Sec_Fetch_Site="none")
    assert status == 200
    assert b"<!doctype html>" in data


def test_only_this_machine_can_ask(server: ReviewServer) -> None:
    """Bug: a server on all interfaces, open to the office."""
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 32
    with ReviewServer(server.desk) as other:
        assert other.token != server.token


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:80"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": None}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": str(LARGEST + 1)}, 413),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
    ids=str,
)
def test_other_pages_cannot_write(server: ReviewServer, headers: dict[str, Any], status: int) -> None:
    """Bug: any page open in the same browser, or a name pointed at 127.0.0.1, drops rows."""
    assert drop(server, **headers) == status
    assert server.desk.state()["standing"] == 0


def test_two_hosts_or_origins_are_none(server: ReviewServer) -> None:
    """Bug: the first of two `Host` headers is checked and the second believed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        host = f"Host: {server.hosts[0]}\r\n"
        raw.sendall(f"GET /{server.token}/state HTTP/1.1\r\n{host}Host: evil.example\r\n\r\n".encode())
        assert b" 421 " in raw.recv(4096).split(b"\r\n")[0]


def test_without_the_token_nothing_is_there(server: ReviewServer) -> None:
    """Bug: a page that guesses the port reads the rows."""
    wrong = server.token[:-1] + ("a" if server.token[-1] != "a" else "b")
    for path in ("/", "/state", f"/{wrong}/state", f"/{server.token}x/", "/%2e%2e/", "/%00/"):
        answer = asked(server.address, "GET", path)
        assert answer[0] == 404, path
        assert server.token.encode() not in answer[2]
    assert drop(server, path="/decide") == 404
    assert drop(server, path=f"/{wrong}/decide") == 404
    assert server.desk.state()["standing"] == 0


def test_the_token_is_in_no_log(server: ReviewServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the address in a terminal that is shared, once per request."""
    asked(server.address, "GET", f"/{server.token}/state")
    asked(server.address, "GET", f"/{server.token}/none")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"place": 0}', b'{"place": [], "do": 1, "of": {}}']
)
def test_nonsense_is_answered(server: ReviewServer, body: bytes) -> None:
    """Bug: one bad request ends the review, or is taken for a decision."""
    assert drop(server, body=body) in (400, 404)
    assert drop(server) == 200


@pytest.mark.parametrize(
    "path", ["row/9", "row/-1", "row/x", "row/1/2", "image/0/9", "image/0/x", "x", "row/٣"]
)
def test_what_is_not_there_is_404(server: ReviewServer, path: str) -> None:
    """Bug: a traceback, or another row, for an address that somebody edited."""
    from urllib.parse import quote

    assert asked(server.address, "GET", f"/{server.token}/{quote(path)}")[0] == 404


def test_nothing_can_be_framed_sniffed_or_cached(server: ReviewServer) -> None:
    """Bug: an image that a browser takes for a page, or a frame in which somebody is made to press keys."""
    for path in ("", "state", "row/0", "image/0/0", "none"):
        _, answer, _ = asked(server.address, "GET", f"/{server.token}/{path}")
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("X-Frame-Options") == "DENY"
        assert answer.getheader("Cross-Origin-Resource-Policy") == "same-origin"
        assert answer.getheader("Referrer-Policy") == "no-referrer"
        assert "frame-ancestors 'none'" in str(answer.getheader("Content-Security-Policy"))
        assert answer.getheader("Access-Control-Allow-Origin") is None
        if path != "image/0/0":
            assert answer.getheader("Cache-Control") == "no-store"


def test_an_image_that_is_a_page_is_not_sent(tmp_path: Path) -> None:
    """Bug: HTML or SVG from a row, served from our own origin, runs there."""
    pages = [
        f"data:image/png;base64,{base64.b64encode(text).decode()}"
        for text in (b"<html>", b"<svg/>", b"GIF8x")
    ]
    with serving(desk(rows_file(tmp_path, [row(0, images=pages)]))) as one:
        for number in range(3):
            status, answer, data = asked(one.address, "GET", f"/{one.token}/image/0/{number}")
            assert (status, answer.getheader("Content-Type")) == (422, "application/json")
            assert b"is not an image" in data or b"broken" in data


def test_the_page_asks_nobody_and_holds_no_row(server: ReviewServer) -> None:
    """Bug: a font from a network, or a row's text as markup in the document."""
    _, answer, data = asked(server.address, "GET", f"/{server.token}/")
    text = data.decode()
    assert EVIL not in text
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", text)
    assert not re.findall(r"https?:|url\(|@import", text)
    rules = str(answer.getheader("Content-Security-Policy"))
    assert rules == policy()
    assert "unsafe" not in rules
    assert "require-trusted-types-for 'script'" in rules
    assert "&lt;b&gt;" in page("<b>")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)


def test_a_tag_has_one_colour_everywhere() -> None:
    """Bug: `<back>` is orange in a run's report and green in the review."""
    report = (resources.files("reflectvlm.report") / "assets/dom.js").read_text(encoding="utf-8")
    hues = [line for line in _asset("tags.js").splitlines() if line.startswith(("const HUES", "const KNOWN"))]
    assert len(hues) == 2
    assert all(line in report for line in hues)


def test_a_file_that_changed_is_told(server: ReviewServer) -> None:
    """Bug: rows of another file under the old numbers."""
    path = server.desk.rows.root / "rows.jsonl"
    path.write_text(path.read_text() + "\n")
    assert drop(server) == 409


def test_a_taken_port_is_named(server: ReviewServer) -> None:
    """Bug: a traceback from the socket library."""
    with pytest.raises(ValueError, match=rf"port {server.port} cannot be used"):
        ReviewServer(server.desk, server.port)


def test_a_full_disk_is_told(server: ReviewServer) -> None:
    """Bug: the page goes on to the next row, and the decision is nowhere."""
    server.desk.decisions.path.mkdir()
    assert drop(server) == 507
    assert server.desk.state()["status"] == ".."


def test_two_at_once_are_both_kept(server: ReviewServer) -> None:
    """Bug: threads that write into each other's line."""
    from concurrent.futures import ThreadPoolExecutor

    of = server.desk.rows.digests
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda n: post(server.address, "decide", place=n % 2, do="drop", of=of[n % 2]), range(40)
            )
        )
    lines = server.desk.decisions.path.read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 40
    assert urlsplit(server.address).hostname == "127.0.0.1"
