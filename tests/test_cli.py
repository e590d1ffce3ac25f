"""The command line: exit codes, one-line errors, a quick start."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectvlm import __version__, config
from reflectvlm.attention_options import KEYS as ATTENTION
from reflectvlm.attention_options import read_words
from reflectvlm.cli import main
from reflectvlm.cli_help import COMMANDS, help_of
from reflectvlm.data_command import COMMANDS as DATA_COMMANDS
from reflectvlm.generate_options import Given
from reflectvlm.plan_command import OWN as PLAN
from reflectvlm.recipe_files import evaluations, pipelines, recipes
from reflectvlm.stages import StageStopped
from reflectvlm.train.launch import WORDS as LAUNCH
from reflectvlm.train.run import RunResult
from reflectvlm.train.table import Table


class Scripted:
    """A trainer whose run ends as told."""

    def __init__(self, end: int | BaseException) -> None:
        self.end = end

    def run(self) -> RunResult:
        if isinstance(self.end, BaseException):
            raise self.end
        logging.getLogger("reflectvlm").warning("two\nlines")
        return RunResult(folder=Path(), before={}, after={}, finished=self.end == 0, exit_code=self.end)


def test_recipes_needs_no_torch_and_is_quick() -> None:
    """An import at the top of a module that the list needs costs every user seconds."""
    code = (
        "import sys\n"
        "from reflectvlm.cli import main\n"
        "main(['recipes']); main(['--help']); main(['--version']); main(['show', 'recipe=grpo'])\n"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.endswith("heavy: []\n")


def test_recipes_lists_all_with_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that is not listed is not found."""
    assert main(["recipes"]) == 0
    lines, tables, chains = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert [line.split()[0] for line in lines] == list(recipes())
    assert [line.split()[0] for line in tables[1:]] == list(evaluations())
    assert [line.split()[0] for line in chains[1:]] == list(pipelines())
    assert all(len(line.split()) > 3 for line in (*lines, *tables, *chains))


def test_show_prints_a_recipe_that_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`reflectvlm show … > mine.yaml` is how a user begins a recipe of their own."""
    assert main(["show", "recipe=lookback_rl", "steps=9"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert config.compose(str(tmp_path / "mine.yaml")).values["steps"] == 9


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_version_and_a_short_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a command that the list lacks, or a list of 130 lines."""
    assert printed(capsys, "--version") == f"reflectvlm {__version__}\n"
    for words in ([], ["--help"], ["-h"], ["help"]):
        out = printed(capsys, *words)
        assert [line.split()[0] for line in out.splitlines()[2 : 2 + len(COMMANDS)]] == list(COMMANDS)
        assert "reflectvlm COMMAND --help" in out
        assert "Exit codes" in out
        assert out.count("\n") < 30
    assert main(["nothing"]) == 2
    assert f"only {', '.join(COMMANDS)}." in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: `score --help` prints all commands' words; or a command's help does not say how it is used."""
    out = printed(capsys, command, "--help")
    assert out.startswith(f"reflectvlm {command}")
    assert out == printed(capsys, "help", command) == printed(capsys, command, "-h")
    examples = [line for line in out.splitlines() if line.startswith(f"  reflectvlm {command}")]
    assert len(examples) >= 2
    others = set(COMMANDS) - {command, "train", "recipes"}
    assert not [name for name in others if f"  reflectvlm {name} " in out]
    assert all(len(line) <= 112 for line in out.splitlines())


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_each_command_of_data_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: words without one line that shows how they go together."""
    out = printed(capsys, "data", command, "--help")
    assert out.startswith(f"reflectvlm data {command}")
    examples = [line for line in out.splitlines() if line.startswith(f"  reflectvlm data {command} ")]
    assert len(examples) >= 2


def test_help_has_the_grammar_and_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a word that nobody can know of."""
    train = printed(capsys, "train", "recipe=grpo", "--help")
    for word in ("+key=value", "recipe:key=value", "resume=auto", "Exit codes", "start_from", "data_from"):
        assert word in train
    words = {
        "train": LAUNCH,
        "pipeline": LAUNCH,
        "plan": PLAN,
        "attention": ATTENTION,
        "report": ("against", "out", "attention"),
        "inspect": ("model", "rows"),
    }
    for command, keys in words.items():
        out = printed(capsys, command, "--help")
        assert [key for key in keys if f"{key}=" not in out] == [], command


def test_examples_are_words_that_are_taken() -> None:
    """Bug: an example of the help that the command refuses."""
    for line in help_of("attention").splitlines():
        if line.startswith("  reflectvlm attention"):
            read_words(shlex.split(line)[2:])
    for line in help_of("generate").splitlines():
        if line.startswith("  reflectvlm generate"):
            Given.read(shlex.split(line)[2:])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "train needs recipe=NAME. `reflectvlm recipes` lists them"),
        (["train", "grpo"], "Write recipe=grpo"),
        (["train", "recipe=grpo", "recipe=tiny_base"], "train runs one recipe"),
        (["train", "recipe=grpo", "--steps=3"], "there are no dashes"),
        (["train", "recipe=gpro"], "Did you mean 'grpo'?"),
        (["train", "recipe=grpo", "stesp=3"], "Did you mean steps?"),
        (["show", "recipe=grpo", "steps=1,2"], "several values"),
        (["recipes", "all"], "recipes takes nothing more, got 'all'"),
        (["pipeline"], "pipeline needs one name, got 0. There are: qwen_la, qwen_la_7b;"),
        (["pipeline", "qwen_la", "seed"], "pipeline needs one name, got 2"),
        (["pipeline", "qwen_l"], "No pipeline is called 'qwen_l', only qwen_la, qwen_la_7b. Did you mean"),
        (["pipeline", "./none.yaml"], "No pipeline file at './none.yaml'. Give a .yaml file that exists"),
        (["pipeline", "qwen_la", "--seed=1"], "there are no dashes. Write key=value, e.g. seed=1"),
        (["pipeline", "qwen_la", "sed=1"], "No stage has a key 'sed'"),
    ],
)
def test_what_a_user_wrote_wrong_is_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback hides the one sentence that helps; a code of 0 lets a job script go on."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert out == ""


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        (0, 0, ""),
        (143, 143, ""),
        (130, 130, ""),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C\n"),
        (RuntimeError("The loss (nan)\nis not finite."), 1, "error: The loss (nan) is not finite.\n"),
        (OSError(28, "No space left"), 1, "error: OSError: [Errno 28] No space left\n"),
        (KeyError("x"), 1, "error: KeyError: 'x'\n"),
        (ValueError("Row 'a' has no trace."), 2, "error: Row 'a' has no trace.\n"),
        (StageStopped("cold start was stopped", 143), 143, "error: cold start was stopped\n"),
    ],
)
def test_exit_codes_of_a_run(
    end: Any, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Schedulers decide by the exit code whether to start a job again."""
    monkeypatch.setattr(config, "load_recipe", lambda *_: Scripted(end))
    assert main(["train", "recipe=grpo"]) == code
    err = capsys.readouterr().err
    assert err == (says or "warning: two lines\n")


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "0"), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_sleep(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: with any other process on the machine two threads spin against each other, ten times as long."""
    monkeypatch.setattr(config, "load_recipe", lambda *_: Scripted(0))
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, given.get(name, ""))  # so that it is as before after the test
        if name not in given:
            monkeypatch.delenv(name)
    assert main(["train", "recipe=grpo"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_a_pipeline_s_exit_code_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped pipeline that ends with 0 is not started again."""
    from reflectvlm import pipeline

    asked: list[tuple[str, ...]] = []

    def stopped(*words: str) -> pipeline.PipelineResult:
        asked.append(words)
        return pipeline.PipelineResult(folder=Path(), figures={}, finished=False, exit_code=143)

    monkeypatch.setattr(pipeline, "run_pipeline", stopped)
    assert main(["pipeline", "qwen_la", "seed=1", "qwen_la_brpo:steps=2"]) == 143
    assert asked == [("qwen_la", "seed=1", "qwen_la_brpo:steps=2")]


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a way to the traceback a bug of ours cannot be reported."""
    monkeypatch.setenv("REFLECTVLM_TRACEBACK", "1")
    assert main(["train", "recipe=gpro"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_logger_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `main` in one process printed every line twice."""
    monkeypatch.setattr(config, "load_recipe", lambda *_: Scripted(0))
    logger = logging.getLogger("reflectvlm")
    before = (list(logger.handlers), logger.level, logger.propagate)
    main(["train", "recipe=grpo"])
    assert (list(logger.handlers), logger.level, logger.propagate) == before


# -- standard output that nobody reads ------------------------------------------------------------

STUBBED = """
import sys, types
from reflectvlm.cli import main
from reflectvlm.train.table import Table, say
class Result:
    exit_code = {code}
def run(*words):
    print("as a user's reward does")
    say("stopped by SIGTERM")
    Table("t", ("a", "b")).add("c", "1").show()
    return Result()
module = types.ModuleType("reflectvlm.pipeline")
module.run_pipeline = run
sys.modules["reflectvlm.pipeline"] = module
sys.exit(main({words}))
"""


def with_closed_pipe(code: str, errors: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """In a child whose standard output is a pipe that nobody reads, buffered as in a shell."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            stdout=write,
            stderr=write if errors == subprocess.STDOUT else errors,
            text=True,
            env=environment,
            check=False,
        )
    finally:
        os.close(write)


@pytest.mark.parametrize("code", [143, 75, 0])
def test_a_closed_pipe_keeps_the_exit_code(code: int) -> None:
    """Bug: `reflectvlm pipeline … | head` that was stopped ends with 0 or 120, and is not started again."""
    done = with_closed_pipe(STUBBED.format(code=code, words=["pipeline", "qwen_la"]))
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("code", [143, 75])
def test_both_streams_closed_keep_the_exit_code(code: int) -> None:
    """Bug: the same with `2>&1 | head`: the error's own line is what fails then."""
    stubbed = STUBBED.format(code=code, words=["pipeline", "qwen_la"])
    assert with_closed_pipe(stubbed, subprocess.STDOUT).returncode == code
    wrong = STUBBED.format(code=code, words=["pipeline"])
    assert with_closed_pipe(wrong, subprocess.STDOUT).returncode == 2


@pytest.mark.parametrize("words", [["recipes"], ["show", "recipe=grpo"], ["--help"], ["--version"]])
def test_what_only_prints_ends_well(words: list[str]) -> None:
    """Bug: `reflectvlm recipes | head -1` ends with an error."""
    done = with_closed_pipe(STUBBED.format(code=0, words=words))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_pipe_of_its_own_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a run whose reward's process has died ends with 0, as if somebody had closed standard output."""
    monkeypatch.setattr(config, "load_recipe", lambda *_: Scripted(BrokenPipeError(32, "Broken pipe")))
    assert main(["train", "recipe=grpo"]) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


def test_no_standard_output_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a job started with `>&-` dies at its last table, since sys.stdout is None."""
    monkeypatch.setattr(sys, "stdout", None)
    Table("t", ("a", "b")).add("c", "1").show()
    assert main(["recipes"]) == 0
