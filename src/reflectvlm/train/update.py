"""One optimiser step on one batch, for SFT and RL alike. The step knows no algorithm: the objective
turns log-probs into a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from reflectvlm.batch import Batch, LossInputs, LossOutputs, TokenScores
from reflectvlm.interrupt import committed, safe_point
from reflectvlm.protocols import Objective, Policy
from reflectvlm.train.budget import MICRO_TOKENS, image_parts, passes
from reflectvlm.train.precision import check_trainable_dtype
from reflectvlm.train.runtime import Runtime
from reflectvlm.types import Patches


class NonFinite(RuntimeError):
    """Loss, gradient or a weight is NaN or infinite. Raised before the optimiser has stepped."""

    def __init__(self, what: str, batch: Batch) -> None:
        self.what, self.batch = what, batch
        super().__init__(
            f"{what} is not finite; the weights are those from before this update. "
            "Lower the learning rate, or look at the saved batch."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Updater:
    """Policy, objective and optimiser: `updater(batch, lr)` takes one step and returns its metrics.

    Raises NonFinite, with the weights and moments as they were, or with `on_nonfinite="skip"` leaves the
    batch out and keeps it in `skipped` for whoever counts and dumps. Weights that are no numbers already
    are always an error: no further batch can mend them.
    """

    policy: Policy
    objective: Objective
    optimizer: torch.optim.Optimizer
    runtime: Runtime
    max_grad_norm: float
    micro_tokens: int = MICRO_TOKENS
    """Most tokens of one pass, padding included, and most visual tokens of one pass of the vision tower
    (`budget.py`); bounds memory and changes no result."""
    temperature: float = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    skipped: list[NonFinite] = field(default_factory=list, init=False)
    """Batches left out, until somebody takes them."""

    def __post_init__(self) -> None:
        if self.micro_tokens < 1:
            raise ValueError(f"micro_tokens is {self.micro_tokens}. It must be at least 1.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite is {self.on_nonfinite!r}. It must be 'stop' or 'skip'.")
        check_trainable_dtype(self.policy.module, getattr(self.policy, "compute", None))

    def __call__(self, batch: Batch, lr: float) -> dict[str, float]:
        module = self.policy.module.train()
        try:
            return self._step(module, batch, lr)
        except NonFinite as error:
            self.optimizer.zero_grad(set_to_none=True)
            if (name := first_broken_weight(module)) is not None:
                raise NonFinite(f"Before this update the weight {name!r}", batch) from error
            if self.on_nonfinite == "stop":
                raise
            self.skipped.append(error)
            return {"nonfinite": 1.0, "lr": lr}

    def _step(self, module: nn.Module, batch: Batch, lr: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self._accumulate(batch)
        metrics = self.runtime.sum(_added(outputs)) | _largest(outputs)
        if not torch.tensor(metrics["loss"]).isfinite():
            raise NonFinite(f"The loss ({metrics['loss']})", batch)
        norm = self.runtime.clip(module, self.max_grad_norm)
        if not torch.tensor(norm).isfinite():
            raise NonFinite(f"The gradient norm ({norm})", batch)
        committed()
        self.optimizer.step()
        return metrics | {"grad_norm": norm, "lr": lr}

    def _accumulate(self, batch: Batch) -> list[LossOutputs]:
        """Backward through all micro-batches. Features are computed once per image; as a leaf they
        collect the gradient of every micro-batch, which is sent back into the tower at the end."""
        parts = image_parts(batch.images, self.micro_tokens)
        first = self.policy.features(parts[0])
        if len(parts) == 1:
            features = first
        else:
            # Many images: keep no graph now, and run the tower once more, part by part, on the way back.
            with torch.no_grad():
                features = torch.cat([first.detach(), *(self.policy.features(part) for part in parts[1:])])
        leaf = features.detach().requires_grad_(first.requires_grad)
        outputs = []
        for piece in batch.split(_passes(self.policy, batch, self.micro_tokens)):
            safe_point()
            scores = self.policy.score(piece, leaf, self.temperature)
            outputs.append(self.objective(loss_inputs(piece, scores.logprobs, scores.entropy)))
            self.runtime.backward(outputs[-1].loss)
        if leaf.grad is not None:
            for number, (part, grad) in enumerate(zip(parts, _by_part(leaf.grad, parts), strict=True)):
                (first if number == 0 else self.policy.features(part)).backward(grad)
        return outputs


def first_broken_weight(module: nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity. Buffers may: a mask is minus infinity."""
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and not bool(tensor.detach().isfinite().all()):
            return name
    return None


def _by_part(grad: Tensor, parts: Sequence[tuple[Patches, ...]]) -> tuple[Tensor, ...]:
    return grad.split([sum(image.grid.tokens for image in part) for part in parts])


def loss_inputs(batch: Batch, logprobs: Tensor, entropy: Tensor) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropy=entropy,
        advantages=batch.advantages,
        mask=batch.trained,
        num_tokens=batch.num_tokens,
        num_sequences=batch.num_sequences,
    )


class Scorer(Protocol):
    """What a pass without gradients asks of a policy or of a reference."""

    def features(self, images: Sequence[Patches]) -> Tensor: ...
    def score(self, batch: Batch, features: Tensor, temperature: float = 1.0) -> TokenScores: ...


def score_without_grad(policy: Scorer, batch: Batch, micro_tokens: int, temperature: float) -> Tensor:
    """Log-probs [B, T] of the batch's trained tokens, in passes of at most `micro_tokens` tokens."""
    with torch.no_grad():
        features = torch.cat([policy.features(part) for part in image_parts(batch.images, micro_tokens)])
        result = torch.zeros(batch.ids.shape, device=batch.ids.device)
        for which in _passes(policy, batch, micro_tokens):
            piece = batch.rows(which)
            scores = policy.score(piece, features, temperature).logprobs.to(result.dtype)
            columns = batch.layout.rows(which.numpy()).columns
            result[which.to(result.device), columns] = torch.where(piece.trained, scores, 0.0)
        return result


def _passes(policy: Scorer, batch: Batch, micro_tokens: int) -> list[Tensor]:
    """A policy that does not say whether it runs shared prompts once is taken to run whole rows."""
    return passes(batch.layout, micro_tokens, share_prefix=getattr(policy, "share_prefix", False))


def _added(outputs: Sequence[LossOutputs]) -> dict[str, Tensor]:
    """Loss and additive metrics, summed over micro-batches."""
    loss = {"loss": torch.stack([output.loss.detach() for output in outputs]).sum()}
    return loss | {name: torch.stack([o.metrics[name] for o in outputs]).sum() for name in outputs[0].metrics}


def _largest(outputs: Sequence[LossOutputs]) -> dict[str, float]:
    return {name: float(torch.stack([o.peaks[name] for o in outputs]).max()) for name in outputs[0].peaks}
