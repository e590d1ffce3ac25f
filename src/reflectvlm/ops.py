"""Pure tensor functions under the losses: means with a visible denominator, KL estimators, and
log-probs and the exact KL straight from hidden states.

Nothing here knows a model, a device, a config or a log. Shapes: B rows, T tokens, K trained tokens,
D width of the model, V vocabulary (here only; elsewhere V counts visual tokens).

Left out: log-probs under tensor parallelism, where no rank holds a whole vocabulary row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOG_RATIO_LIMIT = 20.0
"""Largest log-ratio that is exponentiated: e^20 is 4.9e8, far outside every clip range and far
inside float32. Beyond it a ratio is constant and gives no gradient."""


def masked_sum(values: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Sum of `values` where `mask` holds.

    What the mask leaves out may be anything, NaN and inf too: the sum does not see it. An empty mask
    gives exactly 0 and keeps the gradient path.
    """
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(
    values: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], denominator: float
) -> Float[Tensor, ""]:
    """`masked_sum / denominator`. The denominator is the caller's, a count over the whole update, so
    that means of micro-batches add up. A count of 0 divides by 1: its sum is 0."""
    return masked_sum(values, mask) / max(denominator, 1.0)


def row_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean of each row over its own masked entries; 0 for a row without any."""
    return values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def log_ratio(numerator: Float[Tensor, "*S"], denominator: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`log p - log q` of two log-probs, at least in float32 and not larger than `LOG_RATIO_LIMIT`, so
    that its exponential is finite. There is no lower limit: exp(-1e4) is a harmless 0."""
    dtype = torch.promote_types(numerator.dtype, torch.float32)
    return (numerator.to(dtype) - denominator.to(dtype)).clamp(max=LOG_RATIO_LIMIT)


def truncated_importance(
    logprobs: Float[Tensor, "*S"], engine_logprobs: Float[Tensor, "*S"], cap: float
) -> tuple[Float[Tensor, "*S"], Float[Tensor, "*S"]]:
    """(ratio, weight): p(x) / q(x), and min(p(x) / q(x), cap), both without a gradient; p is the trainer's
    probability of a token at the time it was sampled, q that of the engine which sampled it.

    Truncated importance sampling (E. L. Ionides, "Truncated Importance Sampling", 2008), here against the
    mismatch of rollout engine and trainer (F. Yao et al., "On the Rollout-Training Mismatch in Modern RL
    Systems", NeurIPS 2025 workshop on efficient reasoning). What the cap cuts off is its bias; without it
    one token that the engine held for nearly impossible outweighs a batch.
    """
    ratio = torch.exp(log_ratio(logprobs.detach(), engine_logprobs.detach()))
    return ratio, ratio.clamp(max=cap)


def kl_k1(logprobs: Float[Tensor, "*S"], ref_logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """k1 = log p(x) - log q(x), p the policy, q the reference, x drawn from p.

    As a *value*: unbiased for the reverse KL, KL(p || q), with a high variance; can be negative.
    As a *loss*: useless, its gradient is E_p[grad log p] = 0 in expectation.
    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Float[Tensor, "*S"], ref_logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """k2 = (log p(x) - log q(x))^2 / 2, p the policy, q the reference, x drawn from p.

    As a *value*: biased for KL(p || q), low variance.
    As a *loss*: its gradient is that of the reverse KL, KL(p || q), in expectation:
    E_p[(log p - log q) grad log p].
    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Float[Tensor, "*S"], ref_logprobs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """k3 = q(x)/p(x) - 1 - log(q(x)/p(x)), p the policy, q the reference, x drawn from p.

    As a *value*: unbiased for the reverse KL, KL(p || q), low variance, never negative.
    As a *loss*, which is how GRPO (arXiv 2402.03300, eq. 4) uses it: its gradient is that of the
    *other* KL, the forward one, KL(q || p), in expectation: E_p[(1 - q/p) grad log p] = -E_q[grad log p].
    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    ratio = log_ratio(ref_logprobs, logprobs)
    return torch.expm1(ratio) - ratio


def token_scores(
    hidden: Float[Tensor, "K D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " K"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    banned: Sequence[int] | Int[Tensor, " R"] = (),
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: bool = True,
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Log-prob of each target and entropy of its distribution, never holding [K, V] logits.

        z_k = (weight hidden_k + bias) / temperature,   z_k[banned] = -inf
        logprob_k = log_softmax(z_k)[target_k],   entropy_k = -sum_v p_kv log p_kv

    More than `chunk` tokens are computed `chunk` at a time, and the backward pass computes each chunk
    again, so at most [chunk, V] numbers of a kind exist at once. The softmax is in float32 (or wider)
    whatever the inputs are, and so are both results. The entropy carries no gradient; with
    `entropy=False` it is zeros and not computed. A banned target has log-prob -inf.
    """
    check_scoring(temperature, chunk)
    forbidden = torch.as_tensor(banned, dtype=torch.long, device=hidden.device)
    if len(hidden) <= chunk:  # fits: keep the logits rather than compute them twice
        return _score_chunk(hidden, weight, bias, targets, forbidden, temperature, entropy)
    logprobs, entropies = [], []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logprob, spread = cast(
            tuple[Tensor, Tensor],
            checkpoint(
                _score_chunk,
                hidden[rows],
                weight,
                bias,
                targets[rows],
                forbidden,
                temperature,
                entropy,
                use_reentrant=False,
                preserve_rng_state=False,
            ),
        )
        logprobs.append(logprob)
        entropies.append(spread)
    return torch.cat(logprobs), torch.cat(entropies)


def token_kl(
    hidden: Float[Tensor, "K D"],
    weight: Float[Tensor, "V D"],
    ref_hidden: Float[Tensor, "K E"],
    ref_weight: Float[Tensor, "V E"],
    *,
    banned: Sequence[int] | Int[Tensor, " R"] = (),
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Float[Tensor, " K"]:
    """KL(policy || reference) of the next token, exactly, at each of K tokens:

        kl_k = sum_v p_kv (log p_kv - log q_kv)
        d kl_k / d z_kv = p_kv (log p_kv - log q_kv - kl_k) / temperature

    p and q are the softmaxes of `token_scores`, of the policy's hidden states with its head and of the
    reference's with its own, with the same banned ids and temperature for both. The reference gets no
    gradient and may have another width E. Memory is as there, for two models' logits.
    """
    check_scoring(temperature, chunk)
    check_reference(hidden, weight, ref_hidden, ref_weight)
    forbidden = torch.as_tensor(banned, dtype=torch.long, device=hidden.device)
    theirs, their_weight = ref_hidden.detach(), ref_weight.detach()
    if len(hidden) <= chunk:
        return _kl_chunk(hidden, weight, theirs, their_weight, forbidden, temperature)
    parts = [
        cast(
            Tensor,
            checkpoint(
                _kl_chunk,
                hidden[start : start + chunk],
                weight,
                theirs[start : start + chunk],
                their_weight,
                forbidden,
                temperature,
                use_reentrant=False,
                preserve_rng_state=False,
            ),
        )
        for start in range(0, len(hidden), chunk)
    ]
    return torch.cat(parts)


def check_scoring(temperature: float, chunk: int) -> None:
    """Raises ValueError for settings that no tokens can be scored with."""
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}. Log-probs need one above 0; for greedy sampling use 1."
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}. It counts tokens scored at once and must be at least 1.")


def check_reference(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> None:
    """Raises ValueError where policy and reference cannot be compared token by token, id by id."""
    if len(ref_weight) != len(weight):
        raise ValueError(
            f"The reference's head has {len(ref_weight)} rows, the policy's {len(weight)}. The KL compares "
            "two distributions over the same ids: give a reference with the policy's tokenizer and head."
        )
    if len(ref_hidden) != len(hidden):
        raise ValueError(
            f"There are hidden states of {len(ref_hidden)} tokens for the reference and of {len(hidden)} for "
            "the policy. Give those of the same trained tokens, in the same order."
        )


def _score_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    banned: Tensor,
    temperature: float,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    logprobs = _logprobs(hidden, weight, bias, banned, temperature)
    with torch.no_grad():
        # A banned id has p = 0 and log p = -inf; the clamp makes their product 0 instead of NaN.
        entropy = (
            -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)
            if wanted
            else logprobs.new_zeros(len(hidden))
        )
    return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


def _kl_chunk(
    hidden: Tensor, weight: Tensor, theirs: Tensor, their_weight: Tensor, banned: Tensor, temperature: float
) -> Tensor:
    ours = _logprobs(hidden, weight, None, banned, temperature)
    with torch.no_grad():
        other = _logprobs(theirs, their_weight, None, banned, temperature).to(ours.dtype)
    # At a banned id p = 0 and the difference of two -inf is NaN; it counts as 0, also on the way back.
    difference = (ours - other).index_fill(1, banned, 0.0)
    return (ours.exp() * difference).sum(-1)


def _logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor, temperature: float
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.index_fill_(1, banned, float("-inf")).log_softmax(-1)
