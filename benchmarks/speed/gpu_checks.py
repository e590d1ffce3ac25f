"""Is what is fast also right on this device? Every fast path against its plain form, on the tiny model.

The test suite asks the same on a CPU, more closely; here it is about kernels that only a GPU has. In bfloat16
two right ways differ, each by its own rounding, so there the yardstick is how far the plain way is from the
same weights in float32, twice. Weights are scaled up, so that a token seen wrongly shows.
"""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from reflectvlm import Digits, Implicit, InProcessEngine, Instruction, SamplingParams
from reflectvlm.batch import Batch
from reflectvlm.models.new_tags import add_tags
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import TinyFamily, random_tiny
from reflectvlm.models.tree_attention import Kind
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import VisualCopy, VisualRoute
from reflectvlm.rollout.stepping import Kind as DecodeKind
from reflectvlm.types import Rollout

TAGS = ("<REFLECTION>", "</REFLECTION>")
REATTENTIONS: dict[str, Reattention] = {
    "nothing inserted": Implicit(),
    "COPY": VisualCopy(limit=2),
    "ROUTE": VisualRoute(limit=2),
}
FLOAT32 = 1e-3
"""Largest difference of a log-prob that sums in another order may make in float32."""
NOISE = 2.0
"""In bfloat16: so many times the rounding of the plain way. Two ways that are each so far from the truth may
be twice as far from each other."""

Say = Callable[..., None]
Gaps = dict[str, tuple[float, float]]
"""Of log-probs and perhaps gradients: how far two ways are apart, and how far they may be."""
Check = tuple[str, Callable[[], Gaps]]


def all_checks(device: torch.device, say: Say) -> None:
    """Flex at the very end: it compiles, and may take whatever time is left."""
    planned = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = reflecting(device, dtype)
        planned += [(f"{name}, {str(dtype)[6:]}", check) for name, check in the_checks(policy)]
    for late in (False, True):
        for label, check in (one for one in planned if ("(flex)" in one[0]) == late):
            say_whether(label, check, say)


def say_whether(label: str, check: Callable[[], Gaps], say: Say) -> None:
    """One check, and whether it holds."""
    try:
        found = check()
        say("check", name=label, gaps=found, ok=all(gap <= most for gap, most in found.values()))
    except Exception:  # noqa: BLE001 - one path that does not run must not hide the others
        say("check", name=label, ok=False, error=traceback.format_exc()[-600:])


def reflecting(device: torch.device, dtype: torch.dtype, family: TinyFamily = "qwen2_5_vl") -> QwenVL:
    """Random weights, larger than usual, that often sample a reflection."""
    policy = random_tiny(family=family)
    ids = list(add_tags(policy.model, policy.tokenizer, TAGS))
    with torch.no_grad():
        for name, weight in policy.module.named_parameters():
            if weight.dim() >= 2 and "layers" in name:
                weight.mul_(2)
        weight = policy.model.get_output_embeddings().weight
        (newline,) = policy.tokenizer.encode("\n", add_special_tokens=False)
        weight[ids] += 9 * weight[newline]
    policy.module.to(device, dtype)
    return policy


def the_checks(policy: QwenVL) -> Iterator[Check]:
    rolled = {name: rollouts(policy, how) for name, how in REATTENTIONS.items()}
    for name in ("COPY", "ROUTE"):
        assert sum(len(one.insertions) for one in rolled[name]) > 5, f"{name} inserted next to nothing"
    for decode in decodings(policy):
        for name, how in REATTENTIONS.items():
            label = f"log-probs of rollouts ({decode}) and of the trainer, {name}"
            yield label, partial(rolled_out, policy, how, decode)
    for kind in attentions(policy):
        for name, made in rolled.items():
            yield f"packed ({kind}) and unpacked rows, {name}", partial(packing, policy, kind, made)
    yield "fused and plain head, COPY", partial(head, policy, rolled["COPY"])


def decodings(policy: QwenVL) -> tuple[DecodeKind, ...]:
    """Kinds of decoding step that this device should have."""
    return ("stock", "lean") if policy.device.type == "cpu" else ("stock", "lean", "graphs")


def attentions(policy: QwenVL) -> tuple[Kind, ...]:
    """Kinds of attention over packed rows that this device and dtype should have."""
    if policy.device.type == "cpu":
        return ("dense", "split")
    half: tuple[Kind, ...] = ("varlen",) if policy.model.dtype == torch.bfloat16 else ()
    return ("dense", "split", *half, "flex")


def rollouts(policy: QwenVL, how: Reattention, decode: DecodeKind = "stock") -> list[Rollout]:
    prompts = [policy.prompt(Digits(size=3)[number], Instruction()) for number in range(3)]
    # Few rows, so that rows end and others take their places.
    engine = InProcessEngine(policy=policy, max_rows=8, decode=decode)
    groups = engine.generate(prompts, 4, SamplingParams(max_tokens=40), how, seed=0)
    return [one for group in groups for one in group]


def batch_of(policy: QwenVL, made: list[Rollout]) -> Batch:
    return policy.batch([(one.prompt, one.spans) for one in made])


def rolled_out(policy: QwenVL, how: Reattention, decode: DecodeKind) -> Gaps:
    made = rollouts(policy, how, decode)
    batch = batch_of(policy, made)
    with torch.no_grad():
        found = policy.score(batch, policy.features(batch.images)).logprobs
    gap = apart(found[batch.trained], batch.old_logprobs[batch.trained], policy)
    return {"log-probs": (gap, limits(policy, made)["log-probs"])}


def packing(policy: QwenVL, kind: Kind, made: list[Rollout]) -> Gaps:
    plain = dataclasses.replace(policy, share_prefix=False)
    packed = dataclasses.replace(policy, share_prefix=True, prefix_attention=kind)
    return held_against(limits(policy, made), gaps(policy, learned(plain, made), learned(packed, made)))


def head(policy: QwenVL, made: list[Rollout]) -> Gaps:
    plain = learned(dataclasses.replace(policy, fused_head=False), made)
    fused = learned(dataclasses.replace(policy, fused_head=True), made)
    return held_against(limits(policy, made), gaps(policy, plain, fused))


def limits(policy: QwenVL, made: list[Rollout]) -> dict[str, float]:
    if policy.model.dtype == torch.float32:
        return {"log-probs": FLOAT32, "gradients": FLOAT32}
    plain = dataclasses.replace(policy, share_prefix=False, fused_head=False)
    exact = dataclasses.replace(plain, model=copy.deepcopy(policy.model).float())
    rounding = gaps(policy, learned(exact, made), learned(plain, made))
    return {name: NOISE * gap for name, gap in rounding.items()}


def held_against(most: dict[str, float], found: dict[str, float]) -> Gaps:
    return {name: (gap, most[name]) for name, gap in found.items()}


def learned(policy: QwenVL, made: list[Rollout]) -> tuple[Tensor, Tensor]:
    """Log-probs of the trained tokens, and the gradient of a weighted sum of them."""
    policy.module.zero_grad(set_to_none=True)
    batch = batch_of(policy, made)
    logprobs = policy.score(batch, policy.features(batch.images)).logprobs[batch.trained]
    (logprobs * torch.cos(batch.ids[batch.trained])).sum().backward()
    grads = [p.grad.float().flatten() for p in policy.module.parameters() if p.grad is not None]
    return logprobs.detach(), torch.cat(grads)


def gaps(policy: QwenVL, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Between log-probs, and between gradients relative to their size."""
    relative = float((one[1] - other[1]).norm() / one[1].norm())
    return {"log-probs": apart(one[0], other[0], policy), "gradients": relative}


def apart(one: Tensor, other: Tensor, policy: QwenVL) -> float:
    """The largest difference; in bfloat16 the mean, because the largest of many roundings is luck."""
    gap = (one.float() - other.float()).abs()
    return float(gap.max() if policy.model.dtype == torch.float32 else gap.mean())
