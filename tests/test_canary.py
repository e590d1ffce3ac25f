"""The blindness canary: it must pass a model that sees and stop one that does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import make_policy, make_prompt
from reflectvlm.batch import Batch, TokenScores
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.train.canary import BlindPolicy, check_sight
from reflectvlm.types import Patches


@dataclasses.dataclass(frozen=True)
class Blind:
    """A policy that loses features on the way: it computes them and never uses them."""

    inner: QwenVL

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def features(self, images: Sequence[Patches]) -> Tensor:
        return torch.zeros_like(self.inner.features(images))

    def score(self, batch: Batch, features: Tensor, temperature: float = 1.0) -> TokenScores:
        return self.inner.score(batch, features, temperature)


def test_a_policy_that_sees_passes(tiny_policy: QwenVL) -> None:
    prompts = [
        make_prompt(tiny_policy, 0),
        make_prompt(tiny_policy, 1, "<image> or <image>?", ((64, 48), (32, 32))),
    ]
    assert check_sight(tiny_policy, prompts) > 1e-2


def test_a_barely_trained_policy_passes() -> None:
    """The default initialisation looks at its image, if only a little; it must not be stopped."""
    policy = make_policy(gain=1.0)
    assert check_sight(policy, [make_prompt(policy, 0)]) > 1e-4


def test_lost_features_are_noticed(tiny_policy: QwenVL) -> None:
    with pytest.raises(BlindPolicy, match=r"rows \['sample-0', 'sample-1'\] the same log-probs"):
        check_sight(Blind(tiny_policy), [make_prompt(tiny_policy, 0), make_prompt(tiny_policy, 1)])


def test_a_checkpoint_without_vision_weights_is_noticed() -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.model.model.visual.patch_embed.proj.weight.zero_()
    with pytest.raises(BlindPolicy, match="does not see its images"):
        check_sight(policy, [make_prompt(policy, 0)])


def test_log_probs_that_are_no_numbers_are_noticed() -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.model.model.visual.patch_embed.proj.weight.fill_(float("nan"))
    with pytest.raises(BlindPolicy):
        check_sight(policy, [make_prompt(policy, 0)])


def test_text_alone_says_nothing(tiny_policy: QwenVL) -> None:
    """Rows without images neither pass nor fail; beside rows with images they are left out."""
    text = make_prompt(tiny_policy, 2, "One and one?", ())
    assert math.isnan(check_sight(tiny_policy, [text]))
    assert check_sight(tiny_policy, [text, make_prompt(tiny_policy, 0)]) > 1e-2
    with pytest.raises(BlindPolicy, match=r"rows \['sample-0'\]"):
        check_sight(Blind(tiny_policy), [text, make_prompt(tiny_policy, 0)])
