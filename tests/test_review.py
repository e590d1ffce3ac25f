"""Rows, votes, checks and decisions of `data review`, without a page."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.curate.review import decisions as decisions_module
from reflectvlm.curate.review.check import check_trace
from reflectvlm.curate.review.decisions import Decision, Decisions, Drafts, NotSaved
from reflectvlm.curate.review.desk import Refused
from reflectvlm.curate.review.rows import Fields
from reflectvlm.curate.review.votes import disagree, votes_of
from reflectvlm.curate.review.written import write_reviewed
from reflectvlm.curate.review_command import Asked, run
from reflectvlm.data.rows import Columns
from reflectvlm.data.sources import dataset
from reviewing import accept, desk, lines, opened, post, row, rows_file, trace

QWEN_LA = (
    "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING><REFLECTION></REFLECTION>"
    "<CONCLUSION>3</CONCLUSION>"
)


def decision(name: str, do: Any = "accept", **more: Any) -> Decision:
    return Decision(do=do, row=name, of="0", by="ada", at="now", **more)


# -- votes and checks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "verdicts"),
    [
        ({"gpt": True, "qwen": "no"}, ["right", "wrong"]),
        ({"gpt": {"verdict": "Correct", "why": "w"}, "qwen": None}, ["right"]),
        ([True, 1.0, "YES"], ["right", "right", "right"]),
        ([{"judge": "gpt", "right": False}, {"name": "qwen", "score": 0.5}], ["wrong", "0.5"]),
        ('{"gpt": "right", "qwen": "wrong"}', ["right", "wrong"]),
        ("no JSON", []),
        (None, []),
        (3, []),
    ],
)
def test_votes_are_read_in_all_forms(value: Any, verdicts: list[str]) -> None:
    """Bug: a list for people that leaves out the rows whose votes were written the other way."""
    votes = votes_of(value)
    assert [vote.verdict for vote in votes] == verdicts
    assert disagree(votes) == (len(set(verdicts)) > 1)


def test_a_vote_keeps_its_judge_and_reason() -> None:
    """Bug: verdicts nobody can weigh, because who said them and why is lost."""
    assert votes_of([{"judge": "gpt", "right": False, "reason": "reads 7"}]) == (("gpt", "wrong", "reads 7"),)
    assert votes_of([True])[0].judge == "judge 1"


@pytest.mark.parametrize(
    ("text", "layout", "problem", "right"),
    [
        (trace(), "look_back", "", True),
        (trace("4"), "look_back", "", False),
        (trace() + " more", "look_back", "text after", True),
        (QWEN_LA, "qwen_la", "", True),
        ("<think>a</think> \\boxed{3}", "grpo", "", True),
        ("<think>a \\boxed{3}", "grpo", "never closed", True),
        ("<think>a</think>", "grpo", "no \\boxed{}", None),
        ("", "grpo", "the trace is empty", None),
    ],
)
def test_a_trace_is_held_against_the_layout_it_wants_to_be(text, layout, problem, right) -> None:
    """Bug: a Qwen-LA trace called broken because it has no `<back>`, or a broken one that passes."""
    found = check_trace(text, "3")
    assert (found.layout, found.right) == (layout, right)
    assert problem in found.problem
    assert bool(found.problem) == bool(problem)


def test_a_layout_can_be_demanded_or_left_out() -> None:
    """Bug: a trace that lost its `<back>` passes as one that never had to have one."""
    plain = "<think>a</think> \\boxed{3}"
    assert check_trace(plain, "3").problem == ""
    assert check_trace(plain, "3", "look_back").problem == "expected <back>, found no further block"
    assert check_trace("so \\boxed{3}", "3", "none").problems == ()
    assert check_trace("so \\boxed{4}", "3", "none").right is False
    assert check_trace(trace(), "", "auto").right is None


# -- the file of decisions ----------------------------------------------------------------------------


def test_decisions_are_replayed_with_their_undos(tmp_path: Path) -> None:
    """Bug: a restart that shows again what was taken back."""
    log = Decisions.open(tmp_path / "d.jsonl")
    for one in (decision("a"), decision("b", "drop"), decision("a", "fix", fields={"trace": "t"})):
        log.add(one)
    assert log.undo("ada", "later").do == "fix"
    again = Decisions.open(tmp_path / "d.jsonl")
    assert again.standing == log.standing == [decision("a"), decision("b", "drop")]
    assert again.of("a", "0") == decision("a")
    assert again.of("a", "other") is None
    assert (again.last_row, again.undone) == ("a", True)
    assert len(lines(tmp_path / "d.jsonl")) == 4  # it only grows


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 400), undo=st.booleans())
def test_a_cut_at_any_byte_loses_the_last_line_only(tmp_path_factory, cut: int, undo: bool) -> None:
    """Bug: a kill while a line is written makes the file unreadable, or hides the next decision in it."""
    path = tmp_path_factory.mktemp("cut") / "d.jsonl"
    log = Decisions.open(path)
    for name in ("ä", "b", "c"):
        log.add(decision(name))
    if undo:
        log.undo("ada", "later")
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    again = Decisions.open(path)
    assert len(again) == (2 if undo and whole == 4 else whole)
    again.add(decision("next"))
    assert Decisions.open(path).standing == again.standing


@pytest.mark.parametrize(
    "text", ['{"do": "accept"}\n', "[1]\n", "rows of mine", '{"do": "fly", "row": "1"}\n']
)
def test_a_file_that_holds_no_decisions_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    """Bug: decisions=rows.jsonl cuts or grows somebody's data."""
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="no decision"):
        Decisions.open(path)
    assert path.read_text() == text


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: half a line on a full disk, and the next decision is glued to it."""
    log = Decisions.open(tmp_path / "d.jsonl")
    log.add(decision("a"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(decisions_module.os, "fsync", full)
        with pytest.raises(NotSaved, match="No space left"):
            log.add(decision("b"))
    log.add(decision("c"))
    assert (
        [one.row for one in Decisions.open(log.path).standing] == ["a", "c"] == [o.row for o in log.standing]
    )


def test_drafts_are_kept_until_they_are_forgotten(tmp_path: Path) -> None:
    """Bug: what somebody typed for five minutes is gone with the browser."""
    drafts = Drafts.open(tmp_path / "x")
    drafts.keep("a", {"trace": "ü"})
    assert Drafts.open(tmp_path / "x").texts == {"a": {"trace": "ü"}}
    drafts.keep("a", None)
    drafts.keep("b", None)
    assert os.listdir(tmp_path) == []
    (tmp_path / "x").write_text("[1]")
    with pytest.raises(ValueError, match="holds no drafts"):
        Drafts.open(tmp_path / "x")


# -- rows ---------------------------------------------------------------------------------------------


def test_rows_that_training_would_refuse_are_shown_with_the_reason(tmp_path: Path) -> None:
    """Bug: the rows that need people most are the ones that a strict reader hides."""
    rows = [row(0, answer=None), row(1, images=["gone.png"]), row(2, question="<image><image>?")]
    one = desk(rows_file(tmp_path, rows))
    assert "Fill it" in one.check(0, {})["row"]
    assert "gone.png" in one.check(1, {})["row"]
    assert "marker" in one.check(2, {})["row"]
    assert one.check(0, {"answer": "3"})["problems"] == []


def test_rows_that_nobody_can_read_are_counted(tmp_path: Path) -> None:
    """Bug: a broken line or a second row with the same id vanishes without a word."""
    path = rows_file(tmp_path, [row(0), row(0, question="other"), row(1)])
    path.write_text(path.read_text() + "{broken\n")
    rows = opened(path)
    assert rows.ids == ["r0", "r1"]
    assert [one.reason for one in rows.unread] == ["duplicate id", "broken JSON"]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (Fields(trace="text"), "no column|has a column 'text'"),
        (Fields(columns=Columns(images="image")), "column 'image'"),
        (Fields(columns=Columns(answer="gold")), "column 'gold'"),
    ],
)
def test_a_misspelt_column_is_named(tmp_path: Path, fields: Fields, match: str) -> None:
    """Bug: a page of empty traces, all to be written again."""
    with pytest.raises(ValueError, match=match):
        opened(rows_file(tmp_path, [row(0)]), fields)
    with pytest.raises(ValueError, match="holds another part"):
        Fields(trace="question")


def test_images_come_by_path_bytes_and_base64_and_never_from_outside(tmp_path: Path) -> None:
    """Bug: a page that shows only images with paths, or any file of the machine that a row names."""
    path = rows_file(tmp_path, [row(0)])
    data = (tmp_path / "page.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    (tmp_path / "x.ppm").write_bytes(b"P6 1 1 255 \x01\x02\x03")
    path = rows_file(
        tmp_path, [row(0, images=["page.png", url, "x.ppm", "/etc/hostname", "https://x.org/a.png"])]
    )
    rows = opened(path)
    assert rows.image(0, 0) == rows.image(0, 1) == ("image/png", data)
    assert rows.image(0, 2)[1].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="leaves the folder"):
        rows.image(0, 3)
    with pytest.raises(ValueError, match="switched off"):
        rows.image(0, 4)


def test_parquet_with_bytes_goes_through_and_comes_out_readable(tmp_path: Path) -> None:
    """Bug: a reviewed set that `dataset()` cannot read, because bytes or dates have no JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows_file(tmp_path, [])
    image = {"bytes": (tmp_path / "page.png").read_bytes(), "path": None}
    table = [row(i, images=[image], day=date(2026, 1, 2), level=float("nan")) for i in range(5)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet", row_group_size=2)
    one = desk(tmp_path / "rows.parquet")
    accept(one, 3)
    assert one.image(3, 0)[0] == "image/png"
    assert one.finish().accepted == 1
    (sample,) = dataset(one.out)
    assert (sample.id, sample.images[0].size) == ("r3", (64, 48))
    assert sample.columns["day"] == "2026-01-02"
    assert sample.columns["level"] is None


# -- the desk -----------------------------------------------------------------------------------------


def test_what_the_checks_are_against_needs_a_second_word(tmp_path: Path) -> None:
    """Bug: one key too many, and a broken trace is in the training set."""
    one = desk(rows_file(tmp_path, [row(0, trace=trace("4")), row(1, trace="<think>")]))
    with pytest.raises(Refused, match="'4', which is not the gold answer") as refused:
        accept(one, 0)
    assert refused.value.more["problems"]
    accept(one, 0, anyway=True)
    assert "not the gold answer" in one.row(0)["decision"]["despite"]
    one.decide(1, "drop", one.row(1)["of"])  # to drop it, nobody is asked twice
    assert one.state()["status"] == "ad"


def test_a_fix_changes_only_what_was_changed(tmp_path: Path) -> None:
    """Bug: a fix of the trace that turns the answer 3 into "3", or is lost in the reviewed set."""
    one = desk(rows_file(tmp_path, [row(0, answer=3, trace=trace("4")), row(1)]))
    of = one.row(0)["of"]
    one.decide(0, "fix", of, {"question": row(0)["question"], "answer": "3", "trace": trace("3", "ä\r\nb")})
    with pytest.raises(Refused, match="Nothing is changed"):
        one.decide(1, "fix", one.row(1)["of"], {"trace": trace()})
    one.finish()
    (written,) = lines(one.out)
    assert written["answer"] == 3
    assert written["trace"] == trace("3", "ä\nb")
    assert written["reviewed"] | {"at": ""} == {
        "decision": "fixed", "by": "ada", "at": "", "changed": ["trace"], "despite": "",
    }  # fmt: skip
    assert {k: v for k, v in written.items() if k not in ("trace", "reviewed")} == {
        k: v for k, v in row(0, answer=3).items() if k != "trace"
    }


def test_a_decision_is_about_the_words_that_were_seen(tmp_path: Path) -> None:
    """Bug: the file is made anew, and yesterday's accept stands for today's other trace."""
    path = rows_file(tmp_path, [row(0), row(1)])
    one = desk(path)
    accept(one, 0)
    accept(one, 1)
    path.unlink()
    again = desk(rows_file(tmp_path, [row(0, trace=trace(back="Other words.")), row(1, extra=1)]))
    assert again.state()["status"] == ".a"
    with pytest.raises(Refused, match="no longer the one"):
        again.decide(0, "accept", one.rows.digests[0])
    told = again.finish()
    assert (told.accepted, told.undecided, told.stale) == (1, 1, 1)
    assert "changed since" in str(told)


def test_it_goes_on_where_people_were(tmp_path: Path) -> None:
    """Bug: every start at row 1, with the work of yesterday in between."""
    path = rows_file(tmp_path, [row(i) for i in range(5)])
    one = desk(path)
    for place in (0, 3):
        accept(one, place)
    assert desk(path).state()["start"] == 4
    accept(one, 4)
    assert desk(path).state()["start"] == 1
    again = desk(path)
    assert again.undo(3)["place"] == 4
    assert desk(path).state()["start"] == 4
    with pytest.raises(Refused, match="another tab"):
        again.undo(3)
    with pytest.raises(Refused, match="nothing to undo"):
        desk(rows_file(tmp_path / "new", [row(0)])).undo(0)


def test_an_undone_fix_is_a_draft(tmp_path: Path) -> None:
    """Bug: u on the wrong row, and a long fix has to be typed again."""
    one = desk(rows_file(tmp_path, [row(0)]))
    one.decide(0, "fix", one.row(0)["of"], {"trace": trace(back="New.")})
    assert one.row(0)["draft"] is None
    one.undo(1)
    assert one.row(0)["draft"] == {"trace": trace(back="New.")}


def test_only_disagreement_and_search(tmp_path: Path) -> None:
    """Bug: places of the short list are taken for places of the file, and another row is dropped."""
    rows = [row(i, about={"votes": {"a": True, "b": i % 2 == 0}}) for i in range(6)]
    one = desk(rows_file(tmp_path, rows), only="disagreement", rest="keep")
    assert one.state()["mixed"] == "111"
    assert one.search("MARKS 5") == [2]
    assert one.search("marks nowhere") == []
    one.decide(2, "drop", one.row(2)["of"])
    told = one.finish()
    assert [line["id"] for line in lines(one.out)] == ["r0", "r1", "r2", "r3", "r4"]
    assert (told.dropped, told.undecided) == (1, 5)


def test_votes_on_a_rewritten_answer_stand_beside_that_answer(tmp_path: Path) -> None:
    """Bug: the page says "wrong, wrong" beside a trace that no judge has seen."""
    about = {"first_answer": "It is 9.", "first_votes": {"a": False, "b": None}}
    shown = desk(rows_file(tmp_path, [row(0, about=about), row(1)])).row(0)
    assert shown["votes"] == []
    assert shown["first_answer"] == "It is 9."
    assert [(vote["judge"], vote["verdict"]) for vote in shown["first_votes"]] == [("a", "wrong")]


@pytest.mark.parametrize("place", [-1, 2, "0", True, None])
def test_no_other_place_is_a_row(tmp_path: Path, place: Any) -> None:
    """Bug: place -1 drops the last row."""
    with pytest.raises(Refused, match="no row"):
        desk(rows_file(tmp_path, [row(0), row(1)])).decide(place, "drop", "")


@pytest.mark.parametrize("texts", [{"id": "x"}, {"trace": 3}, [], {"trace": "\ud800"}])
def test_no_other_texts_are_taken(tmp_path: Path, texts: Any) -> None:
    """Bug: a page that writes columns nobody sees, or text that no file can hold."""
    one = desk(rows_file(tmp_path, [row(0)]))
    with pytest.raises(Refused, match=r"texts are|surrogate"):
        one.decide(0, "fix", one.row(0)["of"], texts)
    assert not one.decisions.path.exists()


def test_the_set_never_replaces_anything_else(tmp_path: Path) -> None:
    """Bug: out=rows.jsonl by mistake, and the rows are gone."""
    one = desk(path := rows_file(tmp_path, [row(0)]))
    accept(one, 0)
    with pytest.raises(ValueError, match="no reviewed set"):
        write_reviewed(one.rows, one.decisions, path)
    listed = rows_file(tmp_path / "more", [row(0, review="rewritten")])  # what `data distill` lists
    with pytest.raises(ValueError, match="no reviewed set"):
        write_reviewed(one.rows, one.decisions, listed)
    with pytest.raises(ValueError, match="JSON lines"):
        write_reviewed(one.rows, one.decisions, tmp_path / "x.parquet")
    for _ in range(2):  # its own it writes again
        assert one.finish().accepted == 1
    assert sorted(os.listdir(tmp_path)) == [
        "more", "page.png", "rows.decisions.jsonl", "rows.jsonl", "rows.reviewed.jsonl",
    ]  # fmt: skip


def test_opening_keeps_no_rows(tmp_path: Path) -> None:
    """Bug: a review of thousands of rows with images holds them all."""
    import tracemalloc

    image = "data:image/png;base64," + base64.b64encode(os.urandom(60_000)).decode()
    path = rows_file(tmp_path, [row(i, images=[image]) for i in range(200)])
    assert path.stat().st_size > 16e6
    tracemalloc.start()
    rows = opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 200
    assert peak < 3e6  # a few rows of 80 kB at once; all of them are 16 MB


# -- the command --------------------------------------------------------------------------------------


def test_apply_writes_the_set_without_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: decisions that only a browser can turn into rows."""
    path = rows_file(tmp_path, [row(0), row(1)])
    one = desk(path)
    accept(one, 1)
    out = tmp_path / "other.jsonl"
    assert run([str(path), f"apply={out}"]) == 0
    assert "1 rows: 1 accepted, 0 fixed; 0 dropped, 1 undecided left out" in capsys.readouterr().out
    assert [line["id"] for line in lines(out)] == ["r1"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "needs a file"),
        (["gone.jsonl"], "does not exist"),
        (["--port=3"], "there are no dashes|has no key"),
        (["rows.jsonl", "otu=x.jsonl"], "Did you mean out"),
        (["rows.jsonl", "out=rows.jsonl"], "must be three files"),
        (["rows.jsonl", "out=a.jsonl", "apply=b.jsonl"], "Give one of them"),
        (["rows.jsonl", "port=99999"], "from 1 to 65535"),
        (["rows.jsonl", "only=some"], "only is 'some'"),
        (["rows.jsonl", "only=disagreement", "open=false"], "No row of .* judges who disagree"),
        (["rows.jsonl", "out=none/x.jsonl"], "is no folder"),
        (["rows.jsonl", "layout=tags"], "layout is 'tags'"),
    ],
)
def test_what_is_wrong_in_the_words_is_said(tmp_path, monkeypatch, words: list[str], match: str) -> None:
    """Bug: a traceback for a typing mistake."""
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path, [row(0)])
    with pytest.raises(ValueError, match=match):
        run(words)


def test_names_follow_the_file() -> None:
    """Bug: the set of rows.jsonl.gz is called rows.jsonl.gz.reviewed.jsonl, which is no gzip."""
    asked = Asked.read(["a/rows.jsonl.gz", "columns.question=problem", "columns.images=null", "trace=gold"])
    assert asked.out == Path("a/rows.reviewed.jsonl")
    assert asked.decisions == Path("a/rows.decisions.jsonl")
    assert asked.fields.columns.images is None
    assert asked.fields.trace == "gold"


def test_two_reviews_of_one_file_are_refused_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    """Bug: two processes append to one file of decisions; or a kill right after the answer loses one."""
    path = rows_file(tmp_path, [row(i) for i in range(3)])
    command = "import sys; from reflectvlm.curate.review_command import run; sys.exit(run(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(path), "open=false", "by=ada"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        address = next(line for line in process.stdout if "http" in line).split()[1]
        with pytest.raises(ValueError, match="open already"):
            run([str(path), "open=false"])
        post(address, "decide", place=0, do="accept", of=opened(path).digests[0])
        process.kill()
        process.wait()
        assert [one.row for one in Decisions.open(tmp_path / "rows.decisions.jsonl").standing] == ["r0"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert run([str(path), f"apply={tmp_path / 'set.jsonl'}"]) == 0  # the dead one's lock is taken over


def test_finish_ends_the_command_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: Finish on the page, and the terminal waits for ever, or the set is not there."""
    path = rows_file(tmp_path, [row(0)])
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(run([str(path), "open=false", "by=ada"])), daemon=True
    )
    thread.start()
    told = ""
    until = time.monotonic() + 60
    while "http" not in told and time.monotonic() < until:
        told += capsys.readouterr().out
        time.sleep(0.02)
    address = next(word for word in told.split() if word.startswith("http"))
    post(address, "decide", place=0, do="accept", of=opened(path).digests[0])
    assert post(address, "finish", stop=True)["accepted"] == 1
    thread.join(30)
    assert codes == [0]
    assert lines(tmp_path / "rows.reviewed.jsonl")[0]["reviewed"]["by"] == "ada"
