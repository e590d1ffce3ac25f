"""`reflectvlm generate`: what it prints, and mistakes in one line."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from generating import COPY, DRAWN, SPECIAL, ask, generator, write_work
from reflectvlm.cli import main
from reflectvlm.cli_help import help_of
from reflectvlm.generate_command import Screen
from reflectvlm.generate_options import (
    COLUMNS,
    COMMON,
    FILE,
    ONE,
    POLICY,
    SAMPLING,
    Given,
    described,
    sampling_of,
    value_of,
)
from reflectvlm.generator import Generator
from reflectvlm.reattention import Implicit, VisualRoute
from reflectvlm.types import Instruction, Rollout, Visual

QUESTION = "Which page is it?"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def _inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


def shown(rollout: Rollout) -> str:
    """The text without control characters, inserted blocks in front of the tags that asked for them, and a
    line end."""
    label, count = f"[image 0: all 16 tokens]{SPECIAL}", len(rollout.insertions)
    text = "".join(c for c in rollout.text if c in "\n\t" or unicodedata.category(c) != "Cc")
    return text.replace(SPECIAL, label, count) + "\n"


# -- one question ---------------------------------------------------------------------------------


def test_one_question(capsys: pytest.CaptureFixture[str]) -> None:
    """An answer that is not the one that the model gives as it was trained, blocks that nobody sees, or
    other lines in the middle of what is piped into a file."""
    assert ask("image=p0.png", f"question={QUESTION}", *DRAWN) == 0
    out, err = capsys.readouterr()
    expected = generator().answer("p0.png", QUESTION)
    assert out == shown(expected)
    # A block is the page's 16 tokens and the two around them.
    blocks = len(expected.insertions)
    assert blocks > 0
    first, second, last = [line for line in err.splitlines() if line and "Loading weights" not in line]
    assert first == f"re-attention: VisualCopy(trigger='{SPECIAL}'), as the model's config says"
    assert second == "instruction: Look twice., as the model's config says"
    assert last.startswith(f"12 tokens sampled, {18 * blocks} inserted, ")
    assert last.endswith(" s; stopped by max_tokens=12")


def test_settings_over_what_the_model_carries(capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that is dropped, or one that resets the trigger to the class's own."""
    words = ("image=p0.png", f"question={QUESTION}", *DRAWN)
    assert ask(*words, "reattention.limit=1") == 0
    out, err = capsys.readouterr()
    expected = generator(dataclasses.replace(COPY, limit=1)).answer("p0.png", QUESTION)
    assert out == shown(expected)
    assert expected.count(SPECIAL) > 1 == out.count("[image")
    assert f"VisualCopy(trigger='{SPECIAL}', limit=1), as the model's config says, with limit as given" in err
    assert ask(*words, "reattention=implicit", "instruction=none") == 0
    out, err = capsys.readouterr()
    assert "[image" not in out
    assert "re-attention: Implicit(), as given\ninstruction: none, as given" in err
    assert ask(*words, "reattention=route", "reattention.m=25", f"reattention.trigger={SPECIAL}") == 0
    out, err = capsys.readouterr()
    assert "[image 0: 4 of 16 tokens]" in out
    assert f"re-attention: VisualRoute(m=25.0, trigger='{SPECIAL}'), as given" in err


def test_several_images_and_an_instruction(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two images that are taken for one name, or an order that is not the user's."""
    (tmp_path / "how.txt").write_text("In one word.")
    words = (f"question={QUESTION}", "max_tokens=2", f"instruction={tmp_path / 'how.txt'}")
    asked: list[Any] = []

    def note(self: Generator, image: Any, question: str) -> Any:
        asked.append((len(image), question, self.instruction))
        return prompt(self, image, question)

    prompt = Generator.prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "prompt", note)
        for images in (["image=p0.png,p1.png"], ["image=p0.png", "image=p1.png"], []):
            assert ask(*images, *words, "instruction.place=system") == 0
    how = Instruction(text="In one word.", place="system")
    assert asked == [(2, QUESTION, how), (2, QUESTION, how), (0, QUESTION, how)]
    assert "instruction: In one word., as given" in capsys.readouterr().err


class Terminal(io.TextIOWrapper):
    """A terminal of some encoding."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


def on_screen(monkeypatch: pytest.MonkeyPatch, terminal: Terminal, *pieces: str) -> str:
    monkeypatch.setattr(sys, "stdout", terminal)
    screen = Screen()
    for piece in pieces:
        screen.text(piece)
    screen.block("image 0: 1 of 16 tokens")
    screen.end()
    return terminal.text()


def test_a_terminal_is_safe_and_dims_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that clears the screen or changes its title; markup of rich in an answer taken as markup;
    blocks that look like the model's own words."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = on_screen(monkeypatch, Terminal(), "a\x1b[2J\x9b", "[red]b[/red]", "\n")
    assert out == "a[2J[red]b[/red]\n\x1b[2m[image 0: 1 of 16 tokens]\x1b[0m\n"


def test_a_stream_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that ends in an error at its first €, on a terminal of the C locale."""
    out = on_screen(monkeypatch, Terminal("ascii", terminal=False), "2 €\t", "x")
    assert out == "2 ?\tx[image 0: 1 of 16 tokens]\n"


# -- mistakes -------------------------------------------------------------------------------------

ONE_OK = ("image=p0.png", "question=a")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["question=a"], "generate needs model=PATH: tiny, a folder or a hub name."),
        (["model=tiny"], 'generate needs question="…" and image=FILE, or data=ROWS out=ANSWERS.'),
        (["mdoel=tiny", "question=a"], "generate has no key 'mdoel'. Did you mean model?"),
        (["model=tiny", "question=a", "zzz=1"], "generate has no key 'zzz'. It knows model, "),
        (["model=tiny", "what is it"], "'what is it' is no key=value; quote what has spaces"),
        (["model=tiny", "--question"], "'--question' is no key=value; there are no dashes"),
        (["model=tiny", "model=tiny", "question=a"], "model is given twice: 'tiny' and 'tiny'"),
        (["model=", "question=a"], "model is empty. Give model=VALUE, or leave it out."),
        (["model=tiny", "question= "], "question is empty, and there is no image."),
        (["model=tiny", "image=no.png"], "Image 'no.png' does not exist. Check the path; it is taken from"),
        (["model=tiny", "image=p0.png,no.png"], "Image 'no.png' does not exist"),
        (["model=tiny", "image=rows.jsonl"], "Image 'rows.jsonl' is not an image"),
        (["model=run", *ONE_OK], "model=run is a run's folder. Its model is model=run/model."),
        (["model=run/modle", *ONE_OK], "model=run/modle does not exist: run is there, modle is not in it."),
        (["model=nope", *ONE_OK], "model=nope: No model folder at 'nope'."),
        (["model=.", *ONE_OK], "model=. cannot be loaded: Unrecognized model"),
        (["model=no-one/nothing", *ONE_OK], "model=no-one/nothing cannot be loaded: "),
        (["model=tiny", *ONE_OK, "question=b"], "question is given twice: 'a' and 'b'"),
        (["model=tiny", *ONE_OK, "image=p1.png", "question=<image>"], "question is given twice"),
        (["model=tiny", "image=p0.png", "question=<image><image>"], "says <image> 2 times, but there are 1"),
        (["model=tiny", *ONE_OK, "data=rows.jsonl"], "image and data are both given."),
        (["model=tiny", *ONE_OK, "batch=3"], "batch belongs to a file of rows. Add data=ROWS"),
        (["model=tiny", "data=rows.jsonl"], "data needs out=FILE: where the answers go"),
        (["model=tiny", "data=no.jsonl", "out=o.jsonl"], "'no.jsonl' is not a file."),
        (["model=tiny", "data=rows.jsonl", "out=p0.png/o"], "out='p0.png/o' cannot be written: "),
        (["model=tiny", "data=rows.jsonl", "out=o", "batch=0"], "batch is 0. It must be at least 1."),
        (["model=tiny", "data=rows.jsonl", "out=o", "resume=yes"], "resume is 'yes'. It must be auto or nev"),
        (["model=tiny", "data=rows.jsonl", "out=o", "max_bad=2"], "max_bad is 2.0. It is a share"),
        (["model=tiny", "data=rows.jsonl", "out=o", "max_rows=0"], "max_rows is 0. It must be at least 1."),
        (["model=tiny", "data=rows.jsonl", "out=o", "columns.images=pic"], "No row has a column 'pic'"),
        (["model=tiny", "data=rows.jsonl", "out=rows.jsonl", "resume=auto"], "rows.jsonl:1 is no answer of"),
        (["model=tiny", *ONE_OK, "reattention=cpy"], "must be implicit, copy, route. Did you mean copy?"),
        (["model=tiny", *ONE_OK, "reattention.m=5"], "reattention.m is no setting of Implicit, because the"),
        (
            ["model=tiny", *ONE_OK, "reattention=copy", "reattention.m=5"],
            "reattention.m is no setting of VisualCopy, as given. It has trigger, place, images",
        ),
        (
            ["model=tiny", *ONE_OK, "reattention=route", "reattention.triger=x"],
            "Did you mean reattention.trigger?",
        ),
        (
            ["model=run/model", *ONE_OK, "reattention.limt=1"],
            "VisualCopy, as the model's config says. Did yo",
        ),
        (
            ["model=tiny", *ONE_OK, "reattention=route", "reattention.m=half"],
            "is 'half'. It must be a number",
        ),
        (["model=tiny", *ONE_OK, "reattention=route", "reattention.m=101"], "VisualRoute.m is 101.0. It is"),
        (["model=tiny", *ONE_OK, "reattention=copy", "reattention.limit=-1"], "VisualCopy.limit is -1"),
        (
            ["model=tiny", *ONE_OK, "reattention=copy", "reattention.trigger=null"],
            "reattention.trigger is null, and VisualCopy needs one. To show no image again: reattention=im",
        ),
        (["model=' '", *ONE_OK], "model is empty. Give model=VALUE"),
        (["model=tiny", *ONE_OK, "stop="], "stop is empty. Give stop=VALUE"),
        (["model=tiny", *ONE_OK, "stop=a,,b"], "stop is 'a,,b'. It is one text, or several with commas"),
        (["model=tiny", *ONE_OK, "stop=a,"], "stop is 'a,'. It is one text"),
        (
            ["model=tiny", *ONE_OK, "stop='a,b"],
            "put a text with a comma, a quote or outer spaces in quotes",
        ),
        (["model=tiny", *ONE_OK, "max_tokens=1.5"], "max_tokens is '1.5'. It must be a whole number."),
        (["model=tiny", *ONE_OK, "temperature=-1"], "temperature is -1.0. It must be 0 (greedy) or more."),
        (["model=tiny", *ONE_OK, "seed=-1"], "seed is -1. It must be 0 or more."),
        (["model=tiny", *ONE_OK, "device=warp"], "device is 'warp', which cannot be used here ("),
        (["model=tiny", *ONE_OK, "dtype=int8"], "dtype is 'int8'. It must be float32 or bfloat16 or float1"),
        (["model=tiny", *ONE_OK, "instruction=boxd"], "Did you mean 'boxed'?"),
        (["model=tiny", *ONE_OK, "instruction.place=front"], "It must be user or system."),
    ],
)
def test_what_a_user_wrote_wrong_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback hides the one sentence that helps; a wrong word that is passed over is worse."""
    assert main(["generate", *words]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in err
    assert out == ""


def test_the_logger_is_left_as_it_was() -> None:
    """A second command in one process printed every line twice."""
    logger = logging.getLogger("reflectvlm")
    before = (list(logger.handlers), logger.level, logger.propagate)
    ask("question=a", "max_tokens=1")
    assert (list(logger.handlers), logger.level, logger.propagate) == before


# -- words and values -----------------------------------------------------------------------------


def test_a_misspelt_key_is_told_at_once() -> None:
    """Three seconds of imports before the sentence that a key is misspelt."""
    code = (
        "import sys; from reflectvlm.cli import main\n"
        "main(['generate', 'x=1']); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "False\n"


def test_help_names_every_key() -> None:
    """A key that help does not name is not found."""
    for key in (*COMMON, *POLICY, *SAMPLING, *ONE, *FILE, *COLUMNS):
        assert f"{key}=" in help_of("generate")


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("null", int | None, None),
        ("3", int | None, 3),
        ("0.5", float, 0.5),
        ("3", str | None, "3"),
        ("3", str | int, 3),
        ("0,2", Sequence[int] | None, (0, 2)),
        ("[ -1 ]", Sequence[int] | None, (-1,)),
        ("null", str, "null"),
    ],
)
def test_values_have_their_field_s_type(text: str, hint: Any, value: Any) -> None:
    """A number that stays a text fails in the middle of an answer."""
    found = value_of("key", text, hint)
    assert (type(found), found) == (type(value), value)


def test_described_names_what_is_unusual() -> None:
    """A line that says VisualRoute and not that it keeps a quarter, or one that lists all defaults."""
    assert described(VisualRoute(m=25, limit=1)) == "VisualRoute(m=25, limit=1)"
    assert described(Implicit()) == "Implicit()"
    assert described(Visual) == repr(Visual)


def test_quotes_are_those_of_a_recipe() -> None:
    """A trigger with its quotes never comes, and nothing was inserted without a word about it."""
    words = [
        "model='tiny'",
        "image=a.png",
        "reattention=copy",
        "reattention.trigger='<back>'",
        "question='so'",
    ]
    given = Given.read(words)
    assert given.text("model") == "tiny"
    assert given.text("reattention.trigger") == "<back>"
    assert given.text("question") == "'so'"


@pytest.mark.parametrize(
    ("words", "stop"),
    [
        (["stop=END,DONE"], ("END", "DONE")),
        (["stop= a b , c "], ("a b", "c")),
        (["stop='a, b',c"], ("a, b", "c")),
        (["stop='a, b'"], ("a, b",)),
        (["stop=\"it's\",don't"], ("it's", "don't")),
        (["stop='\n\n'", "stop=a,b"], ("\n\n", "a", "b")),
        (["stop=</answer>"], ("</answer>",)),
    ],
)
def test_stop_texts_are_a_list(words: list[str], stop: tuple[str, ...]) -> None:
    """Bug: `stop=END,DONE` was one text that never comes."""
    given = Given.read(["model=tiny", "question=a", *words])
    assert tuple(sampling_of(given).stop) == stop
