"""Do the equalities of the test suite hold on this device? For every family of models.

`test_suite`: the tests' own oracles, called with a policy on this device: float64, where a mistake of one
position is 1e-2 and what is allowed 1e-5. Stock model, stock `generate`, eager attention; decoding with
blocks, packed rows, passes of other sizes.
`rounded`: float32 without TF32, and bfloat16, in which kernels are others: every fast path against its plain
form (benchmarks/speed/gpu_checks.py, whose yardsticks these are), the head and its exact KL, flash-attn in
the tower.

Tests that are about files, processes or the CPU are left to the test suite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import gpu_checks
import torch
from gpu_checks import FLOAT32, NOISE, Check, Gaps
from torch import Tensor

from reflectvlm import ops
from reflectvlm.head import fused_scores_and_kl
from reflectvlm.models.attention_choice import flash_attn_missing
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import TinyFamily

FAMILIES: tuple[TinyFamily, ...] = get_args(TinyFamily)
Found = dict[str, Any]
Attempt = tuple[str, Callable[[], Found]]
HALF_LIMIT = 0.05
"""Of features of a tower in bfloat16, relative to their size."""


# -- the test suite's -----------------------------------------------------------------------------------


def test_suite(device: torch.device, tiny: bool) -> Iterator[Attempt]:
    """`tiny`: one family, and of each kind of question one."""
    for family in FAMILIES[-1:] if tiny else FAMILIES:
        policy = on(device, family)
        asked = list(questions(policy))
        kinds = {name.split(",")[0]: (name, call) for name, call in asked}
        for name, call in kinds.values() if tiny else asked:
            yield f"{family}: {name}", partial(holds, call)


def on(device: torch.device, family: TinyFamily) -> QwenVL:
    """The tests' own policy, float64, on this device."""
    from fixtures import favour, make_policy, uneven
    from reattending import SPECIAL

    policy = favour(uneven(make_policy(dtype=torch.float64, family=family)), [SPECIAL], 4)
    policy.module.to(device)
    return policy


def holds(call: Callable[[], float | None]) -> Found:
    """A test fails by itself; of a comparison the gap is told."""
    gap = call()
    return {} if gap is None else {"gap": gap, "ok": gap < 1e-5}


def questions(policy: QwenVL) -> Iterator[tuple[str, Callable[[], float | None]]]:
    import test_families as tests
    from test_prefix import both_ways

    for side in ("right", "left"):
        yield f"scores, padded {side}", partial(tests.test_scores_are_the_stock_models, policy, side)
    yield "COPY", partial(tests.test_copy_is_the_stock_model_shown_the_image_twice, policy)
    for name in tests.REATTENTIONS:
        yield f"rollouts, {name}", partial(tests.test_rollouts_are_the_stock_models, policy, name)
    yield "greedy", partial(tests.test_greedy_rollouts_are_those_of_generate, policy)
    yield "attention", partial(tests.test_attention_is_that_of_eager_attention, policy)
    yield (
        "blocks of a pass",
        partial(tests.test_a_pass_over_an_answer_chooses_what_decoding_chose, policy),
    )
    for kind in [kind for kind in gpu_checks.decodings(policy) if kind != "stock"]:
        for name in ("implicit", "copy", "route"):
            yield f"decode={kind}, {name}", partial(decoded, policy, kind, name)
    for packed in ("dense", "split"):
        yield f"packed, {packed}", partial(_worst, both_ways, policy, packed)
    for tokens in (4096, 150, 1):
        yield f"passes, of {tokens}", partial(tests.test_micro_batches_change_nothing, policy, tokens)


def _worst(call: Callable[..., tuple[float, ...]], *given: Any) -> float:
    return max(call(*given))


def decoded(policy: QwenVL, kind: str, name: str) -> float:
    """Rollouts by this kind of step against those by the stock forward."""
    import test_families as tests

    given, how = tests.prompts(policy)[:3], tests.REATTENTIONS[name]
    stock = tests.decoded(policy, given, "stock", how)
    return tests.decoded_difference(tests.decoded(policy, given, kind, how), stock)


# -- in the numbers that runs use -----------------------------------------------------------------------


def rounded(device: torch.device, tiny: bool) -> Iterator[Check]:
    for dtype in (torch.float32, torch.bfloat16):
        said = str(dtype)[6:]
        yield f"head and exact KL, {said}", partial(head, device, dtype)
        for family in FAMILIES[-1:] if tiny else FAMILIES:
            policy = gpu_checks.reflecting(device, dtype, family)
            for name, check in gpu_checks.the_checks(policy):
                # Flex compiles for every family and dtype; the speed run asks about it.
                if "(flex)" not in name and (not tiny or "COPY" in name):
                    yield f"{family}: {name}, {said}", check
    if device.type == "cuda" and flash_attn_missing(device) is None:
        for family in FAMILIES:
            yield f"{family}: flash-attn and sdpa in the tower", partial(tower, device, family)


def head(device: torch.device, dtype: torch.dtype, tokens: int = 300) -> Gaps:
    """Log-probs, entropies, KLs and gradients: by tiles, and all logits at once in the same dtype. In
    bfloat16 the yardstick is how far the plain way is from float32."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    hidden, theirs, weight, their_weight = (
        noise(tokens, 128),
        noise(tokens, 96),
        noise(5000, 128),
        noise(5000, 96),
    )
    hidden, theirs = hidden / 4, theirs / 4
    targets = torch.randint(0, 4900, (tokens,), generator=generator).to(device)
    sides = (hidden, weight, targets, theirs, their_weight)
    plain, fused = head_results(plain_head, *sides), head_results(fused_scores_and_kl, *sides)
    found = far(fused, plain)
    if dtype == torch.float32:
        return {name: (gap, FLOAT32) for name, gap in found.items()}
    exact = head_results(plain_head, *(one.float() if one.is_floating_point() else one for one in sides))
    noisy = far(plain, exact)
    return {name: (gap, NOISE * noisy[name] + 1e-6) for name, gap in found.items()}


def plain_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, theirs: Tensor, their_weight: Tensor, **common: Any
) -> tuple[Tensor, ...]:
    scores = ops.token_scores(hidden, weight, targets, **common)
    return *scores, ops.token_kl(hidden, weight, theirs, their_weight, **common)


def head_results(call: Callable[..., tuple[Tensor, ...]], *sides: Tensor) -> dict[str, Tensor]:
    hidden, weight = (one.clone().requires_grad_() for one in sides[:2])
    common = {"banned": list(range(4950, 5000)), "temperature": 0.7}
    logprobs, entropy, kl = call(hidden, weight, *sides[2:], **common)
    (logprobs * torch.cos(sides[2]) + kl).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    made = {"log-probs": logprobs, "entropy": entropy, "KL": kl}
    made |= {"gradient of states": hidden.grad, "gradient of head": weight.grad}
    return {name: one.detach().float() for name, one in made.items()}


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the size of each."""
    return {name: float((one[name] - value).norm() / value.norm()) for name, value in other.items()}


def tower(device: torch.device, family: TinyFamily) -> Gaps:
    """Features of a few images both ways."""
    from fixtures import make_policy, make_prompt

    policy = make_policy(gain=1.0, dtype=torch.bfloat16, family=family)
    policy.module.to(device)
    images = [make_prompt(policy, seed).patches[0] for seed in range(3)]
    with torch.no_grad():
        sdpa, flash = (
            dataclasses.replace(policy, attention=kind).features(images)
            for kind in ("sdpa", "flash_attention_2")
        )
    return {"features": (float((flash - sdpa).float().norm() / sdpa.float().norm()), HALF_LIMIT)}
