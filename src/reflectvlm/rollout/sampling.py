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
    logprobs = torch.log_softmax(logits / params.logprob_temperature, dim=-1)
    if params.temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        kept = keep_likely(logprobs.exp(), params)
        cumulated = kept.cumsum(-1)
        target = (uniform * cumulated[:, -1])[:, None]
        ids = torch.searchsorted(cumulated, target, right=True).squeeze(-1)
        # Rounding can put the target past every id, and a parallel sum on a GPU need not be flat
        # where ids of probability 0 stand: then the likeliest id is taken.
        ids = ids.clamp(max=logits.shape[-1] - 1)
        possible = kept.gather(-1, ids[:, None]).squeeze(-1) > 0
        ids = torch.where(possible, ids, kept.argmax(-1))
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


def keep_likely(
    probs: Float[Tensor, "B vocabulary"], params: SamplingParams
) -> Float[Tensor, "B vocabulary"]:
    """Probabilities with those that top-k, top-p or min-p drop at 0, not renormalised.

    Each cut looks at the whole distribution: top-k keeps the k likeliest (ties with the k-th stay),
    top-p the smallest set of likeliest ids whose sum reaches p, min-p those with at least min_p
    times the probability of the likeliest. The likeliest id always stays.
    """
    keep = torch.ones_like(probs, dtype=torch.bool)
    if params.min_p:
        keep &= probs >= params.min_p * probs.amax(-1, keepdim=True)
    if 0 < params.top_k < probs.shape[-1]:
        keep &= probs >= probs.topk(params.top_k).values[:, -1:]
    if params.top_p < 1:
        ordered, index = probs.sort(descending=True, dim=-1)
        inside = ordered.cumsum(-1) - ordered < params.top_p
        keep &= torch.zeros_like(keep).scatter(-1, index, inside)
    return probs * keep
