"""One optimiser step on one batch, for SFT and RL alike. The step knows no algorithm: the objective
turns log-probs into a loss."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from reflectvlm.batch import Batch, LossInputs, LossOutputs, ReferenceStates, TokenScores
from reflectvlm.interrupt import safe_point
from reflectvlm.protocols import Objective, Policy, Reference
from reflectvlm.train.budget import MICRO_TOKENS, image_parts, passes
from reflectvlm.train.in_step import InStep
from reflectvlm.train.precision import check_trainable_dtype
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.weights import Weights
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
    reference: Reference | None = None
    """Whom the objective's exact KL compares with; None where it has none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    skipped: list[NonFinite] = field(default_factory=list, init=False)
    """Batches left out, until somebody takes them."""

    def __post_init__(self) -> None:
        if self.micro_tokens < 1:
            raise ValueError(f"micro_tokens is {self.micro_tokens}. It must be at least 1.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite is {self.on_nonfinite!r}. It must be 'stop' or 'skip'.")
        check_trainable_dtype(self.policy.module, getattr(self.policy, "compute", None))

    @functools.cached_property
    def weights(self) -> Weights:
        """The policy's weights, spread over processes as the run's settings say."""
        return self.runtime.weights(self.policy.module, self.optimizer, max_grad_norm=self.max_grad_norm)

    @functools.cached_property
    def in_step(self) -> InStep:
        return InStep(ranks=self.runtime.ranks, policy=self.policy, on=self.weights.in_step)

    def __call__(self, batch: Batch, lr: float) -> dict[str, float]:
        module = self.policy.module.train()
        try:
            return self._step(batch, lr)
        except NonFinite as error:
            self.weights.clear()
            with self.weights.whole():
                broken = first_broken_weight(module)
            if broken is not None:
                raise NonFinite(f"Before this update the weight {broken!r}", batch) from error
            if self.on_nonfinite == "stop":
                raise
            self.skipped.append(error)
            return {"nonfinite": 1.0, "lr": lr}

    def _step(self, batch: Batch, lr: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.weights.clear()
        outputs = self._accumulate(batch)
        metrics = self._joined(outputs)
        if not math.isfinite(metrics["loss"]):
            if self.weights.in_step:
                self.weights.step()  # which it does not take, and forgets the gradients
            raise NonFinite(f"The loss ({metrics['loss']})", batch)
        norm = self.weights.step()
        if not math.isfinite(norm):
            raise NonFinite(f"The gradient norm ({norm})", batch)
        return metrics | {"grad_norm": norm, "lr": lr}

    def _joined(self, outputs: Sequence[LossOutputs]) -> dict[str, float]:
        """Metrics of the whole update: those of all passes and ranks added, and of peaks the largest."""
        own = ({}, {}) if not outputs else (_added(outputs), _largest(outputs))
        everybody = self.runtime.ranks.gather(own)
        added: dict[str, float] = {}
        largest: dict[str, float] = {}
        for sums, peaks in everybody:
            for name, value in sums.items():
                added[name] = added.get(name, 0.0) + value
            for name, value in peaks.items():
                known = largest.get(name, -math.inf)
                largest[name] = known if math.isnan(known) or value <= known else value
        return added | largest

    def _accumulate(self, batch: Batch) -> list[LossOutputs]:
        """Backward through all micro-batches. Features are computed once per image; as a leaf they
        collect the gradient of every micro-batch, which is sent back into the tower at the end."""
        run, features, in_step = self.weights.run, self.policy.features, self.weights.in_step
        parts = self.in_step.image_parts(image_parts(batch.images, self.micro_tokens))
        touched = self._touch(any(parts)) if in_step else None
        with torch.no_grad() if in_step else contextlib.nullcontext():
            first = run(functools.partial(features, parts[0]))
        tower = first.requires_grad if touched is None else touched
        shown = first
        if len(parts) > 1:
            # Many images: keep no graph now, and run the tower once more, part by part, on the way back.
            with torch.no_grad():
                others = [run(functools.partial(features, part)) for part in parts[1:]]
                shown = torch.cat([first.detach(), *others])
        leaf = shown.detach().requires_grad_(tower)
        pieces = self.in_step.passes(_passes(self.policy, batch, self.micro_tokens))
        compared = self._compared(parts)
        outputs = []
        for rows in pieces:
            safe_point()
            if rows is None:
                self.weights.backward(run(self._nothing))
            else:
                piece = batch.rows(rows)
                outputs.append(self._pass(piece, leaf, compared(piece)))
        if tower and (leaf.grad is not None or in_step):
            grads = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for number, (part, grad) in enumerate(zip(parts, _by_part(grads, parts), strict=True)):
                kept = number == 0 and not in_step
                # As a number that can be sent back like any loss; its gradient is `grad`.
                loss = (first * grad).sum() if kept else run(functools.partial(self._sent_back, part, grad))
                self.weights.backward(loss, again=True)
        if in_step:
            self._touch(any(parts), last=True)
        return outputs

    def _sent_back(self, images: Sequence[Patches], grad: Tensor) -> Tensor:
        return (self.policy.features(images) * grad).sum()

    def _touch(self, images: bool, *, last: bool = False) -> bool:
        """A pass through every layer that changes nothing, as the first and the last of an update; tells
        whether the tower trains.

        DeepSpeed overwrites its gradients in the first backward pass of an update and adds in the others, and
        with offload it sends to the host what has a gradient in the last. What is not in the first would be
        added to what is left of the update before, and what is not in the last would be lost.
        """
        kept: list[bool] = []

        def forward() -> Tensor:
            shown = self.policy.features((self.in_step.image,) if images else ())
            kept.append(shown.requires_grad)
            return self._nothing() + 0 * shown.sum()

        self.weights.backward(self.weights.run(forward), last=last)
        return kept[0]

    def _pass(self, piece: Batch, features: Tensor, reference: ReferenceStates | None) -> LossOutputs:
        """One micro-batch, forward and back."""
        kept: list[LossOutputs] = []

        def forward() -> Tensor:
            scores = self.policy.score(piece, features, self.temperature, reference=reference)
            kept.append(self.objective(loss_inputs(piece, scores.logprobs, scores.entropy, scores.kl)))
            return kept[0].loss

        self.weights.backward(self.weights.run(forward))
        return kept[0]

    def _nothing(self) -> Tensor:
        """The loss of a pass that is made up: 0, through every layer."""
        row = self.in_step.row
        scores = self.policy.score(row, self.policy.features(()), self.temperature)
        # A policy may have banned the very token: 0 times minus infinity would be no number.
        return 0 * scores.logprobs.nan_to_num(neginf=0.0).sum()

    def _compared(self, parts: Sequence[tuple[Patches, ...]]) -> Callable[[Batch], ReferenceStates | None]:
        """What the reference says about a micro-batch. Its features are computed once, here."""
        if self.reference is None:
            return lambda _: None
        return functools.partial(
            self.reference.states, features=_features_without_grad(self.reference, parts)
        )


def first_broken_weight(module: nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity. Buffers may: a mask is minus infinity."""
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and not bool(tensor.detach().isfinite().all()):
            return name
    return None


def _by_part(grad: Tensor, parts: Sequence[tuple[Patches, ...]]) -> tuple[Tensor, ...]:
    return grad.split([sum(image.grid.tokens for image in part) for part in parts])


def loss_inputs(batch: Batch, logprobs: Tensor, entropy: Tensor, kl: Tensor | None = None) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        entropy=entropy,
        advantages=batch.advantages,
        mask=batch.trained,
        num_tokens=batch.num_tokens,
        num_sequences=batch.num_sequences,
        kl=kl,
        engine_logprobs=batch.engine_logprobs,
    )


class Scorer(Protocol):
    """What a pass without gradients asks of a policy or of a reference."""

    def features(self, images: Sequence[Patches]) -> Tensor: ...
    def score(
        self, batch: Batch, features: Tensor, temperature: float = 1.0, *, entropy: bool = True
    ) -> TokenScores: ...


def score_without_grad(
    policy: Scorer,
    batch: Batch,
    micro_tokens: int,
    temperature: float,
    *,
    in_step: InStep | None = None,
    run: Callable[[Callable[[], Tensor]], Tensor] = lambda function: function(),
) -> Tensor:
    """Log-probs [B, T] of the batch's trained tokens, in passes of at most `micro_tokens` tokens.

    `in_step` and `run` are for a policy whose weights are shared among processes: `run` is its forward.
    """
    parts = image_parts(batch.images, micro_tokens)
    pieces: Sequence[Tensor | None] = _passes(policy, batch, micro_tokens)
    if in_step is not None:
        parts, pieces = in_step.image_parts(parts), in_step.passes([one for one in pieces if one is not None])
    with torch.no_grad():
        features = torch.cat([run(functools.partial(policy.features, part)) for part in parts])
        result = torch.zeros(batch.ids.shape, device=batch.ids.device)
        for which in pieces:
            if which is None:
                assert in_step is not None
                run(lambda: policy.score(in_step.row, policy.features(()), temperature).logprobs)
                continue
            piece = batch.rows(which)
            ask = functools.partial(policy.score, piece, features, temperature, entropy=False)
            scores = run(lambda ask=ask: ask().logprobs)  # type: ignore[misc]
            columns = batch.layout.rows(which.numpy()).columns
            result[which.to(result.device), columns] = torch.where(
                piece.trained, scores.to(result.dtype), 0.0
            )
        return result


def _features_without_grad(model: Scorer | Reference, parts: Sequence[tuple[Patches, ...]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.features(part) for part in parts])


def _passes(policy: Scorer, batch: Batch, micro_tokens: int) -> list[Tensor]:
    """A policy that does not say whether it runs shared prompts once is taken to run whole rows."""
    return passes(batch.layout, micro_tokens, share_prefix=getattr(policy, "share_prefix", False))


def _added(outputs: Sequence[LossOutputs]) -> dict[str, float]:
    """Loss and additive metrics, summed over micro-batches."""
    values = {"loss": torch.stack([output.loss.detach() for output in outputs]).sum()}
    values |= {name: torch.stack([o.metrics[name] for o in outputs]).sum() for name in outputs[0].metrics}
    return dict(zip(values, torch.stack([*values.values()]).double().tolist(), strict=True))


def _largest(outputs: Sequence[LossOutputs]) -> dict[str, float]:
    return {name: float(torch.stack([o.peaks[name] for o in outputs]).max()) for name in outputs[0].peaks}
