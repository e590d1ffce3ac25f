"""The command line: `reflectvlm train`, `doctor`, `plan`, `pipeline`, `generate`, `eval`, `score` and others.

Exit codes: 0 done; 2 what the user wrote is wrong; 1 the run failed; those of a stopped run are in
`train/signals.py`. Errors are one line on stderr; `REFLECTVLM_TRACEBACK=1` shows where they come from.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from reflectvlm import __version__
from reflectvlm.cli_help import help_of, overview
from reflectvlm.ending import exit_with
from reflectvlm.recipe_check import RecipeError, nearest
from reflectvlm.train.printing import put, put_error, settle


def command() -> NoReturn:
    """What the shell starts: `main`, and the process's end."""
    exit_with(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _ended(arguments)
    finally:
        settle()


def _ended(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130)
    except ValueError as error:  # RecipeError, and what constructors and data say about what a user wrote
        return _fail(str(error), 2)
    except Exception as error:  # noqa: BLE001 - the last boundary: a run that failed is one line
        text = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        return _fail(text, int(getattr(error, "exit_code", 1)))


def _dispatch(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        if not rest:
            put(overview())
            return 0
        command, rest = rest[0], ["--help"]
    if command in ("-V", "--version", "version"):
        put(f"reflectvlm {__version__}\n")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "recipes": _recipes,
        "show": _show,
        "train": _train,
        "doctor": _doctor,
        "plan": _plan,
        "pipeline": _pipeline,
        "generate": _generate,
        "attention": _attention,
        "eval": _eval,
        "score": _score,
        "data": _data,
        "inspect": _inspect,
        "report": _report,
    }
    if command not in commands:
        near = nearest(command, commands)
        hint = f" Did you mean {near!r}?" if near else ""
        raise RecipeError(
            f"No command is called {command!r}, only {', '.join(commands)}.{hint} --help explains."
        )
    if command != "data" and {"-h", "--help"} & set(rest):
        put(help_of(command))
        return 0
    return commands[command](rest)


def _recipes(rest: list[str]) -> int:
    from reflectvlm.recipe_files import evaluations, pipelines, recipes, recipes_folder

    if rest:
        raise RecipeError(
            f"recipes takes nothing more, got {rest[0]!r}. One recipe: reflectvlm show recipe=NAME"
        )
    found = recipes()
    width = max(map(len, found))
    for name, description in found.items():
        put(f"{name:<{width}}  {description}\n")
    put("\nEvaluations, which train nothing: `eval recipe=NAME model=PATH data_dir=DATA`\n")
    for name, description in evaluations().items():
        put(f"{name:<{width}}  {description}\n")
    chains = pipelines()
    put(f"\nPipelines, made of recipes: `pipeline NAME` runs one of {recipes_folder() / 'pipelines'}\n")
    for name, description in chains.items():
        put(f"{name:<{width}}  {description}\n")
    return 0


def _show(rest: list[str]) -> int:
    from reflectvlm.config import compose
    from reflectvlm.recipe_files import find_recipe

    recipe, overrides = _split("show", rest)
    composed = compose(recipe, overrides)
    folder, name = find_recipe(recipe)
    put(f"# {recipe}, composed. Where its values come from is said in {folder / name}.yaml\n")
    put(composed.yaml)
    return 0


def _train(rest: list[str]) -> int:
    started, rest = _started(["train"], rest)
    if started is not None:
        return started
    recipe, overrides = _split("train", rest)
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.config import load_recipe
        from reflectvlm.train.ranks import leaving
        from reflectvlm.train.signals import one_command

        with one_command(), leaving():
            return load_recipe(recipe, *overrides).run().exit_code


def _started(command: list[str], rest: list[str]) -> tuple[int | None, list[str]]:
    """The exit code of the processes that the words ask for, if they do, and the other words."""
    from reflectvlm.train.launch import Launch, leave_with_launcher

    launch, rest = Launch.read(rest)
    if launch is not None:
        return launch.run([*command, *rest]), rest
    leave_with_launcher()
    return None, rest


def _doctor(rest: list[str]) -> int:
    from reflectvlm.train.launch import WORDS

    if word := next((word for word in rest if word.partition("=")[0] in WORDS), None):
        raise RecipeError(f"doctor looks at a recipe in one process. Leave {word} out.")
    recipe, overrides = _split("doctor", rest)
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.doctor_command import doctor

        return doctor(recipe, overrides)


def _plan(rest: list[str]) -> int:
    from reflectvlm.plan_command import Asked, plan

    asked, words = Asked.read(rest)
    recipe, overrides = _split("plan", words)
    with _own_log_lines():
        _quiet_transformers()
        return plan(recipe, overrides, asked)


def _pipeline(rest: list[str]) -> int:
    from reflectvlm.recipe_files import pipelines

    started, rest = _started(["pipeline"], rest)
    if started is not None:
        return started
    names = [word for word in rest if "=" not in word]
    if len(names) != 1:
        raise RecipeError(
            f"pipeline needs one name, got {len(names)}. There are: {', '.join(pipelines())}; "
            "your own file goes by its path, e.g. ./mine.yaml."
        )
    if flag := next((word for word in rest if word.startswith("-")), None):
        raise RecipeError(f"{flag!r} is no override: there are no dashes. Write key=value, e.g. seed=1.")
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.pipeline import run_pipeline
        from reflectvlm.train.ranks import leaving
        from reflectvlm.train.signals import one_command

        with one_command(), leaving():
            return run_pipeline(names[0], *(word for word in rest if word != names[0])).exit_code


def _generate(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.generate_options import Given

        given = Given.read(rest)  # a misspelt key is told before torch is imported
        from reflectvlm.generate_command import generate

        return generate(given)


def _attention(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.attention_options import read_words

        read_words(rest)  # a misspelt key is told before torch is imported
        from reflectvlm.attention_command import attention

        return attention(rest)


def _eval(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.eval_command import evaluate

        return evaluate(rest)


def _score(rest: list[str]) -> int:
    with _own_log_lines():
        from reflectvlm.score_command import score

        return score(rest)


def _data(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.data_command import data

        return data(rest)


def _inspect(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        from reflectvlm.inspect_command import inspect

        return inspect(rest)


def _report(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.report_command import report

        return report(rest)


def _split(command: str, rest: Sequence[str]) -> tuple[str, list[str]]:
    """`recipe=NAME` and all others."""
    names = [word.removeprefix("recipe=") for word in rest if word.startswith("recipe=")]
    overrides = [word for word in rest if not word.startswith("recipe=")]
    if len(names) > 1:
        raise RecipeError(f"{command} runs one recipe, got {', '.join(names)}.")
    if not names or not names[0]:
        bare = next((word for word in overrides if "=" not in word), None)
        hint = f"Write recipe={bare}" if bare else "`reflectvlm recipes` lists them"
        raise RecipeError(f"{command} needs recipe=NAME. {hint}.")
    if flag := next((word for word in overrides if word.startswith("-")), None):
        raise RecipeError(f"{flag!r} is no override: there are no dashes. Write key=value, e.g. steps=10.")
    return names[0], overrides


@contextmanager
def _own_log_lines() -> Iterator[None]:
    """Our own messages as single lines on stderr, others' as they are."""
    logger = logging.getLogger("reflectvlm")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    if os.environ.get("RANK", "0") != "0":
        handler.addFilter(_of_this_rank)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _of_this_rank(record: logging.LogRecord) -> bool:
    """Of several processes the first one talks; another one says only what concerns its own part."""
    from reflectvlm.interrupt import works_by_itself

    return record.levelno >= logging.WARNING and works_by_itself()


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        rank = os.environ.get("RANK", "0")
        text = " ".join(record.getMessage().split())
        text = text if rank == "0" else f"rank {rank}: {text}"
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _quiet_transformers() -> None:
    """No advice of transformers, and no bars where nobody watches; its errors stay. Read when it is
    imported; a user's own setting wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _share_cores() -> None:
    """Threads that wait for each other sleep instead of spinning: beside any other busy process they take
    its time and their own. Read when torch is imported; a user's own setting wins."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "0")


def _fail(text: str, code: int) -> int:
    if os.environ.get("REFLECTVLM_TRACEBACK") == "1":
        put_error(traceback.format_exc())
    put_error(f"error: {' '.join(text.split())}\n")
    return code
