"""The command line: `reflectvlm train | doctor | plan | pipeline | generate | inspect | recipes | show`.

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

from reflectvlm import __version__
from reflectvlm.recipe_check import RecipeError, nearest
from reflectvlm.train.printing import put, put_error, settle

HELP = """\
reflectvlm: RL and SFT that teach a vision-language model to look at its image again

  reflectvlm recipes                                what there is to run
  reflectvlm show recipe=lookback_rl                one recipe with all its values
  reflectvlm train recipe=lookback_rl               run it; all that comes of it goes to runs/
  reflectvlm train recipe=lookback_rl steps=20 variant=solution optimizer.lr=2e-4
  reflectvlm train recipe=./mine.yaml               run a recipe of your own
  reflectvlm doctor recipe=lookback_rl              look for what would go wrong in it, without training
  reflectvlm plan recipe=lookback_rl_7b gpus=8 gpu=80GB
                                                    memory and seconds of a step, before anything is loaded
  reflectvlm pipeline qwen_la                       a whole chain of recipes, and the table that compares
  reflectvlm generate model=runs/NAME/model image=page.png question="Which digit is upper left?"
  reflectvlm generate model=tiny data=rows.jsonl out=answers.jsonl
  reflectvlm inspect runs/NAME                      how far a run came, which of its checkpoints are whole
  reflectvlm inspect runs/NAME/nonfinite-step-12    the batch of a step that gave no finite loss; rows=20
                        shows the text of so many rows, model=PATH makes it with that tokenizer

Values, after the recipe:
  key=value             change a key that the recipe shows; dots go deeper: optimizer.lr=1e-5
  +key=value            add an argument that the recipe does not show
  policy=tiny data=digits
                        choose a whole node: a file of recipes/policy/ or recipes/data/
  "key='a, b = c'"      a text with commas, brackets or '=': two kinds of quotes

  recipe:key=value      change a key of a recipe that this one is made from, however deep; '*:key=value'
                        changes it in it and all of those that have it, as does key=value for a pipeline:
                        pipeline qwen_la steps=2 rows=8 held_out.data.size=8 is a first look at one

Several processes (train and pipeline), each with a part of the work; the result is the same:
  gpus=8                one process per GPU; processes=2 on a machine without one
  nodes=2 node_rank=0 main_address=node-a main_port=29500
                        the same command on each machine, with its own node_rank; torchrun, accelerate launch
                        and deepspeed start `-m reflectvlm train …` without these words
  compute=zero2         how weights, gradients and moments are shared: single, ddp, zero1, zero2, zero3

Short names:
  resume=auto           go on with the run of this name where it stopped (output.resume)
  max_minutes=55        save and exit with code 75 before so many minutes are over, stages included
  save_every= eval_every= root= keep=
                        the keys of the same name under output

For plan:
  gpus= gpu=            how many, and which: memory (80GB) or a name (A100-80GB, H100, H200, L40S, RTX-4090)
  prompt= answer= visual=
                        tokens of a usual row; without them every row is as long as the recipe allows
  --json                the plan as one line of JSON. Exit code 1: it does not fit

For generate:
  model=                tiny, a folder (a run's model/) or a hub name. How it looks at the image again and
                        its instruction are those that it was trained with, unless you give others:
  reattention=route     or copy (show the image again) or implicit (do not)
  reattention.m=25 reattention.trigger='<back>' reattention.limit=2
                        a setting of it; alone it changes the one that the model carries
  instruction=          a name, a .txt file, or none; instruction.place=system
  image=a.png,b.png     files or web addresses; also image= several times
  max_tokens= temperature= top_p= top_k= min_p= stop= seed=
                        how tokens are drawn; by default the likeliest, at most 1024. Commas separate
                        texts that stop: stop=END,DONE; one with a comma in quotes: stop="'a, b',c"
  device= dtype= min_pixels= max_pixels= trust_remote_code=
                        where and how the model runs, and whether code that comes with it may
  data= out= resume=auto
                        a file or folder of rows, gold answers not needed; one JSON line per row, and
                        what is in the file is not answered again
  columns.question= columns.images= columns.id= columns.messages= root= split= max_rows= max_bad= batch=
                        how rows are read, and how many are answered at one time

A recipe of your own may begin with ours:
  defaults: [lookback_rl, _self_]
  steps: 40

Recipes that start from another one (start_from), or take its rows (data_from), run that one first, once,
and keep what it makes in $REFLECTVLM_CACHE, or ~/.cache/reflectvlm. start_from=null policy.path=… starts
from a model of yours, data_from=null data.path=… takes your rows.

Exit codes: 0 done, 1 the run failed, 2 something you wrote is wrong; 143, 130 or 129 stopped by SIGTERM,
Ctrl-C or SIGHUP, 75 by max_minutes (saved; go on with resume=auto); 69 and 70 in one of several processes
that another has left alone, or told of its error. REFLECTVLM_TRACEBACK=1 shows where an error comes from.
"""


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
    if command in ("-h", "--help", "help") or "-h" in rest or "--help" in rest:
        put(HELP)
        return 0
    if command in ("-V", "--version", "version"):
        put(f"reflectvlm {__version__}\n")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "doctor": _doctor,
        "plan": _plan,
        "pipeline": _pipeline,
        "generate": _generate,
        "inspect": _inspect,
        "recipes": _recipes,
        "show": _show,
    }
    if command not in commands:
        near = nearest(command, commands)
        hint = f" Did you mean {near!r}?" if near else ""
        raise RecipeError(
            f"No command is called {command!r}, only {', '.join(commands)}.{hint} --help explains."
        )
    return commands[command](rest)


def _recipes(rest: list[str]) -> int:
    from reflectvlm.recipe_files import pipelines, recipes, recipes_folder

    if rest:
        raise RecipeError(
            f"recipes takes nothing more, got {rest[0]!r}. One recipe: reflectvlm show recipe=NAME"
        )
    found = recipes()
    width = max(map(len, found))
    for name, description in found.items():
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
        from reflectvlm.train.signals import one_command

        with one_command():
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
        from reflectvlm.train.signals import one_command

        with one_command():
            return run_pipeline(names[0], *(word for word in rest if word != names[0])).exit_code


def _generate(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        _share_cores()
        from reflectvlm.generate_options import Given

        given = Given.read(rest)  # a misspelt key is told before torch is imported
        from reflectvlm.generate_command import generate

        return generate(given)


def _inspect(rest: list[str]) -> int:
    with _own_log_lines():
        _quiet_transformers()
        from reflectvlm.inspect_command import inspect

        return inspect(rest)


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
