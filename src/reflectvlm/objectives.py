"""Objectives: log-probs, advantages and *global* counts -> loss and metrics.

`ClippedSurrogate` is the family around PPO's clipped surrogate (arXiv 1707.06347, eq. 7); the
functions `grpo`, `dr_grpo`, `dapo` and `gspo` are its published settings. `CrossEntropy` is SFT.
Every mean divides by a count in `LossInputs`, never by what happens to be in a micro-batch.
Left out: entropy bonus, value functions, soft gates (SAPO), clipped weights (CISPO).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reflectvlm import ops
from reflectvlm.batch import LossInputs, LossOutputs


@dataclass(frozen=True)
class KL:
    """A penalty per token that keeps the policy near a reference.

    Which divergence is *minimised* is the estimator's choice: as a loss "k3" (GRPO's) has the
    gradient of KL(reference || policy), "k2" that of KL(policy || reference). See `ops.kl_k3`.
    Both know only the sampled token. "full" is KL(policy || reference) itself, over the whole
    vocabulary (`ops.token_kl`): no noise from which token was drawn, for a forward pass of the
    reference in every pass of an update.
    """

    coefficient: float = 0.01
    estimator: Literal["k2", "k3", "full"] = "k3"

    def __post_init__(self) -> None:
        if not (0 < self.coefficient < math.inf):
            raise ValueError(
                f"KL.coefficient is {self.coefficient}. It must be above 0 and finite; "
                "for no penalty use kl=None."
            )
        if self.estimator not in ("k2", "k3", "full"):
            raise ValueError(
                f"KL.estimator is {self.estimator!r}. It must be 'k2' (gradient of the reverse KL), 'k3' "
                "(of the forward KL, as in GRPO) or 'full' (the reverse KL over the whole vocabulary); "
                "k1 as a loss has expected gradient 0."
            )

    def __call__(self, inputs: LossInputs) -> Float[Tensor, "B T"]:
        if self.estimator == "full":
            return self.coefficient * _exact(inputs)
        estimate = ops.kl_k2 if self.estimator == "k2" else ops.kl_k3
        return self.coefficient * estimate(inputs.logprobs, _reference(inputs))


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate:
    """loss_t = -min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) + KL_t, reduced over tokens.

    `ratio="token"`: w_t = p(t) / p_old(t).
    `ratio="sequence"`: w_t = (product of the row's token ratios)^(1 / its length), the same for all
    of its tokens (GSPO, arXiv 2507.18071, eq. 7).
    `dual_clip=c`: where A < 0 the loss is at most -c A (dual-clip PPO, arXiv 1912.09729; "delta" in TRL).
    `importance_cap=c`: where the engine that sampled has arithmetic of its own (`LossInputs.engine_logprobs`)
    a token's clipped surrogate is multiplied by min(p_old / p_engine, c) (`ops.truncated_importance`); KL_t
    is not. Without such an engine there is no weight, whatever c is.
    Ratios are exponentials of bounded log-ratios (`ops.LOG_RATIO_LIMIT`): never infinite, and without a
    gradient beyond the bound, where one token would outweigh all others.

    `reduce` says how tokens become one number:
      "sequence_mean"  mean over a row's tokens, then over `num_sequences`   GRPO, arXiv 2402.03300, eq. 3
      "token_mean"     sum over all tokens / `num_tokens`                    DAPO, arXiv 2503.14476, eq. 8
      "constant"       sum / (`num_sequences` * `constant`)                  Dr. GRPO, arXiv 2503.20783
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    reduce: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    constant: int | None = None
    """Only for `reduce="constant"`: the most tokens an answer can have."""
    kl: KL | None = None
    importance_cap: float | None = 2.0
    """None leaves the mismatch of engine and trainer uncorrected; it is measured all the same."""

    def __post_init__(self) -> None:
        if not (0 < self.clip_low <= 1):
            raise ValueError(
                f"ClippedSurrogate.clip_low is {self.clip_low}. Ratios are clipped at 1 - clip_low: "
                "give a value in (0, 1], e.g. 0.2."
            )
        if not (0 < self.clip_high < math.inf):
            raise ValueError(
                f"ClippedSurrogate.clip_high is {self.clip_high}. Ratios are clipped at 1 + clip_high: "
                "give a finite value above 0, e.g. 0.2."
            )
        if self.dual_clip is not None and not (1 + self.clip_high < self.dual_clip < math.inf):
            raise ValueError(
                f"ClippedSurrogate.dual_clip is {self.dual_clip}. It bounds ratios that the ordinary clip "
                f"lets pass, so it must be above 1 + clip_high = {1 + self.clip_high} and finite, e.g. 3.0, "
                "or None."
            )
        if self.importance_cap is not None and not (1 <= self.importance_cap < math.inf):
            raise ValueError(
                f"ClippedSurrogate.importance_cap is {self.importance_cap}. It bounds the ratio of the "
                "trainer's probability to the engine's, which is 1 where they agree: give a finite value of "
                "at least 1, e.g. 2.0, or None for no correction."
            )
        self._check_choices()

    def _check_choices(self) -> None:
        if self.ratio not in ("token", "sequence"):
            raise ValueError(
                f"ClippedSurrogate.ratio is {self.ratio!r}. It must be 'token' or 'sequence' (GSPO)."
            )
        if self.reduce not in ("sequence_mean", "token_mean", "constant"):
            raise ValueError(
                f"ClippedSurrogate.reduce is {self.reduce!r}. It must be 'sequence_mean', 'token_mean' or "
                "'constant'."
            )
        if self.reduce == "constant" and not (self.constant is not None and self.constant >= 1):
            raise ValueError(
                f"ClippedSurrogate.constant is {self.constant} with reduce='constant'. It must be a token "
                "count of at least 1: give the most tokens an answer can have, SamplingParams.max_tokens."
            )
        if self.reduce != "constant" and self.constant is not None:
            raise ValueError(
                f"ClippedSurrogate.constant is {self.constant} with reduce={self.reduce!r}, which does not "
                "use it. Set reduce='constant' or leave constant out."
            )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = _only_trained(inputs)
        ratios = torch.exp(ops.log_ratio(inputs.logprobs, inputs.old_logprobs))
        used = self._used_ratios(inputs, ratios)
        advantages = inputs.advantages[:, None].to(used.dtype)
        token_loss = self._surrogate(used, advantages)
        metrics = _token_metrics(inputs) | {
            "clip_fraction": _report(self._is_clipped(used, advantages), inputs),
            "ratio": _report(ratios, inputs),
        }
        # Where a token is not trained both log-probs are 0, and the ratio 1.
        peaks = {"ratio_gap": _largest((ratios.detach() - 1).abs())}
        if inputs.engine_logprobs is not None:
            cap = math.inf if self.importance_cap is None else self.importance_cap
            mismatch, weight = ops.truncated_importance(inputs.old_logprobs, inputs.engine_logprobs, cap)
            if self.importance_cap is not None:
                token_loss = token_loss * weight
            metrics |= {
                "mismatch": _report(mismatch, inputs),
                "mismatch_cut": _report(mismatch > cap, inputs),
            }
            peaks["mismatch_max"] = _largest(mismatch.masked_fill(~inputs.mask, 0.0))
        if self.kl is not None:
            token_loss = token_loss + self.kl(inputs)
        return LossOutputs(loss=self._reduced(token_loss, inputs), metrics=metrics, peaks=peaks)

    def _used_ratios(self, inputs: LossInputs, ratios: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        if self.ratio == "token":
            return ratios
        mean = ops.row_mean(inputs.logprobs - inputs.old_logprobs, inputs.mask)
        return torch.exp(ops.log_ratio(mean, torch.zeros_like(mean)))[:, None].expand_as(ratios)

    def _surrogate(
        self, ratios: Float[Tensor, "B T"], advantages: Float[Tensor, "B 1"]
    ) -> Float[Tensor, "B T"]:
        clipped = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain = torch.minimum(ratios * advantages, clipped * advantages)
        if self.dual_clip is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, self.dual_clip * advantages), gain)
        return -gain

    def _is_clipped(
        self, ratios: Float[Tensor, "B T"], advantages: Float[Tensor, "B 1"]
    ) -> Bool[Tensor, "B T"]:
        """Where a bound holds, so that the surrogate has no gradient."""
        high = (ratios > 1 + self.clip_high) & (advantages > 0)
        low = (ratios < 1 - self.clip_low) & (advantages < 0)
        dual = (ratios > (self.dual_clip or math.inf)) & (advantages < 0)
        return high | low | dual

    def _reduced(self, token_loss: Float[Tensor, "B T"], inputs: LossInputs) -> Float[Tensor, ""]:
        if self.reduce == "token_mean":
            return ops.masked_mean(token_loss, inputs.mask, inputs.num_tokens)
        if self.reduce == "sequence_mean":
            return ops.row_mean(token_loss, inputs.mask).sum() / max(inputs.num_sequences, 1.0)
        assert self.constant is not None
        return ops.masked_sum(token_loss, inputs.mask) / (max(inputs.num_sequences, 1.0) * self.constant)


@dataclass(frozen=True)
class CrossEntropy:
    """SFT: -sum of the trained tokens' log-probs / `num_tokens`. Every token weighs the same,
    whichever row and micro-batch it is in. Advantages and behaviour log-probs are not looked at."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = _only_trained(inputs)
        loss = -ops.masked_mean(inputs.logprobs, inputs.mask, inputs.num_tokens)
        return LossOutputs(loss=loss, metrics=_token_metrics(inputs))


def grpo(*, clip: float = 0.2, kl: KL | None = None) -> ClippedSurrogate:
    """GRPO (arXiv 2402.03300, eq. 3). The paper's own penalty is `KL(0.04)`; none is the default."""
    return ClippedSurrogate(clip_low=clip, clip_high=clip, reduce="sequence_mean", kl=kl)


def dr_grpo(*, max_tokens: int, clip: float = 0.2, kl: KL | None = None) -> ClippedSurrogate:
    """Dr. GRPO (arXiv 2503.20783): no weight by length. Its advantage is `GroupMean(scale="none")`."""
    return ClippedSurrogate(clip_low=clip, clip_high=clip, reduce="constant", constant=max_tokens, kl=kl)


def dapo(*, clip_low: float = 0.2, clip_high: float = 0.28, kl: KL | None = None) -> ClippedSurrogate:
    """DAPO (arXiv 2503.14476, eq. 8): a higher upper clip and a mean over tokens. Its overlong
    filtering is `ScoredGroup.without_truncated`."""
    return ClippedSurrogate(clip_low=clip_low, clip_high=clip_high, reduce="token_mean", kl=kl)


def gspo(*, clip_low: float = 3e-4, clip_high: float = 4e-4, kl: KL | None = None) -> ClippedSurrogate:
    """GSPO (arXiv 2507.18071, eq. 5): one ratio a sequence, hence its much smaller clip (sec. 5.1)."""
    return ClippedSurrogate(clip_low=clip_low, clip_high=clip_high, ratio="sequence", kl=kl)


def wants_full_kl(objective: object) -> bool:
    """True if the objective needs `LossInputs.kl`, and no log-probs of the reference."""
    return getattr(getattr(objective, "kl", None), "estimator", None) == "full"


def _only_trained(inputs: LossInputs) -> LossInputs:
    """The inputs with 0 at tokens that are not trained: garbage there must not meet an exponential,
    whose gradient would be 0 * inf."""
    ref, exact, engine = inputs.ref_logprobs, inputs.kl, inputs.engine_logprobs
    return dataclasses.replace(
        inputs,
        logprobs=inputs.logprobs.masked_fill(~inputs.mask, 0.0),
        old_logprobs=inputs.old_logprobs.masked_fill(~inputs.mask, 0.0),
        ref_logprobs=None if ref is None else ref.masked_fill(~inputs.mask, 0.0),
        kl=None if exact is None else exact.masked_fill(~inputs.mask, 0.0),
        engine_logprobs=None if engine is None else engine.masked_fill(~inputs.mask, 0.0),
    )


def _reference(inputs: LossInputs) -> Float[Tensor, "B T"]:
    if inputs.ref_logprobs is None:
        raise ValueError(
            "ref_logprobs is None, but the objective has a KL penalty. The penalty compares with a reference "
            "policy: give the trainer one, or set kl=None."
        )
    return inputs.ref_logprobs


def _exact(inputs: LossInputs) -> Float[Tensor, "B T"]:
    if inputs.kl is None:
        raise ValueError(
            "kl is None, but the objective's penalty is KL(estimator='full'). It needs the exact KL, which "
            "`Policy.score` gives with a reference's states: give the updater a reference, or take "
            "estimator='k3'."
        )
    return inputs.kl


def _token_metrics(inputs: LossInputs) -> dict[str, Tensor]:
    """Means over all trained tokens of the update. `kl` is KL(policy || reference) whatever the loss
    penalises: the exact one where it is known, else the k3 *value*, which is an unbiased estimate."""
    metrics = {"entropy": _report(inputs.entropy, inputs)}
    if inputs.kl is not None:
        metrics["kl"] = _report(inputs.kl, inputs)
    elif inputs.ref_logprobs is not None:
        metrics["kl"] = _report(ops.kl_k3(inputs.logprobs, inputs.ref_logprobs), inputs)
    return metrics


def _largest(values: Tensor) -> Float[Tensor, ""]:
    return values.amax() if values.numel() else values.sum()


def _report(values: Tensor, inputs: LossInputs) -> Float[Tensor, ""]:
    if values.dtype == torch.bool:
        values = values.float()
    return ops.masked_mean(values.detach(), inputs.mask, inputs.num_tokens)
