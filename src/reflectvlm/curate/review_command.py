"""`reflectvlm data review FILE`: a local page where people accept, fix or drop rows (docs/data_review.md)."""

from __future__ import annotations

import getpass
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.curate.review.check import LayoutName
from reflectvlm.curate.review.decisions import Decisions, Drafts, NotSaved
from reflectvlm.curate.review.desk import Desk
from reflectvlm.curate.review.rows import Fields, ReviewRows
from reflectvlm.curate.review.server import ReviewServer
from reflectvlm.curate.review.written import Written, check_out, write_reviewed
from reflectvlm.data.fetch import ImageLimits
from reflectvlm.data.rows import Columns
from reflectvlm.data.sources import pick
from reflectvlm.generate_options import Given, value_of
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.lock import lock, unlock
from reflectvlm.train.printing import put, put_error

HELP = """\
reflectvlm data review FILE [key=value …]

  reflectvlm data review cold/rows.jsonl by=anna
  reflectvlm data review cold/rows.jsonl apply=reviewed.jsonl

  A page on 127.0.0.1 where people accept (a), fix (f) or drop (d) rows; ? shows all keys. Each decision is
  on the disk at once, and a later start goes on where people were. FILE: JSON lines, CSV, Parquet, a folder.
  out=FILE            the reviewed set, written at the end: accepted and fixed rows (FILE.reviewed.jsonl)
  decisions=FILE      the decisions, a file that only grows (FILE.decisions.jsonl)
  apply=FILE          write the reviewed set there from the decisions so far, and open no page
  only=disagreement   only rows whose judges disagree        rest=keep     keep undecided rows, too
  layout=NAME         auto, look_back, qwen_la, grpo, none   by=NAME       who decides (the login name)
  port=N  open=false  a fixed port; open no browser          urls=true     load images from the web
  trace=COLUMN votes=COLUMN columns.question=… columns.answer=… columns.images=… columns.id=…
  root=FOLDER split=NAME
"""
_COLUMNS = ("question", "answer", "images", "id")
_KEYS = (
    "file", "out", "decisions", "apply", "only", "rest", "layout", "by", "port", "open", "urls", "trace",
    "votes", "root", "split", *(f"columns.{name}" for name in _COLUMNS),
)  # fmt: skip
_SUFFIXES = (".gz", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words after `data review` say."""

    file: Path
    out: Path
    decisions: Path
    by: str
    fields: Fields
    apply: bool = False
    """Write the set to `out` and open no page."""
    only: Literal["all", "disagreement"] = "all"
    rest: Literal["drop", "keep"] = "drop"
    layout: LayoutName = "auto"
    port: int = 0
    """0: any that is free."""
    open: bool = True
    urls: bool = False
    root: Path | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise RecipeError(
                f"port is {self.port}. It must be a number from 1 to 65535, or 0 for a free one."
            )
        files = [path.absolute() for path in (self.file, self.out, self.decisions)]
        if len(set(files)) < len(files):
            raise RecipeError(
                f"{self.file}, out={self.out} and decisions={self.decisions} must be three "
                "files. Name them apart."
            )

    @classmethod
    def read(cls, words: Sequence[str]) -> Asked:
        named = [_named(word) for word in words]
        given = Given.parsed(named, "data review", _KEYS, above=())
        if "file" not in given:
            raise RecipeError("data review needs a file of rows: reflectvlm data review rows.jsonl.")
        if "apply" in given and "out" in given:
            raise RecipeError("apply and out both name the reviewed set. Give one of them.")
        file = Path(os.path.expanduser(given.text("file") or ""))
        stem = _stem(file)
        kinds: dict[str, Any] = {
            "only": Literal["all", "disagreement"], "rest": Literal["drop", "keep"], "layout": LayoutName,
            "port": int, "open": bool, "urls": bool,
        }  # fmt: skip
        values = {key: given.value(key, kind) for key, kind in kinds.items() if key in given}
        root = given.text("root")
        return cls(
            file=file,
            out=Path(given.text("apply") or given.text("out") or f"{stem}.reviewed.jsonl"),
            decisions=Path(given.text("decisions") or f"{stem}.decisions.jsonl"),
            by=given.text("by") or _login(),
            fields=_fields(given),
            apply="apply" in given,
            root=Path(root) if root is not None else None,
            split=given.text("split"),
            **values,
        )


def run(words: Sequence[str]) -> int:
    """Runs the command until somebody finishes or interrupts it, and returns its exit code."""
    asked = Asked.read(words)
    if not asked.file.exists():
        raise RecipeError(
            f"{str(asked.file)!r} does not exist. Check the path; it is taken from {Path.cwd()}."
        )
    check_out(asked.out)
    with _alone(asked.decisions):
        decisions = Decisions.open(asked.decisions)
        source = pick(asked.file, asked.split)
        limits = ImageLimits(urls=asked.urls)
        rows = ReviewRows.open(source, asked.file.name, asked.fields, limits, asked.root)
        if rows.unread:
            put_error(f"{len(rows.unread):,} rows cannot be shown; the first: {rows.unread[0].message}\n")
        try:
            if asked.apply:
                _tell(write_reviewed(rows, decisions, asked.out, asked.rest), rows, asked)
                return 0
            return _review(asked, rows, decisions)
        except NotSaved as error:
            raise RecipeError(
                f"{error} The decisions are safe: make room, then apply={asked.out}."
            ) from error


def _review(asked: Asked, rows: ReviewRows, decisions: Decisions) -> int:
    drafts = Drafts.open(asked.decisions.with_name(f".{asked.decisions.name}.drafts"))
    desk = Desk(
        rows=rows, decisions=decisions, drafts=drafts, out=asked.out, by=asked.by,
        layout=asked.layout, only=asked.only, rest=asked.rest,
    )  # fmt: skip
    if not desk.shown:
        raise RecipeError(f"No row of {asked.file} has judges who disagree. Leave only=disagreement out.")
    with ReviewServer(desk, asked.port) as server:
        put(f"{len(desk.shown):,} rows, {len(decisions):,} decisions so far, in {asked.decisions}\n")
        put(f"Open {server.address} (only this machine can); Ctrl-C ends, and writes {asked.out}\n")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        if asked.open and _has_window():
            webbrowser.open(server.address)
        try:
            _until(server.finished)
        finally:
            server.shutdown()
            thread.join()
    if not len(decisions):
        put("Nothing is decided yet, so nothing is written.\n")
        return 0
    _tell(desk.finish(), rows, asked)
    return 0


def _until(finished: threading.Event) -> None:
    """Waits for the page's Finish, Ctrl-C or a polite kill."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: finished.set()) if main else None
    try:
        while not finished.wait(1.0):
            pass
    except KeyboardInterrupt:
        put("\n")
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _tell(written: Written, rows: ReviewRows, asked: Asked) -> None:
    put(f"{written}\n")
    if asked.out.absolute().parent != rows.root.absolute() and any(
        isinstance(image, str) and not image.startswith("data:") for image in rows[0].images
    ):
        put(f"Its images are named from {rows.root}: read it with root={rows.root}.\n")


@contextmanager
def _alone(decisions: Path) -> Iterator[None]:
    """Two reviews must not write to one file."""
    held = decisions.with_name(f".{decisions.name}.lock")
    try:
        lock(held)
    except RuntimeError as error:
        raise RecipeError(
            f"A review of {decisions} is open already. End it first, or name others. ({error})"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"decisions={str(decisions)!r} cannot be written: {error.strerror}. Name another file."
        ) from error
    try:
        yield
    finally:
        unlock(held)


def _fields(given: Given) -> Fields:
    columns: dict[str, Any] = {}
    for name in _COLUMNS:
        key = f"columns.{name}"
        if key in given:
            values = [value_of(key, text, str | None) for text in given.all(key)]
            columns[name] = values[0] if len(values) == 1 else values
    names = {name: given.text(name) for name in ("trace", "votes") if name in given}
    return Fields(columns=Columns(**columns), **{key: text for key, text in names.items() if text})


def _named(word: str) -> str:
    """A word without a key is the file, also one whose name has a '='."""
    return f"file={word}" if os.path.lexists(word) or not ("=" in word or word.startswith("-")) else word


def _stem(file: Path) -> Path:
    name = file.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return file.with_name(name or file.name)


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return f"user {os.getuid()}"


def _has_window() -> bool:
    """Whether a browser can open by itself: on a server, `webbrowser` would start one in the terminal."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
