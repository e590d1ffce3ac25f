"""The command line: `reflectvlm train | recipes | show`.

Exit codes: 0 done; 2 what the user wrote is wrong; 1 the run failed; 143 and 130 after SIGTERM and
Ctrl-C. Errors are one line on stderr; `REFLECTVLM_TRACEBACK=1` shows where they come from.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from reflectvlm import __version__
from reflectvlm.recipe_check import RecipeError, nearest

HELP = """\
reflectvlm: RL and SFT that teach a vision-language model to look at its image again

  reflectvlm recipes                                what there is to run
  reflectvlm show recipe=lookback_rl                one recipe with all its values
  reflectvlm train recipe=lookback_rl               run it; all that comes of it goes to runs/
  reflectvlm train recipe=lookback_rl steps=20 variant=solution optimizer.lr=2e-4
  reflectvlm train recipe=./mine.yaml               run a recipe of your own

Values, after the recipe:
  key=value             change a key that the recipe shows; dots go deeper: optimizer.lr=1e-5
  +key=value            add an argument that the recipe does not show
  policy=tiny data=digits
                        choose a whole node: a file of recipes/policy/ or recipes/data/
  "key='a, b = c'"      a text with commas, brackets or '=': two kinds of quotes

Short names:
  resume=auto           go on with the run of this name where it stopped (output.resume)
  save_every= eval_every= root= keep=
                        the keys of the same name under output

A recipe of your own may begin with ours:
  defaults: [lookback_rl, _self_]
  steps: 40

Recipes that start from another one (start_from) run that one first, once, and keep its model in
$REFLECTVLM_CACHE, or ~/.cache/reflectvlm. start_from=null policy.path=… starts from a model of yours.

Exit codes: 0 done, 1 the run failed, 2 something you wrote is wrong, 143 or 130 stopped by SIGTERM or
Ctrl-C (saved; go on with resume=auto). REFLECTVLM_TRACEBACK=1 shows where an error comes from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except BrokenPipeError:  # `reflectvlm recipes | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130)
    except ValueError as error:  # RecipeError, and what constructors and data say about what a user wrote
        return _fail(str(error), 2)
    except Exception as error:  # noqa: BLE001 - the last boundary: a run that failed is one line
        text = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        return _fail(text, int(getattr(error, "exit_code", 1)))


def _dispatch(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help") or "-h" in rest or "--help" in rest:
        print(HELP, end="")
        return 0
    if command in ("-V", "--version", "version"):
        print(f"reflectvlm {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {"train": _train, "recipes": _recipes, "show": _show}
    if command not in commands:
        near = nearest(command, commands)
        hint = f" Did you mean {near!r}?" if near else ""
        raise RecipeError(
            f"No command is called {command!r}, only {', '.join(commands)}.{hint} --help explains."
        )
    return commands[command](rest)


def _recipes(rest: list[str]) -> int:
    from reflectvlm.recipe_files import recipes

    if rest:
        raise RecipeError(
            f"recipes takes nothing more, got {rest[0]!r}. One recipe: reflectvlm show recipe=NAME"
        )
    found = recipes()
    width = max(map(len, found))
    for name, description in found.items():
        print(f"{name:<{width}}  {description}")
    return 0


def _show(rest: list[str]) -> int:
    from reflectvlm.config import compose
    from reflectvlm.recipe_files import find_recipe

    recipe, overrides = _split("show", rest)
    composed = compose(recipe, overrides)
    folder, name = find_recipe(recipe)
    print(f"# {recipe}, composed. Where its values come from is said in {folder / name}.yaml")
    print(composed.yaml, end="")
    return 0


def _train(rest: list[str]) -> int:
    recipe, overrides = _split("train", rest)
    with _own_log_lines():
        _quiet_transformers()
        from reflectvlm.config import load_recipe

        return load_recipe(recipe, *overrides).run().exit_code


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
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split())
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _quiet_transformers() -> None:
    """No advice of transformers, and no bars where nobody watches; its errors stay. Read when it is
    imported; a user's own setting wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(text: str, code: int) -> int:
    if os.environ.get("REFLECTVLM_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
