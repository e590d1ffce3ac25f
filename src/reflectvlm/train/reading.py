"""One row of any data, as a sample and as a prompt, or a `BadRow` that says which row it is.

Data sets and their readers may be the user's own, and so may image and tokenizer: whatever they raise is
that row's fault until too many rows have it, which is for whoever asks to judge.

`RowReader` is all of it for a position, and nothing in it is state: it may work in any process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reflectvlm.data.filtered import Dataset
from reflectvlm.data.rows import BadRow, plain
from reflectvlm.data.shorten import shortened
from reflectvlm.models.chat import chat_spans
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Policy
from reflectvlm.spans import count_tokens
from reflectvlm.train.cursor import place_at
from reflectvlm.train.row_rules import Item
from reflectvlm.types import Instruction, Prompt, Sample, Spans


class Read(NamedTuple):
    """What a position holds."""

    item: Item
    whole: Item | None = None
    """The row before its question was shortened."""
    too_long: str | None = None
    """If it is above the limit: a remedy, or nothing for the usual one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowReader:
    """The row at a position, as prompt and gold answer. Raises BadRow."""

    data: Sequence[Sample]
    policy: QwenVL
    seed: int
    limit: int
    """Most tokens of prompt and answer."""
    limit_name: str
    shorten: bool
    """Cut a question that is too long."""
    instruction: Callable[[int], Instruction]
    """That of a position."""
    answer: Callable[[QwenVL, Sample], Spans]
    """A row's gold answer; raises BadRow if it has none."""

    def __call__(self, position: int) -> Read:
        sample = read_sample(self.data, place_at(len(self.data), position, self.seed))
        instruction = self.instruction(position)
        answer = self.answer(self.policy, sample)
        prompt = read_prompt(self.policy, sample, instruction)
        if self.fits(prompt, answer):
            return Read((prompt, answer))
        if not self.shorten:
            return Read((prompt, answer), too_long="")
        short = self._shortened(prompt, answer, instruction)
        if short is None:
            remedy = (
                f"It stays too long however its text is cut. Raise {self.limit_name} or lower "
                "policy.max_pixels; row_rules.on_bad=skip leaves it out."
            )
            return Read((prompt, answer), too_long=remedy)
        return Read((short, answer), whole=(prompt, answer))

    def fits(self, prompt: Prompt, answer: Spans) -> bool:
        return count_tokens(prompt.spans + answer, prompt.grids) <= self.limit

    def for_workers(self) -> RowReader:
        """The same, without the policy's weights."""
        return dataclasses.replace(self, policy=self.policy.for_reading())

    @property
    def parts(self) -> Mapping[str, Any]:
        """What has to travel to another process, under the names a user knows."""
        return {
            "data": self.data,
            "the tokenizer": self.policy.tokenizer,
            "the image processor": self.policy.image_processor,
            "instruction": self.instruction,
        }

    def _shortened(self, prompt: Prompt, answer: Spans, instruction: Instruction) -> Prompt | None:
        def asking(question: str) -> Prompt:
            sample = dataclasses.replace(prompt.sample, question=question)
            spans = chat_spans(self.policy.tokenizer, self.policy.vision, sample, instruction)
            return dataclasses.replace(prompt, sample=sample, spans=spans)

        images = len(prompt.sample.images)
        text = shortened(prompt.sample.question, images, lambda text: self.fits(asking(text), answer))
        return None if text is None else asking(text)


@dataclass(frozen=True, eq=False)
class InTurn:
    """The rows of one process among `world`: number k is position k * world + rank."""

    read: RowReader
    rank: int
    world: int

    def __call__(self, turn: int) -> Read:
        return self.read(turn * self.world + self.rank)

    @property
    def parts(self) -> Mapping[str, Any]:
        return self.read.parts


def read_sample(data: Sequence[Sample], place: int) -> Sample:
    """`data[place]`. Raises BadRow."""
    try:
        return data[place]
    except BadRow:
        raise
    except Exception as error:
        if isinstance(data, Dataset):  # says itself which of its errors are a row's, and which a file's
            raise
        raise BadRow(
            f"row {place} of the data", "", "row cannot be read", "Repair or remove it.",
            f"It cannot be read: {_told(error)}",
        ) from error  # fmt: skip


def read_prompt(policy: Policy, sample: Sample, instruction: Instruction) -> Prompt:
    """The sample as the policy sees it. Raises BadRow."""
    try:
        return policy.prompt(sample, instruction)
    except Exception as error:  # what tokenizer and image processor make of odd rows
        detail = f"It cannot be shown to the policy: {_told(error)}"
        raise BadRow(sample.id, "", "row cannot be shown", "Repair or remove it.", detail) from error


def _told(error: Exception) -> str:
    return plain(f"{type(error).__name__}: {error}".rstrip(".")) + "."
