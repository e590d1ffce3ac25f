"""The exact KL to a reference: its definition (`ops.token_kl`), and the same by tiles of the vocabulary."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reflectvlm import head, ops

VOCABULARY, WIDTH, THEIR_WIDTH = 23, 5, 3
EXACT, ROUNDED = 1e-12, 2e-5


class Inputs:
    """Both models' hidden states and heads, of different widths, so that nothing fits where it should not;
    targets that are never banned; a gradient for each log-prob and each KL. Logits are a few units apart."""

    def __init__(self, tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(100 * seed + tokens)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = 2 * noise(tokens, WIDTH), noise(VOCABULARY, WIDTH)
        self.theirs, self.their_weight = 2 * noise(tokens, THEIR_WIDTH), noise(VOCABULARY, THEIR_WIDTH)
        self.targets = torch.randint(0, 12, (tokens,), generator=generator)
        self.upstream, self.pull = noise(tokens), noise(tokens)

    def plain(self, **common: Any) -> list[Tensor]:
        def scored(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            scores = ops.token_scores(hidden, weight, self.targets, **common)
            return *scores, ops.token_kl(hidden, weight, self.theirs, self.their_weight, **common)

        return self._both_ways(scored)

    def fused(self, **common: Any) -> list[Tensor]:
        def scored(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return head.fused_scores_and_kl(
                hidden, weight, self.targets, self.theirs, self.their_weight, **common
            )

        return self._both_ways(scored)

    def _both_ways(self, scored: Any) -> list[Tensor]:
        """Log-probs, entropies, KLs, and the gradients of hidden states and head."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        logprobs, entropy, kl = scored(hidden, weight)
        (logprobs * self.upstream + kl * self.pull).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return [logprobs.detach(), entropy, kl.detach(), hidden.grad, weight.grad]


def farthest(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference, relative to what is above 1; NaN if there is one anywhere."""
    gaps = [
        (a - b).abs().max().double() / b.abs().max().clamp(min=1.0)
        for a, b in zip(one, other, strict=True)
        if b.numel()
    ]
    return float(torch.stack(gaps).max()) if gaps else 0.0


def by_hand(inputs: Inputs, temperature: float, banned: list[int]) -> tuple[Tensor, Tensor]:
    """KL and its gradient with respect to the logits, in float64, from the two formulas."""
    keep = torch.ones(VOCABULARY, dtype=torch.bool)
    keep[banned] = False
    ours, theirs = (
        ((hidden.double() @ weight.double().T) / temperature)[:, keep].log_softmax(-1)
        for hidden, weight in ((inputs.hidden, inputs.weight), (inputs.theirs, inputs.their_weight))
    )
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    gradient = torch.zeros(len(ours), VOCABULARY, dtype=torch.float64)
    gradient[:, keep] = ours.exp() * (ours - theirs - kl[:, None]) / temperature
    return kl, gradient


SIZES = {
    "tokens": st.integers(0, 7),
    "chunk": st.integers(1, 9),
    "temperature": st.sampled_from([0.7, 1.0, 1.5]),
    "banned": st.sets(st.integers(12, VOCABULARY - 1), max_size=VOCABULARY - 12),
}


@settings(deadline=None, max_examples=50)
@given(**SIZES)
def test_the_plain_kl_is_the_formula(tokens: int, chunk: int, temperature: float, banned: set[int]) -> None:
    """Bug: the other divergence, a temperature that scales only one side or only one way, a banned id whose
    0 * (-inf + inf) becomes NaN, a chunk's edge."""
    inputs = Inputs(tokens)
    expected, slope = by_hand(inputs, temperature, sorted(banned))
    inputs.upstream.zero_()
    _, _, kl, to_hidden, to_weight = inputs.plain(chunk=chunk, temperature=temperature, banned=sorted(banned))
    slope = slope * inputs.pull[:, None]
    wanted = [expected, slope @ inputs.weight, slope.T @ inputs.hidden]
    assert farthest([kl, to_hidden, to_weight], wanted) < EXACT


@settings(deadline=None, max_examples=80)
@given(
    **SIZES,
    tile=st.integers(1, VOCABULARY + 2),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    entropy=st.booleans(),
)
def test_tiles_equal_the_plain_computation(
    tokens: int,
    chunk: int,
    temperature: float,
    banned: set[int],
    tile: int,
    dtype: torch.dtype,
    entropy: bool,
) -> None:
    """Bug: an edge of a tile or chunk off by one, one model's maximum used for the other, a ban or a
    temperature lost on one of the two ways, kept logits that are handed back in another order."""
    inputs = Inputs(tokens, dtype)
    common = {"temperature": temperature, "banned": sorted(banned), "entropy": entropy}
    kl_settings = {name: value for name, value in common.items() if name != "entropy"}
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    logprobs, spread = ops.token_scores(hidden, weight, inputs.targets, **common)
    kl = ops.token_kl(hidden, weight, inputs.theirs, inputs.their_weight, **kl_settings)
    (logprobs * inputs.upstream + kl * inputs.pull).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    plain = [logprobs.detach(), spread, kl.detach(), hidden.grad, weight.grad]
    limit = EXACT if dtype == torch.float64 else ROUNDED
    assert farthest(inputs.fused(chunk=chunk, tile=tile, **common), plain) < limit


@pytest.mark.parametrize("chunk", [2, 9])
def test_gradients_are_the_differences(chunk: int) -> None:
    """Bug: a gradient that both implementations share and that is wrong."""
    inputs, step = Inputs(3), 1e-6
    common: dict[str, Any] = {"banned": [20], "temperature": 0.8, "tile": 4, "chunk": chunk}

    def total() -> float:
        logprobs, _, kl, _, _ = inputs.fused(**common)
        return float((logprobs * inputs.upstream + kl * inputs.pull).sum())

    gradients = inputs.fused(**common)[3:]
    for leaf, gradient in zip((inputs.hidden, inputs.weight), gradients, strict=True):
        for place in range(0, leaf.numel(), 2):
            values = leaf.view(-1)
            kept = float(values[place])
            around = []
            for moved in (kept + step, kept - step):
                values[place] = moved
                around.append(total())
            values[place] = kept
            assert (around[0] - around[1]) / (2 * step) == pytest.approx(
                float(gradient.view(-1)[place]), abs=1e-7
            )


def test_scores_beside_the_kl_are_those_without_it() -> None:
    """Bug: the comparison with a reference overwriting logits that the entropy still needs."""
    inputs = Inputs(6, torch.float32)
    common: dict[str, Any] = {"tile": 4, "banned": [20], "temperature": 0.7}
    for chunk in (2, 9):
        for wanted in (True, False):
            with_it = head.fused_scores_and_kl(
                inputs.hidden, inputs.weight.clone().requires_grad_(), inputs.targets,
                inputs.theirs, inputs.their_weight, chunk=chunk, entropy=wanted, **common,
            )  # fmt: skip
            without = head.fused_token_scores(
                inputs.hidden, inputs.weight, inputs.targets, chunk=chunk, entropy=wanted, **common
            )
            assert torch.equal(with_it[0], without[0])
            assert torch.equal(with_it[1], without[1])


def _without_their_normaliser(self: head._Online) -> tuple[Tensor, Tensor]:
    apart, kl = _COMPARED(self)
    return apart, kl - (self.their_largest - self.largest)


def _sum_of_the_last_tile(self: head._Online, logits: Tensor) -> None:
    self.their_sum = torch.zeros_like(self.their_sum)
    _THEIRS(self, logits)


def _maximum_not_carried(self: head._Online, piece: Any, sweep: Any, *, keep: bool) -> None:
    before, largest = self.apart, self.largest
    _TAKE(self, piece, sweep, keep=keep)
    shrink = (largest - self.largest).exp()
    self.apart = self.apart + before * (1 - shrink)


def _not_centred(logits: Tensor, theirs: Tensor, _: Tensor) -> Tensor:
    return torch.sub(logits, theirs, out=theirs)


def _turned_round(logits: Tensor, theirs: Tensor, apart: Tensor) -> Tensor:
    return theirs.sub_(logits).sub_(apart[:, None])


_COMPARED, _THEIRS, _TAKE = head._Online.compared, head._Online._take_theirs, head._Online.take
MISTAKES = [
    (head._Online, "compared", _without_their_normaliser),
    (head._Online, "_take_theirs", _sum_of_the_last_tile),
    (head._Online, "take", _maximum_not_carried),
    (head, "_farther", _not_centred),
    (head, "_farther", _turned_round),
]


@pytest.mark.parametrize("chunk", [2, 9])
@pytest.mark.parametrize(("owner", "name", "wrong"), MISTAKES, ids=lambda it: getattr(it, "__name__", ""))
def test_the_comparison_notices_mistakes(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any, chunk: int
) -> None:
    """Bug: a comparison that also passes for a normaliser left out, sums of different maxima, a gradient that
    is not centred or that pushes away from the reference."""
    inputs = Inputs(6)
    plain = inputs.plain()
    assert farthest(inputs.fused(tile=4, chunk=chunk), plain) < EXACT
    monkeypatch.setattr(owner, name, wrong)
    assert farthest(inputs.fused(tile=4, chunk=chunk), plain) > 1e-2


@pytest.mark.parametrize("chunk", [2, 9])
def test_the_same_model_is_exactly_at_no_distance(chunk: int) -> None:
    """Bug: rounding of two normalisers that pulls or pushes a policy which has not moved yet."""
    inputs = Inputs(5, torch.float32)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    _, _, kl = head.fused_scores_and_kl(
        hidden, weight, inputs.targets, inputs.hidden, inputs.weight.clone(), tile=4, chunk=chunk
    )
    kl.sum().backward()
    assert not kl.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_small_kl_keeps_its_digits() -> None:
    """Bug: the KL of a policy that has hardly moved drowning in the rounding of two normalisers, which near
    40 is up to 4e-6 each."""
    inputs = Inputs(40, torch.float32)
    noise = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))
    hidden, ours, theirs = 4 * inputs.hidden, inputs.weight, inputs.weight + 1e-4 * noise
    exact = ops.token_kl(hidden.double(), ours.double(), hidden.double(), theirs.double())
    _, _, tiled = head.fused_scores_and_kl(hidden, ours, inputs.targets, hidden, theirs, tile=4)
    assert 1e-8 < exact.mean() < 1e-5
    ours, theirs = hidden @ ours.T, hidden @ theirs.T
    apart = (ours.softmax(-1) * (ours - theirs)).sum(-1)
    assert (apart + theirs.logsumexp(-1) - ours.logsumexp(-1) - exact).abs().max() > 1e-6
    assert (tiled - exact).abs().max() < 3e-7


def test_autocast_gives_what_the_plain_way_gives() -> None:
    """Bug: one of the two models multiplied in float32 under autocast, or a softmax in bfloat16."""
    inputs = Inputs(6, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, plain = inputs.fused(tile=4), inputs.plain()
    assert all(each.dtype == torch.float32 for each in (*fused, *plain))
    assert farthest(fused[:3], plain[:3]) < 1e-5
    assert farthest(fused[3:], plain[3:]) < 0.05  # bfloat16 has 8 bits; values are near 3
    exact = inputs.plain()
    assert farthest(plain[:3], exact[:3]) > 1e-3


@pytest.mark.parametrize("policy", [torch.float32, torch.float64])
def test_a_reference_in_another_dtype_is_multiplied_in_its_own(policy: torch.dtype) -> None:
    """Bug: a bfloat16 reference beside float32 weights (`policy.compute`) that raises, or that is softmaxed
    in bfloat16."""
    inputs = Inputs(4, policy)
    inputs.theirs, inputs.their_weight = inputs.theirs.bfloat16(), inputs.their_weight.bfloat16()
    fused, plain = inputs.fused(tile=4), inputs.plain()
    assert fused[2].dtype == plain[2].dtype == policy
    assert farthest(fused, plain) < ROUNDED


def test_nothing_goes_back_to_the_reference() -> None:
    """Bug: a reference whose weights were left trainable collecting a gradient, or its graph kept."""
    inputs = Inputs(4)
    theirs, their_weight = inputs.theirs.requires_grad_(), inputs.their_weight.requires_grad_()
    inputs.fused(tile=4)
    inputs.plain(chunk=2)
    assert theirs.grad is None
    assert their_weight.grad is None


def test_a_banned_target_does_not_hide_the_kl() -> None:
    """Bug: the -inf of an impossible target reaching the KL of its token."""
    inputs = Inputs(3)
    inputs.targets[1] = 20
    hidden = inputs.hidden.clone().requires_grad_()
    logprobs, _, kl = head.fused_scores_and_kl(
        hidden, inputs.weight, inputs.targets, inputs.theirs, inputs.their_weight, banned=[20], tile=4
    )
    assert logprobs[1] == -math.inf
    expected, _ = by_hand(inputs, 1.0, [20])
    assert farthest([kl.detach()], [expected]) < EXACT


@pytest.mark.parametrize("tile", [2, VOCABULARY])
def test_tiles_that_are_banned_as_a_whole_are_empty(tile: int) -> None:
    """Bug: the finite stand-in of a banned logit taking part in the sums before a possible id came."""
    inputs = Inputs(3)
    banned = [v for v in range(VOCABULARY) if v not in (21, 22)]
    _, _, kl = head.fused_scores_and_kl(
        inputs.hidden, inputs.weight, torch.tensor([22] * 3), inputs.theirs, inputs.their_weight,
        banned=banned, tile=tile,
    )  # fmt: skip
    assert farthest([kl], [by_hand(inputs, 1.0, banned)[0]]) < EXACT


def test_certainty_stays_finite() -> None:
    """Bug: e^(z - y) or 0 * inf where one model is sure of what the other calls impossible."""
    inputs = Inputs(3, torch.float32)
    inputs.hidden *= 1e4
    inputs.theirs *= -1e4
    fused, plain = inputs.fused(tile=4), inputs.plain()
    assert all(bool(each.isfinite().all()) for each in (*fused, *plain))
    assert fused[2].min() > 1e3
    assert farthest(fused, plain) < ROUNDED


@pytest.mark.parametrize("side", ["hidden", "theirs"])
def test_numbers_that_are_none_stay_visible(side: str) -> None:
    """Bug: a NaN of either model turned into a finite KL by the sweep's maximum."""
    inputs = Inputs(3)
    getattr(inputs, side)[1, 0] = math.nan
    _, _, kl = head.fused_scores_and_kl(
        inputs.hidden, inputs.weight, inputs.targets, inputs.theirs, inputs.their_weight, tile=4
    )
    assert kl.isnan().tolist() == [False, True, False]


def test_a_second_way_back_is_refused() -> None:
    """Bug: gradients of a second backward pass made from logits that the first has overwritten."""
    inputs = Inputs(6)
    _, _, kl = head.fused_scores_and_kl(
        inputs.hidden.requires_grad_(), inputs.weight, inputs.targets, inputs.theirs, inputs.their_weight
    )
    kl.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.sum().backward()


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    """Bug: a [V, D] gradient made for a head that does not train, as with LoRA."""
    inputs = Inputs(6)
    hidden = inputs.hidden.clone().requires_grad_()
    with _Made() as seen:
        logprobs, _, kl = head.fused_scores_and_kl(
            hidden, inputs.weight, inputs.targets, inputs.theirs, inputs.their_weight, tile=4
        )
        (logprobs * inputs.upstream + kl * inputs.pull).sum().backward()
    assert (VOCABULARY, WIDTH) not in seen.shapes
    assert (VOCABULARY, THEIR_WIDTH) not in seen.shapes
    assert hidden.grad is not None
    assert farthest([hidden.grad], inputs.plain()[3:4]) < EXACT


@pytest.mark.parametrize("chunk", [2, 1000])
def test_no_more_logits_at_once_than_tiles_of_a_chunk(chunk: int) -> None:
    """Bug: memory that grows with tokens times vocabulary. A tile lives for the policy, the reference and
    its difference, powers and slope, whatever the number of tiles; kept ones are of `chunk` tokens."""
    inputs, tokens = Inputs(12), 12
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    with _Made() as seen:
        logprobs, _, kl = head.fused_scores_and_kl(
            hidden, weight, inputs.targets, inputs.theirs, inputs.their_weight, chunk=chunk, tile=4
        )
        (logprobs + kl).sum().backward()
    logits = [shape for shape in seen.shapes if shape[1:] == (4,)]
    assert max(shape[0] for shape in logits) == min(chunk, tokens)
    assert (tokens, VOCABULARY) not in seen.shapes
    # 23 columns are 5 tiles of 4 and one of 3: what is kept for both models, and what one tile needs.
    kept = 2 * 5 if chunk >= tokens else 0
    assert seen.most[(min(chunk, tokens), 4)] <= kept + 4


def test_without_a_way_back_no_logits_are_kept() -> None:
    """Bug: an evaluation of the KL keeping both models' logits that nobody will read."""
    inputs = Inputs(6)
    with torch.no_grad(), _Made() as seen:
        head.fused_scores_and_kl(
            inputs.hidden, inputs.weight.requires_grad_(), inputs.targets, inputs.theirs,
            inputs.their_weight, tile=4,
        )  # fmt: skip
    assert seen.most[(6, 4)] <= 4


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked, as in a user's run: the library's own message must come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_a_reference_that_does_not_fit_is_refused() -> None:
    """Bug: two vocabularies compared id by id, or another batch's states, with a broadcast for a result."""
    inputs = Inputs(3)
    ours = inputs.hidden, inputs.weight
    for scored in (
        lambda *theirs: ops.token_kl(*ours, *theirs),
        lambda *theirs: head.fused_scores_and_kl(*ours, inputs.targets, *theirs),
    ):
        with pytest.raises(ValueError, match=r"reference's head has 22 rows, the policy's 23.*same ids"):
            scored(inputs.theirs, inputs.their_weight[1:])
        with pytest.raises(ValueError, match=r"states of 1 tokens for the reference and of 3 .*same order"):
            scored(inputs.theirs[:1], inputs.their_weight)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0\.0\. Log-probs need one above 0"),
        ({"chunk": 0}, "chunk is 0. It counts tokens scored at once and must be at least 1"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    """Bug: a division by zero, or an endless range, instead of a sentence."""
    inputs = Inputs(2)
    with pytest.raises(ValueError, match=message):
        ops.token_kl(inputs.hidden, inputs.weight, inputs.theirs, inputs.their_weight, **setting)
    with pytest.raises(ValueError, match=message):
        inputs.fused(**setting)


def test_the_exact_gradient_is_what_k2_has_on_average() -> None:
    """Bug: the other KL. k2's gradient, averaged over all tokens that the policy could have drawn, is that of
    KL(policy || reference); k3's is that of the other one."""
    inputs = Inputs(1)
    gradients = {}
    for name in ("full", "k2", "k3"):
        weight = inputs.weight.clone().requires_grad_()
        if name == "full":
            loss = ops.token_kl(inputs.hidden, weight, inputs.theirs, inputs.their_weight).sum()
        else:
            ours = (inputs.hidden @ weight.T).log_softmax(-1)
            theirs = (inputs.theirs @ inputs.their_weight.T).log_softmax(-1)
            estimate = ops.kl_k2 if name == "k2" else ops.kl_k3
            loss = (ours.detach().exp() * estimate(ours, theirs)).sum()
        loss.backward()
        gradients[name] = weight.grad
    torch.testing.assert_close(gradients["k2"], gradients["full"])
    assert (gradients["k3"] - gradients["full"]).abs().max() > 1e-2


class _Made(TorchDispatchMode):
    """Notes the shapes of all tensors that are made, on the way back too, and how many of a shape were held
    by somebody at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.most: dict[tuple[int, ...], int] = {}
        self._alive: dict[tuple[int, ...], dict[int, weakref.ref[Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            shape = tuple(result.shape)
            self.shapes.append(shape)
            made = self._alive.setdefault(shape, {})
            made[id(result)] = weakref.ref(result)  # an operation in place gives back what was there
            alive = sum(one() is not None for one in made.values())
            self.most[shape] = max(self.most.get(shape, 0), alive)
        return result
