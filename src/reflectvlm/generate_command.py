"""`reflectvlm generate`: one question, answered as it comes, or a file of rows. See `cli_help`.

The answer goes to standard output; what it was made with and what it cost goes to standard error. All
that a user may have got wrong is checked before the weights are loaded.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console as RichConsole
from rich.text import Text as RichText

from reflectvlm.answer_card import Card, card_of
from reflectvlm.answer_file import AnswerFile, answer_rows, cost, questions
from reflectvlm.data.filtered import Dataset
from reflectvlm.data.rows import Columns
from reflectvlm.generate_options import (
    POLICY,
    Given,
    described,
    instruction_of,
    reattention_of,
    sampling_of,
)
from reflectvlm.generator import Generator, is_address, read_images
from reflectvlm.html import block_label
from reflectvlm.models.carried import Carried, carried
from reflectvlm.models.loading import find_model, load_config
from reflectvlm.models.qwen_vl import load_policy
from reflectvlm.models.trust import CodeRefused
from reflectvlm.protocols import Reattention
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.console import colored
from reflectvlm.types import Instruction, Rollout, SamplingParams, Visual

log = logging.getLogger("reflectvlm")

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def generate(given: Given) -> int:
    """Runs the command and returns its exit code."""
    if "data" not in given:
        images = read_images([name for value in given.all("image") for name in image_names(value)])
        answer_one(Plan.read(given).generator(), images, given.text("question") or "")
        return 0
    plan, batch = Plan.read(given), given.value("batch", int, 16)
    if batch < 1:
        raise RecipeError(f"batch is {batch}. It must be at least 1.")
    resume = given.value("resume", Literal["auto", "never"], "never")
    data = rows_of(given)
    file = AnswerFile.open(str(given.text("out")), plan.card(batch), resume)
    return answer_rows(plan.generator, data, file, batch)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is going to answer; no weights are loaded yet."""

    path: str
    reattention: Reattention
    instruction: Instruction
    sampling: SamplingParams
    settings: Mapping[str, Any]
    """Further arguments of `Generator.load`."""

    @classmethod
    def read(cls, given: Given) -> Plan:
        """Says which re-attention and instruction it is going to be, and why these."""
        path = os.path.expanduser(str(given.text("model")))
        said = carried_by(path, given.value("trust_remote_code", bool, False))
        reattention, why = reattention_of(given, said.reattention)
        instruction, because = instruction_of(given, said.instruction)
        seed = given.value("seed", int, 0)
        if seed < 0:
            raise RecipeError(f"seed is {seed}. It must be 0 or more.")
        settings = {"seed": seed, "device": given.text("device"), **given.fields(load_policy, POLICY)}
        plan = cls(
            path=path,
            reattention=reattention,
            instruction=instruction,
            sampling=sampling_of(given),
            settings=settings,
        )
        plan.say(why, because)
        return plan

    def say(self, why: str, because: str) -> None:
        """Which re-attention and instruction it is going to be, and who says so."""
        log.info("re-attention: %s, %s", described(self.reattention), why)
        if because:
            text = " ".join(self.instruction.text.split()) or "none"
            log.info("instruction: %s, %s", text if len(text) <= 60 else f"{text[:59]}…", because)

    def card(self, batch: int) -> Card:
        """What answers to a file of rows are made with."""
        settings = {key: value for key, value in self.settings.items() if key != "device"}
        return card_of(self.path, self.reattention, self.instruction, self.sampling, batch=batch, **settings)

    def generator(self) -> Generator:
        try:
            return Generator.load(
                self.path, self.reattention, self.instruction, self.sampling, **self.settings
            )
        except OSError as error:
            raise _no_model(self.path, error) from error


# -- one question ---------------------------------------------------------------------------------


def answer_one(generator: Generator, images: Any, question: str) -> Rollout:
    """Streams an answer to the terminal, and says what it cost."""
    prompt = generator.prompt(images, question)
    screen = Screen()
    started = time.perf_counter()
    rollout: Rollout | None = None
    try:
        for piece in generator.stream_prompt(prompt):
            if isinstance(piece, str):
                screen.text(piece)
            elif isinstance(piece, Visual):
                screen.block(block_label(piece, prompt.grids))
            else:
                rollout = piece
    finally:
        screen.end()
    assert rollout is not None
    seconds = time.perf_counter() - started
    log.info("%s, %.2f s; %s", cost([rollout]), seconds, _why(rollout, generator.sampling))
    return rollout


@dataclass
class Screen:
    """Standard output: colours where it is a terminal, else the text alone. A model must not be able to
    clear the screen, and a character that the terminal lacks must not end the answer."""

    _rich: RichConsole | None = field(
        default_factory=lambda: RichConsole(highlight=False) if sys.stdout.isatty() else None
    )
    _inside_line: bool = False

    def text(self, piece: str) -> None:
        self._write(piece, colored)

    def block(self, label: str) -> None:
        self._write(f"[{label}]", lambda shown: RichText(shown, "dim"))

    def end(self) -> None:
        if self._inside_line:
            self._write("\n", RichText)

    def _write(self, text: str, style: Callable[[str], RichText]) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        shown = _CONTROL.sub("", text).encode(encoding, "replace").decode(encoding)
        if not shown:
            return
        if self._rich is None:
            sys.stdout.write(shown)
        else:
            self._rich.print(style(shown), end="", soft_wrap=True)
        sys.stdout.flush()
        self._inside_line = not shown.endswith("\n")


def _why(rollout: Rollout, sampling: SamplingParams) -> str:
    return {
        "eos": "the answer was complete",
        "stop": "stopped at a stop text",
        "length": f"stopped by max_tokens={sampling.max_tokens}",
        "cut": "cut short by the engine",
    }[rollout.stop]


# -- from words to objects ------------------------------------------------------------------------


def carried_by(path: str, trust_remote_code: bool) -> Carried:
    """What a model's config says of its use, without the weights."""
    folder = Path(path)
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise RecipeError(f"model={path} is a run's folder. Its model is model={folder / 'model'}.")
    if not folder.is_dir() and folder.parent != Path() and folder.parent.is_dir():
        raise RecipeError(
            f"model={path} does not exist: {folder.parent} is there, {folder.name} is not in it."
        )
    try:
        find_model(path)
    except FileNotFoundError as error:
        raise RecipeError(f"model={path}: {error}") from error
    try:
        config = load_config(path, trust_remote_code=trust_remote_code)
    except CodeRefused:
        raise
    except (OSError, ValueError) as error:
        raise _no_model(path, error) from error
    return carried(config) or Carried()


def _no_model(path: str, error: Exception) -> RecipeError:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return RecipeError(
        f"model={path} cannot be loaded: {why[:200].rstrip('.')}. Give tiny, a folder written by "
        "save_pretrained (a run's model/), or a hub name."
    )


def image_names(value: str) -> list[str]:
    """`a.png,b.png` is two images, unless a file or an address is spelled like that."""
    if is_address(value) or os.path.exists(os.path.expanduser(value)):
        return [value]
    return [name.strip() for name in value.split(",") if name.strip()]


def rows_of(given: Given) -> Dataset:
    columns: dict[str, Any] = dict(given.below("columns"))
    if images := given.all("columns.images"):
        names = [name for value in images for name in value.split(",")]
        columns["images"] = None if [name.lower() for name in names] in (["null"], ["none"]) else names
    return questions(
        os.path.expanduser(str(given.text("data"))),
        columns=Columns(**columns),
        split=given.text("split"),
        root=given.text("root"),
        max_rows=given.value("max_rows", int),
        max_bad=given.value("max_bad", float, 0.05),
    )
