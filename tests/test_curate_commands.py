"""`data coldstart` and `data distill` as commands: what is said before, after, and about wrong words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from curating import lines
from reflectvlm.curate import coldstart_command, distil_command
from reflectvlm.curate.set_words import source_name
from reflectvlm.recipe_check import RecipeError

DIGITS = ["source=digits", "max_rows=8", "model=rule,wrong=0.5"]
COLD = [*DIGITS, "method=semantic_back", "teacher=rule,seed=1", "n=3"]
DISTILL = [*DIGITS, "teacher=rule,seed=1", "judges=rule,seed=2", "judges=rule,seed=3"]


def test_what_it_will_take_is_said_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a paid teacher is asked a million times before anybody hears of it; estimate=only asks it."""
    out = tmp_path / "cold"
    assert coldstart_command.run([*COLD, f"out={out}", "estimate=only", "price=10:100", "limit=7"]) == 0
    # 8 questions x 3 answers of 1,024 tokens. Of 7 traces the usual shares would have 1.4 without a look, but
    # they are taken over the other looks if no answer is right: all 7 may want one. An image is reckoned as
    # 1,000 tokens, and its teacher reads an answer of up to 1,024: more than 14,168 in all.
    bound, model, teacher = capsys.readouterr().out.splitlines()
    assert bound.startswith("limit=7 bounds the rows of the set: all 8 questions are answered 3 times.")
    assert re.fullmatch(
        r"model: at most 24 calls, about 24,\d{3} \+ at most 24,576 tokens, money about 2.7\d", model
    )
    assert re.fullmatch(
        r"teacher: at most 7 calls, about 1[4-6],\d{3} \+ at most 7,168 tokens, money .*", teacher
    )
    assert not out.exists()
    coldstart_command.run(
        [*COLD, f"out={out}", "estimate=only", "shares=confirmed:0.8,unneeded:0.2", "limit=7"]
    )
    # Chosen shares are kept to: of 7 traces 5.6 want a look.
    assert "teacher: at most 6 calls" in capsys.readouterr().out
    assert coldstart_command.run([*COLD, f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert said.index("24 calls to make") < said.index("What became of the questions")


def test_a_second_start_asks_nothing_and_changes_nothing(tmp_path: Path) -> None:
    """Bug: a finished set is made again, or a report counts another thing the second time."""
    out = tmp_path / "cold"
    coldstart_command.run([*COLD, f"out={out}"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    coldstart_command.run([*COLD, f"out={out}"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_words_need_another_folder(tmp_path: Path) -> None:
    """Bug: half of the set with n=3 and half with n=4."""
    coldstart_command.run([*COLD, f"out={tmp_path / 'a'}"])
    with pytest.raises(ValueError, match="begun with other settings: seed 0 → 1, source "):
        coldstart_command.run([*COLD, f"out={tmp_path / 'a'}", "seed=1"])


def test_the_usual_shares_spelled_out_are_another_set(tmp_path: Path) -> None:
    """Bug: chosen shares are kept to and usual ones are not, and the second run empties the rows."""
    words = [*COLD, f"out={tmp_path / 'a'}"]
    coldstart_command.run(words)
    with pytest.raises(ValueError, match="begun with other settings: usual_shares True → False"):
        coldstart_command.run([*words, "shares=corrected:0.3,confirmed:0.5,unneeded:0.2"])


def test_how_evaluation_sets_are_read_is_part_of_the_card(tmp_path: Path) -> None:
    """Bug: a set that was held against no question's words goes on as one that was held against all."""
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"id": "1", "question": "Who?", "answer": "x", "images": []}\n')
    words = [*COLD, f"out={tmp_path / 'a'}", f"without={exam}", "without.distance=0", "without.tint=0"]
    coldstart_command.run([*words, "without.n=8"])
    with pytest.raises(ValueError, match=r"begun with other settings: without.n '8' → '9'"):
        coldstart_command.run([*words, "without.n=9"])
    with pytest.raises(ValueError, match=r"begun with other settings: data_dir \(not given\) → 'd'"):
        coldstart_command.run([*words, "without.n=8", "data_dir=d"])


def test_mended_answers_of_a_source_are_other_rows(tmp_path: Path) -> None:
    """Bug: traces that were mended under the same ids are not noticed, and half of a set is made of them."""
    source = tmp_path / "rows.jsonl"
    words = [f"source={source}", "column=trace", "method=semantic_back", "teacher=rule", f"out={tmp_path}/a"]
    for said in ("7", "8"):
        row = {
            "id": "1",
            "question": "Left?",
            "answer": "7",
            "images": [],
            "trace": f"Left. So \\boxed{{{said}}}",
        }
        source.write_text(json.dumps(row) + "\n")
        if said == "7":
            coldstart_command.run(words)
    with pytest.raises(ValueError, match="begun with other settings: source '"):
        coldstart_command.run(words)


def test_replies_are_shared_by_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: another folder with other shares pays for the same answers once more."""
    coldstart_command.run([*COLD, f"out={tmp_path / 'a'}", f"cache={tmp_path / 'c'}"])
    capsys.readouterr()
    words = [*COLD, f"out={tmp_path / 'b'}", f"cache={tmp_path / 'c'}", "shares=confirmed:1"]
    coldstart_command.run(words)
    assert "0 calls to make, 24 in the cache" in capsys.readouterr().out
    assert {row["look"] for row in lines(tmp_path / "b" / "rows.jsonl")} == {"confirmed"}


def test_replies_are_found_whichever_role_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a cache's files are named by the order of the roles, so that another order, or a command without
    one of them, pays for everything once more."""
    swapped = [*DISTILL[:-2], *reversed(DISTILL[-2:])]
    for number, words in enumerate((DISTILL, swapped)):
        capsys.readouterr()
        distil_command.run([*words, f"out={tmp_path / str(number)}", f"cache={tmp_path / 'c'}"])
    told = [line for line in capsys.readouterr().out.splitlines() if "calls to make" in line]
    assert len(told) == 4
    assert all(": 0 calls to make" in line for line in told)
    assert len(list((tmp_path / "c").iterdir())) == 4
    # Who judged teaches now, and who taught judges: nobody is new.
    roles = [*DIGITS, "teacher=rule,seed=2", "judges=rule,seed=1", "judges=rule,seed=3"]
    distil_command.run([*roles, f"out={tmp_path / 'r'}", f"cache={tmp_path / 'c'}"])
    assert len(list((tmp_path / "c").iterdir())) == 4


def test_what_was_never_answered_is_told_and_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: rows are lost to a broken server, and the same words say that all is there already; or they
    announce calls that are not made, or are not needed."""
    coldstart_command.run([*COLD, f"out={tmp_path / 'a'}", "shares=confirmed:1"])
    kept = tmp_path / "part.jsonl"
    replies = [one for one in (tmp_path / "a" / "replies").iterdir() if '"answer"' in one.read_text()]
    kept.write_text("".join(replies[0].read_text().splitlines(keepends=True)[:-2]))
    words = [word for word in COLD if not word.startswith("model=")]
    assert "without a reply" not in capsys.readouterr().out
    words += [f"model=recorded:{kept}", f"out={tmp_path / 'b'}", "shares=confirmed:1"]
    for told in (" 24 calls to make, 0 in the cache", " 2 calls to make, 1 in the cache"):
        coldstart_command.run(words)
        said = capsys.readouterr().out
        assert told in next(line for line in said.splitlines() if "recorded" in line)
        assert said.count("for reasons that may pass: answers 2. The same words again ask for these.") == 1


def test_a_server_that_is_down_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: exit code 0 and an empty set, which the same words find finished once the server is there."""
    gone = "http://127.0.0.1:9/v1,model=m,retries=0"
    words = ["source=digits", "max_rows=3", "n=2", "method=semantic_back", f"model={gone}", "teacher=rule"]
    for _ in range(2):
        assert coldstart_command.run([*words, f"out={tmp_path / 'a'}"]) == 1
        told = capsys.readouterr()
        assert "6 calls to make, 0 in the cache" in told.out
        assert "note: Calls without a reply, for reasons that may pass: answers 6." in told.out
        why = "of 3 questions 3 are left out for plan: no answers (no connection)"
        assert told.err == f"error: The set has no rows: {why}.\n"


def test_nothing_of_an_evaluation_set_gets_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: the filter against evaluation sets cannot be had, or is asked for and left out; a set that has no
    pictures at hand is compared by its texts without a word."""
    coldstart_command.run([*COLD, f"out={tmp_path / 'a'}"])
    first = lines(tmp_path / "a" / "rows.jsonl")
    assert len(first) >= 4
    exam = [{**first[0], "images": ["images/gone.png"]}, first[1]]
    held = tmp_path / "a" / "exam.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in exam))
    words = [*COLD, f"cache={tmp_path / 'a' / 'replies'}", f"without={held}", "without.distance=0"]
    capsys.readouterr()
    coldstart_command.run([*words, "without.tint=0", f"out={tmp_path / 'b'}"])
    assert "without" in capsys.readouterr().out
    dropped = {line["id"]: line for line in lines(tmp_path / "b" / "dropped.jsonl")}
    assert dropped[first[1]["id"]]["stage"] == "overlap"
    assert dropped[first[1]["id"]]["why"].endswith(f"of exam.jsonl {first[1]['id']}")
    assert first[1]["id"] not in {row["id"] for row in lines(tmp_path / "b" / "rows.jsonl")}
    assert "1 of 2 rows of exam.jsonl have no image, or none that can be read" in caplog.text
    assert json.loads((tmp_path / "b" / "card.json").read_text())["without"] == [str(held)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("geometry3k:sets/g3k:test", "geometry3k"),
        ("geo170k:/d/Geo170K", "geo170k"),
        ("a/rows.jsonl", "rows.jsonl"),
        ("c:/rows.jsonl", "rows.jsonl"),
    ],
)
def test_rows_name_where_they_come_from(source: str, name: str) -> None:
    """Bug: rows of a data set's split say that they come from `test`."""
    assert source_name(source) == name


def test_distill_by_its_words(tmp_path: Path) -> None:
    """Bug: the command does not reach what it is for."""
    assert distil_command.run([*DISTILL, f"out={tmp_path / 'd'}"]) == 0
    report = json.loads((tmp_path / "d" / "report.json").read_text())
    assert report["questions"] == 8
    assert report["rows"] >= 4
    assert all(row["trace"].startswith("<SUMMARY>") for row in lines(tmp_path / "d" / "rows.jsonl"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["method=semantic"], "method is 'semantic'.*Did you mean semantic_back"),
        (["method=qwen_la", "model=rule", "out=x", "teacher=rule"], "needs source="),
        (["method=qwen_la"], "needs model=: who answers"),
        (["method=qwen_la", "model=rule"], "needs teacher=.*or self=true"),
        (["method=qwen_la", "model=rule", "teacher=rule", "self=true"], "self=true and teacher are both"),
        (["method=qwen_la", "model=rule", "column=trace", "teacher=rule"], "model and column are both given"),
        (["methd=qwen_la"], "no key 'methd'. Did you mean method"),
        ([*COLD, "out=x", "shares=corrected"], "shares has 'corrected'"),
        ([*COLD, "out=x", "pass_rate=high"], "pass_rate is 'high'"),
        ([*COLD, "out=x", "votes=2"], "votes is given, and no judges"),
        ([*COLD, "out=x", "price=2"], "price is '2'"),
        ([*COLD, "out=x", "judges=rule", "judges=rule,seed=0"], "judges names rule .* twice"),
        ([*COLD, "out=x", "judges=rule", "votes=2"], "votes is 2, and there are 1 judges"),
        ([*COLD, "out=x", "columns.question=problem"], "columns.question is given, but source=digits"),
        ([*COLD, "out=x", "judges=gpt"], "judges is 'gpt'. It must be rule, local:PATH"),
        ([*COLD, "out=x", "judges=rule,wrng=1"], "judges=rule has no setting 'wrng'. Did you mean wrong"),
        ([*COLD[1:], "source=llavacot:/nix", "out=x"], "Did you mean llava_cot"),
        (["source=.", *COLD[1:], "out=x"], "'.' holds no file of rows. Name a .jsonl"),
        (
            ["method=semantic_back", "source=digits", "model=local:./nix", "teacher=rule", "out=x"],
            "model=local:./nix: No model folder at './nix'",
        ),
        ([*COLD, "out=x", "without=digit"], "without=digit is no benchmark .*Did you mean digits"),
        ([*COLD, "out=x", "without=digits", "without.n=1"], "n=1"),
        ([*COLD, "out=x", "without.n=9"], "without.n is given, and nothing .*Add without="),
        ([*COLD, "out=x", "data_dir=d"], "data_dir is given, and nothing .*Add without="),
        ([*COLD, "out=x", "rows_at_once=0"], "rows_at_once is 0"),
        ([*COLD[:-2], "teacher=gpt", "out=x", "estimate=only"], "teacher is 'gpt'"),
        ([*COLD, "out=x", "estimate=only", "votes=2"], "votes is given, and no judges"),
        (
            [*COLD, "out=x", "estimate=only", "judges=rule", "judges=rule,seed=2", "votes=9"],
            "votes is 9, and there are 2 judges",
        ),
        ([*COLD, "out=x", "max_rows=0"], "max_rows is given twice"),
        ([*COLD], "needs out="),
    ],
)
def test_words_that_cannot_be_are_one_line(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a stack trace, or a default instead of what the user meant."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=why) as error:
        coldstart_command.run(words)
    assert not (tmp_path / "x").exists(), "found out after something was written"
    assert "\n" not in str(error.value)


def test_distill_needs_everybody() -> None:
    """Bug: a distillation without judges keeps every wrong answer."""
    with pytest.raises(RecipeError, match="data distill needs judges=: who votes"):
        distil_command.run([*DIGITS, "teacher=rule", "out=x"])
