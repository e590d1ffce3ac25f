"""Checks of the policy itself: its weights, its eyes, and whether engine and trainer mean the same by it.

What engine and trainer may differ by is rounding: a cache and packed rows add the same numbers up in
another order. bfloat16 has 8 bits, so a logit near 20 is known to 0.06; float16 has 11. The mean over all
tokens is held against a tighter bound than one token, because an error that is more than rounding (another
temperature, a position off by one) moves most of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.rollout.placing import special_id
from reflectvlm.train.budget import MICRO_TOKENS
from reflectvlm.train.canary import BlindPolicy, check_sight
from reflectvlm.train.checks_result import Result, Status
from reflectvlm.train.checks_subject import Subject
from reflectvlm.train.update import score_without_grad
from reflectvlm.types import Rollout, SamplingParams, Text


class Tolerance(NamedTuple):
    """Largest difference of one log-prob, and largest mean over answers that were sampled alike."""

    one: float
    mean: float


TOLERANCES = {
    "float64": Tolerance(1e-4, 1e-5),  # the engine keeps its log-probs in float32
    "float32": Tolerance(1e-3, 1e-4),
    "float16": Tolerance(0.2, 0.02),
    "bfloat16": Tolerance(1.0, 0.03),
}
_MORE_THAN_ROUNDING = {
    "float64": Tolerance(0.5, 0.1),
    "float32": Tolerance(0.5, 0.1),
    "float16": Tolerance(2.0, 0.1),
    "bfloat16": Tolerance(2.0, 0.1),
}
"""From here on a run by rewards is stopped. In between may be an engine in another dtype than the trainer, or
kernels of its own, as honest runs have; a wrong temperature moves log-probs by 0.2 on average."""
_SEEN, _SAMPLED, _EACH = 4, 2, 2
"""Prompts that are looked at, prompts that are answered, and answers to each."""
_TOKENS = 12
_SEED = 20250703


def weights(subject: Subject) -> Result:
    """Every parameter is finite. Buffers may well hold infinities: a mask of attention does."""
    module = subject.policy.module
    count = tensors = 0
    broken: list[str] = []
    for name, value in module.named_parameters():
        if not value.is_floating_point() or value.is_meta:
            continue
        count, tensors = count + value.numel(), tensors + 1
        # float8 has no operations but that it can be made another dtype.
        finite = (value if value.element_size() > 1 else value.float()).isfinite()
        if not bool(finite.all()):
            broken.append(f"{name} ({int((~finite).sum()):,} of {value.numel():,} numbers)")
    if broken:
        return Result(
            "weights",
            "failed",
            f"{len(broken)} of {tensors} tensors hold NaN or infinity, first {broken[0]}",
            f"The model in {subject.policy.source!r} is damaged, or ended in numbers that are none. "
            "Start from another one, or from an earlier checkpoint.",
        )
    return Result("weights", "ok", f"{count:,} numbers in {tensors} tensors are finite")


def sight(subject: Subject) -> Result:
    """See `canary.check_sight`."""
    prompts = subject.prompts[:_SEEN]
    if (images := [image for one in prompts for image in one.patches]) and not any(
        bool(image.pixels.any()) for image in images
    ):
        return Result("sight", "not applicable", "the images of these rows are blank")
    try:
        difference = check_sight(subject.policy, prompts)
    except BlindPolicy as error:
        return Result("sight", "failed", str(error))
    if math.isnan(difference):
        return Result("sight", "not applicable", "these rows have no images")
    return Result(
        "sight",
        "ok",
        f"blank images in place of the real ones change log-probs by up to {difference:.2g}, "
        f"on {len(prompts)} rows",
    )


def engine(subject: Subject) -> Result:
    """The engine's log-probs of a few short answers are those that the trainer computes: the first ratio
    of every update is then 1.

    Besides the run's own way to sample, one at twice the temperature: of tokens that are nearly certain no
    difference would show. And answers with inserted blocks, if re-attention can be made to insert some: with
    a trigger that the policy has just written of itself. What the run itself never asks for may be refused.
    """
    if subject.engine is None:
        return Result("engine", "not applicable", "the run samples no answers")
    own = subject.sampling
    loud = dataclasses.replace(own, temperature=2 * own.logprob_temperature)
    rollouts = _sampled(subject, own, subject.reattention)
    if any(
        not span.logprobs for one in rollouts for span in one.spans if isinstance(span, Text) and span.trained
    ):
        return _silent(subject)
    answers = [(own, rollouts)]
    refused: list[Exception] = []
    for make in (
        lambda _: subject.reattention,
        lambda made: _eager(subject.policy, subject.reattention, made),
    ):
        try:
            if (reattention := make(answers[-1][1])) is not None:
                answers.append((loud, _sampled(subject, loud, reattention)))
        except Exception as error:  # noqa: BLE001  boundary: the run does not ask for these
            refused.append(error)
    gaps = [_gap(subject, made, sampling.logprob_temperature) for sampling, made in answers]
    blocks = sum(len(one.insertions) for _, made in answers for one in made)
    result = _compared(subject, gaps, blocks)
    if not refused or result.status == "failed":
        return result
    return Result(
        "engine",
        "warning",
        f"{result.found}; what the check asks for besides raised {type(refused[0]).__name__}: {refused[0]}",
        result.remedy or f"Only sampling at temperature {own.temperature:g} was compared.",
    )


def _silent(subject: Subject) -> Result:
    found = f"{type(subject.engine).__name__} states no log-probs of its tokens"
    if subject.kind != "rl":
        return Result("engine", "not applicable", found)
    return Result(
        "engine",
        "failed",
        found,
        "Training by rewards needs them: give Text(logprobs=…) one per sampled id.",
    )


@dataclass(frozen=True, kw_only=True)
class _Gap:
    """How far engine and trainer are apart on the tokens of some answers."""

    differences: Tensor
    """Trainer's log-prob minus the engine's, per token."""
    worst: str


def _sampled(subject: Subject, sampling: SamplingParams, reattention: Reattention) -> list[Rollout]:
    prompts = list(subject.prompts[:_SAMPLED])
    sampling = dataclasses.replace(sampling, max_tokens=min(_TOKENS, sampling.max_tokens))
    assert subject.engine is not None
    groups = subject.engine.generate(prompts, _EACH, sampling, reattention, seed=_SEED)
    sizes = [len(group) for group in groups]
    if sizes != [_EACH] * len(prompts):
        raise ValueError(
            f"{type(subject.engine).__name__} was asked for {len(prompts)} groups of {_EACH} answers "
            f"and gave groups of {sizes}."
        )
    return [rollout for group in groups for rollout in group]


def _gap(subject: Subject, rollouts: Sequence[Rollout], temperature: float) -> _Gap:
    batch = subject.policy.batch([(rollout.prompt, rollout.spans) for rollout in rollouts])
    trained = batch.trained
    theirs = score_without_grad(subject.policy, batch, MICRO_TOKENS, temperature)[trained].double()
    own = batch.old_logprobs[trained].double()
    # Minus infinity on one side or both, as for a banned token, is as far apart as can be.
    differences = (theirs - own).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    if not len(differences):
        return _Gap(differences=differences, worst="")
    at = int(differences.abs().argmax())
    row, column = (int(index[at]) for index in trained.nonzero(as_tuple=True))
    token = subject.policy.decode([int(batch.ids[row, column])])
    sample = rollouts[row].prompt.sample.id
    worst = f"token {token!r} of row {sample!r}: {float(own[at]):.5f} and {float(theirs[at]):.5f}"
    return _Gap(differences=differences, worst=worst)


def _compared(subject: Subject, gaps: Sequence[_Gap], blocks: int) -> Result:
    gaps = [gap for gap in gaps if len(gap.differences)]
    if not gaps:
        return Result("engine", "not applicable", "the answers have no trained tokens")
    dtype = subject.policy.compute or str(subject.policy.model.dtype).removeprefix("torch.")
    dtype = dtype if dtype in TOLERANCES else "bfloat16"
    bound, limit = TOLERANCES[dtype], _MORE_THAN_ROUNDING[dtype]
    all_of = torch.cat([gap.differences for gap in gaps])
    largest, mean = float(all_of.abs().max()), max(float(gap.differences.abs().mean()) for gap in gaps)
    found = (
        f"log-probs of engine and trainer differ by up to {largest:.1e}, on average {mean:.1e} "
        f"(allowed in {dtype}: {bound.one:g} and {bound.mean:g}), ratios {float(all_of.min().exp()):.6g} to "
        f"{float(all_of.max().exp()):.6g}, over {len(all_of)} tokens and {blocks} inserted blocks"
    )
    if largest <= bound.one and mean <= bound.mean:
        return Result("engine", "ok", found)
    worst = max(gaps, key=lambda gap: float(gap.differences.abs().max()))
    # Nothing but training by rewards uses these numbers.
    far = largest > limit.one or mean > limit.mean
    status: Status = "failed" if far and subject.kind == "rl" else "warning"
    return Result(
        "engine",
        status,
        f"{found}; worst {worst.worst}",
        "The engine samples from another distribution than the trainer scores: temperature, positions, "
        "inserted blocks, banned ids or dtype. policy.attention=eager tells whether a kernel is to blame.",
    )


def _is_trained(span: Any) -> bool:
    return isinstance(span, Text) and span.trained and bool(span.ids)


def _eager(policy: QwenVL, reattention: Any, rollouts: Sequence[Rollout]) -> Reattention | None:
    """The same re-attention, asked for by a token that these answers hold; None if one has inserted already,
    or if it has no trigger that could be another one."""
    if reattention.trigger is None or any(rollout.insertions for rollout in rollouts):
        return None
    settings = {one.name: getattr(reattention, one.name) for one in _fields(reattention)}
    if "trigger" not in settings:
        return None
    changes: dict[str, Any] = {}
    if "place" in settings and settings["place"] == "auto":  # a block stands where the run's own would
        special = special_id(policy, reattention.trigger) is not None
        changes["place"] = "before" if special else "after"
    if settings.get("limit", 0) is None:
        changes["limit"] = 1
    for rollout in rollouts:
        for number in rollout.sampled_ids[1:-1]:
            piece = policy.decode([number])
            if not piece.strip() or "\ufffd" in piece or special_id(policy, piece) is not None:
                continue
            if piece not in str(settings.get("close") or ""):
                return dataclasses.replace(reattention, trigger=piece, **changes)
    return None


def _fields(value: object) -> tuple[dataclasses.Field[Any], ...]:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return ()
    return tuple(one for one in dataclasses.fields(value) if one.init)
