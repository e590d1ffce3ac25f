"""Drawing the next token: pure functions on logits.

Every random number comes from a counter, not from a generator's state: number k of rollout m of
prompt p is a function of (seed, p, m, k). So rollouts do not depend on which rows happen to be
decoded together, and a resumed run draws what the unbroken one would have.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflectvlm.types import SamplingParams


class NonFiniteLogits(RuntimeError):
    """Nothing can be drawn: the logits of a row are NaN or infinite."""

    def __init__(self, sample: str, member: int, token: int, temperature: float) -> None:
        self.sample, self.member, self.token = sample, member, token
        super().__init__(
            f"Row {sample!r}, rollout {member} of its group, token {token}: the policy's logits are NaN or "
            "infinite. A weight is (the last update may have broken it: go on from the checkpoint before), "
            "float16 overflows (use compute=bfloat16), or they do when divided by "
            f"sampling.temperature={temperature}."
        )


def uniforms(seed: int, prompt: int, member: int, count: int) -> Float[Tensor, " count"]:
    """The random numbers in [0, 1) of one rollout, one per token."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, prompt, member])))
    return torch.from_numpy(rng.random(count, dtype=np.float32))


def draw(
    logits: Float[Tensor, "B vocabulary"], uniform: Float[Tensor, " B"], params: SamplingParams
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """(ids, their log-probs). The log-probs are those before top-k, top-p and min-p cut: see
    `SamplingParams`. Inverse transform sampling: the first id whose cumulated probability exceeds
    the uniform number, so an id of probability 0 is never drawn. Of logits that hold NaN or +inf the
    log-prob is NaN, whatever the id."""
    if (scale := params.logprob_temperature) != 1:
        logits = logits / scale
    largest = logits.amax(-1, keepdim=True)
    power = (logits - largest).exp_()
    total = power.sum(-1, keepdim=True)
    greedy = params.temperature == 0
    ids = logits.argmax(-1) if greedy else _inverse(keep_likely(power, params), uniform)
    chosen = logits.gather(-1, ids[:, None])
    return ids, (chosen - largest - total.log()).squeeze(-1)


def _inverse(weights: Float[Tensor, "B vocabulary"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first id whose cumulated weight exceeds `uniform` times the sum."""
    cumulated = weights.cumsum(-1)
    target = uniform[:, None] * cumulated[:, -1:]
    ids = torch.searchsorted(cumulated, target, right=True)
    # Rounding can put the target past every id, and a parallel sum on a GPU need not be flat
    # where ids of weight 0 stand: then the likeliest id is taken.
    ids = ids.clamp_(max=weights.shape[-1] - 1)
    possible = weights.gather(-1, ids) > 0
    if weights.device.type == "cpu" and bool(possible.all()):
        return ids.squeeze(-1)  # nearly always, and the likeliest is then not looked for
    return torch.where(possible, ids, weights.argmax(-1, keepdim=True)).squeeze(-1)


def keep_likely(
    weights: Float[Tensor, "B vocabulary"], params: SamplingParams
) -> Float[Tensor, "B vocabulary"]:
    """Probabilities, or multiples of them, with those that top-k, top-p or min-p drop at 0.

    Each cut looks at the whole distribution: top-k keeps the k likeliest (ties with the k-th stay),
    top-p the smallest set of likeliest ids whose sum reaches p, min-p those with at least min_p
    times the probability of the likeliest. The likeliest id always stays.
    """
    if not (params.min_p or params.top_k or params.top_p < 1):
        return weights
    keep = torch.ones_like(weights, dtype=torch.bool)
    if params.min_p:
        keep &= weights >= params.min_p * weights.amax(-1, keepdim=True)
    if 0 < params.top_k < weights.shape[-1]:
        keep &= weights >= weights.topk(params.top_k).values[:, -1:]
    if params.top_p < 1:
        ordered, index = weights.sort(descending=True, dim=-1)
        inside = ordered.cumsum(-1) - ordered < params.top_p * weights.sum(-1, keepdim=True)
        keep &= torch.zeros_like(keep).scatter(-1, index, inside)
    return weights * keep
