"""The blindness canary: does what the policy says depend on its images at all?

Images can get lost anywhere between a data row and attention, the loss falls all the same, and the
run ends with a model that never looked. So at the start one batch is scored with its images and
with blank ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from reflectvlm.protocols import Policy
from reflectvlm.types import Patches, Prompt, Spans, Text

TOLERANCE = 1e-6
"""Log-probs that differ by less are equal: rounding of one more or less addend."""


class BlindPolicy(RuntimeError):
    """Log-probs are the same with images and with blank ones."""


def check_sight(policy: Policy, prompts: Sequence[Prompt]) -> float:
    """Largest difference of a log-prob between the images and blank ones; NaN without any image.

    Raises BlindPolicy if there is none.
    """
    shown = [prompt for prompt in prompts if prompt.patches]
    if not shown:
        return float("nan")
    blank = [dataclasses.replace(prompt, patches=_blank(prompt)) for prompt in shown]
    with torch.no_grad():
        seen, unseen = (_score(policy, each) for each in (shown, blank))
    difference = float((seen - unseen).abs().max())
    if not difference > TOLERANCE:
        raise BlindPolicy(
            f"The policy gives rows {[prompt.sample.id for prompt in shown]} the same log-probs with their "
            f"images and with blank ones (largest difference {difference:.1e}). It does not see its images: "
            "check that the checkpoint holds vision weights and that the processor fits the model."
        )
    return difference


def _score(policy: Policy, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Log-probs of the prompts' own last words, which stand behind the image."""
    sequences: list[tuple[Prompt, Spans]] = []
    for prompt in prompts:
        last = prompt.spans[-1]
        assert isinstance(last, Text)
        sequences.append((prompt, (dataclasses.replace(last, trained=True),)))
    batch = policy.batch(sequences)
    return policy.score(batch, policy.features(batch.images)).logprobs


def _blank(prompt: Prompt) -> tuple[Patches, ...]:
    return tuple(
        dataclasses.replace(image, pixels=torch.zeros_like(image.pixels)) for image in prompt.patches
    )
