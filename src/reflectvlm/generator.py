"""`Generator`: a model answers questions about images the way it was trained to.

    generator = Generator.load("runs/qwen_la_copy/model")
    generator.answer("page.png", "Which digit is upper left?").text

How it looks at the image again and what it is asked beside the question stand in the model's config
(`models/carried.py`) and are used unless others are given. An answer is a `Rollout`: its text, the
blocks that were inserted, why it ended; a notebook shows all of it.

Left out: conversations of several turns, and several answers to one question (`InProcessEngine.generate`).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from reflectvlm.data.images import BadImage, ImageLimits, RowImage, load_image
from reflectvlm.data.rows import IMAGE_MARKER
from reflectvlm.models.carried import Carried, carried
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.protocols import Reattention, RolloutEngine
from reflectvlm.reattention import Implicit, check_reattention
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.types import Instruction, Prompt, Rollout, Sample, SamplingParams, Visual

if TYPE_CHECKING:
    from PIL.Image import Image

GREEDY = SamplingParams(max_tokens=1024, temperature=0.0)

Shown: TypeAlias = RowImage | Sequence[RowImage] | None
"""A path, bytes, a data URL, a web address or a PIL image; a list of them; None for no image."""


@dataclass(frozen=True, eq=False)
class Generator:
    """A policy with all that decides how it answers.

    Examples:
        Generator.load("tiny").answer("page.png", "What is the upper left digit?")
        Generator(policy, VisualCopy(trigger="<back>", limit=1)).answer(page, "Add the upper two digits.")
    """

    policy: QwenVL
    """Answers on the device where it is; `load` moves it."""
    reattention: Reattention | None = None
    """None: what the model carries, else `Implicit()`. Afterwards it is what is used."""
    instruction: Instruction | None = None
    """None: what the model carries, else none at all. Afterwards it is what is used."""
    sampling: SamplingParams = GREEDY
    engine: Callable[..., RolloutEngine] = InProcessEngine
    """Makes the engine from the policy."""
    seed: int = 0
    """Decides every random choice, where tokens are drawn at a temperature above 0."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """What an image may cost."""

    def __post_init__(self) -> None:
        if self.reattention is None or self.instruction is None:
            said = carried(self.policy.model.config) or Carried()
            if self.reattention is None:
                object.__setattr__(self, "reattention", said.reattention or Implicit())
            if self.instruction is None:
                object.__setattr__(self, "instruction", said.instruction or Instruction())
        check_reattention(self.reattention)
        if not isinstance(self.instruction, Instruction):
            raise _no_object("instruction", self.instruction, "instruction('boxed')")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] = "tiny",
        reattention: Reattention | None = None,
        instruction: Instruction | None = None,
        sampling: SamplingParams = GREEDY,
        engine: Callable[..., RolloutEngine] = InProcessEngine,
        *,
        seed: int = 0,
        limits: ImageLimits | None = None,
        device: str | None = None,
        **policy: Any,
    ) -> Generator:
        """From `"tiny"`, a folder or a hub name. `device` is by default the one that training takes;
        `policy` are further arguments of `load_policy`, e.g. `dtype="bfloat16"`."""
        where = _device(device)
        made = load_policy(os.path.expanduser(os.fspath(path)), **policy)
        made.module.to(where)
        return cls(made, reattention, instruction, sampling, engine, seed, limits or ImageLimits())

    def answer(self, image: Shown, question: str) -> Rollout:
        """The answer to one question, whole."""
        return self._generate([self.prompt(image, question)], self.seed)[0]

    def stream(self, image: Shown, question: str) -> Iterator[str | Visual | Rollout]:
        """The same answer as it comes: pieces of its text, inserted blocks, and at the end the rollout."""
        return self.stream_prompt(self.prompt(image, question))

    def answers(self, rows: Iterable[Sample], *, batch: int = 16) -> Iterator[Rollout]:
        """Answers to many samples, in their order; `batch` of them are decoded at one time."""
        if batch < 1:
            raise ValueError(f"batch is {batch}. It must be at least 1.")
        waiting = iter(rows)
        for number in itertools.count():
            samples = list(itertools.islice(waiting, batch))
            if not samples:
                return
            yield from self.batch(samples, number)

    def batch(
        self, samples: Sequence[Sample], number: int = 0, places: Sequence[int] | None = None
    ) -> list[Rollout]:
        """Answers to these samples. With another `number` other tokens are drawn. `places` are numbers of the
        samples by which chance is theirs, whatever else is in the batch; None: their places in it."""
        assert self.instruction is not None
        prompts = [self.policy.prompt(sample, self.instruction) for sample in samples]
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return self._generate(prompts, seed, places)

    def prompt(self, image: Shown, question: str) -> Prompt:
        """What the policy sees first. Raises ValueError for an image that cannot be read."""
        assert self.instruction is not None
        images = read_images(image, self.limits)
        if not images and not question.strip():
            raise ValueError("There is neither an image nor a question. Give at least one of them.")
        markers = question.count(IMAGE_MARKER)
        if markers not in (0, len(images)):
            raise ValueError(
                f"The question says {IMAGE_MARKER} {markers} times, but there are {len(images)} images. "
                "Write it once per image, or not at all to place them first."
            )
        sample = Sample(id="question", question=question, answer="", images=images)
        return self.policy.prompt(sample, self.instruction)

    def stream_prompt(self, prompt: Prompt) -> Iterator[str | Visual | Rollout]:
        """`stream` for a prompt that was made before."""
        stream = getattr(self.rollout_engine, "stream", None)
        if stream is None:
            raise ValueError(
                f"{type(self.rollout_engine).__name__} cannot tell an answer as it comes: it has no method "
                "`stream`. Call `answer`, or take InProcessEngine."
            )
        for piece in stream(prompt, self.sampling, self.reattention, seed=self.seed):
            if piece != "":
                yield piece

    @functools.cached_property
    def rollout_engine(self) -> RolloutEngine:
        return self.engine(policy=self.policy)

    def _generate(
        self, prompts: Sequence[Prompt], seed: int, places: Sequence[int] | None = None
    ) -> list[Rollout]:
        assert self.reattention is not None
        told = {} if places is None else {"places": places}
        groups = self.rollout_engine.generate(prompts, 1, self.sampling, self.reattention, seed=seed, **told)
        return [group[0] for group in groups]


def read_images(images: Shown, limits: ImageLimits | None = None) -> tuple[Image, ...]:
    """The images as upright RGB ones. Paths are taken from where the user stands."""
    if images is None:
        return ()
    several = images if isinstance(images, list | tuple) else [images]
    return tuple(_read_image(image, limits) for image in several)


def _no_object(name: str, value: object, example: str) -> ValueError:
    return ValueError(
        f"{name} is {value!r}. Give an object, e.g. {example}, or None for what the model carries."
    )


def _read_image(value: RowImage, limits: ImageLimits | None) -> Image:
    # Text in a row must not leave its folder; a path that the user names may lie anywhere.
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value and not is_address(value)):
        path = Path(os.path.expanduser(value))
        try:
            return load_image(path.name, path.parent, limits)
        except BadImage as bad:
            if bad.reason != "missing image":
                raise
            remedy = f"Check the path; it is taken from {Path.cwd()}."
            raise BadImage(bad.reason, repr(str(path)), "does not exist", remedy) from None
    return load_image(value, Path.cwd(), limits)


def is_address(text: str) -> bool:
    """Whether a text is a data URL or a web address rather than a path."""
    return text[:5].lower() == "data:" or "://" in text[:16]


def _device(name: str | None) -> torch.device:
    if name is None:
        from reflectvlm.train.runtime import Runtime

        return Runtime().device
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # how torch refuses a name or a missing device
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device is {name!r}, which cannot be used here ({why[:80]}). Leave it out, or give cpu."
        ) from error
