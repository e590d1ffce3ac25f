"""One row of any data, as a sample and as a prompt, or a `BadRow` that says which row it is.

Data sets and their readers may be the user's own, and so may image and tokenizer: whatever they raise is
that row's fault until too many rows have it, which is for whoever asks to judge.
"""

from __future__ import annotations

from collections.abc import Sequence

from reflectvlm.data.filtered import Dataset
from reflectvlm.data.rows import BadRow, plain
from reflectvlm.protocols import Policy
from reflectvlm.types import Instruction, Prompt, Sample


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
