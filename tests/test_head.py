"""Log-probs by tiles of the vocabulary against the plain computation, `ops.token_scores`."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reflectvlm import head, ops

VOCABULARY, WIDTH = 23, 5


def _inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets that are never banned, and a gradient for each log-prob. Logits are a few
    units apart, so that a wrong maximum or sum shows."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = 2 * torch.randn(tokens, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    targets = torch.randint(0, 12, (tokens,), generator=generator)
    return hidden, weight, targets, torch.randn(tokens, generator=generator, dtype=dtype)


def _difference(fused: dict[str, Any], tokens: int = 6, **common: Any) -> float:
    """Largest difference of log-probs, entropies and gradients between the two computations."""
    hidden, weight, targets, upstream = _inputs(tokens)
    found = []
    for function, extra in ((head.fused_token_scores, fused), (ops.token_scores, {})):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = function(*leaves, targets, **common, **extra)
        (logprobs * upstream).sum().backward()
        found.append([logprobs.detach(), entropy, leaves[0].grad, leaves[1].grad])
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(*found, strict=True))


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(0, 7),
    chunk=st.integers(1, 9),
    tile=st.integers(1, VOCABULARY + 2),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
    banned=st.sets(st.integers(12, VOCABULARY - 1), max_size=VOCABULARY - 12),
)
def test_tiles_equal_the_plain_computation(
    tokens: int, chunk: int, tile: int, temperature: float, banned: set[int]
) -> None:
    """Bug: an edge of a tile or chunk off by one, a maximum not carried over, a temperature or a ban lost on
    one of the two ways."""
    settings_ = {"temperature": temperature, "banned": sorted(banned)}
    assert _difference({"chunk": chunk, "tile": tile}, tokens, **settings_) < 2e-5


def _without_rescaling(self: head._Online, piece: head.Piece, sweep: head.Sweep, *, keep: bool) -> None:
    largest = self.largest
    _TAKE(self, piece, sweep, keep=keep)
    self.sum = self.sum / (largest - self.largest).exp().clamp(min=1e-3)


def _without_targets(piece: head.Piece, _: head.Sweep, total: Tensor, grad: Tensor, **__: bool) -> Tensor:
    return (piece.logits - total[:, None]).exp() * -grad[:, None]


def _shifted_hits(self: head.Sweep, piece: head.Piece) -> tuple[Tensor, Tensor]:
    row, column = _HITS(self, piece)
    return row, (column + 1) % piece.logits.shape[1]


_TAKE, _HITS = head._Online.take, head.Sweep.hits


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (head._Online, "take", _without_rescaling),
        (head, "_slope", _without_targets),
        (head.Sweep, "hits", _shifted_hits),
    ],
)
def test_the_comparison_notices_mistakes(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any
) -> None:
    """Bug: a comparison that also passes for sums of different maxima, gradients without their targets, or
    targets one column off."""
    assert _difference({"tile": 4}) < 2e-5
    monkeypatch.setattr(owner, name, wrong)
    assert _difference({"tile": 4}) > 1e-2


def test_a_banned_target_is_impossible() -> None:
    """Bug: the finite stand-in of a banned logit reaching the loss as a number."""
    hidden, weight, _, _ = _inputs(2)
    logprobs, entropy = head.fused_token_scores(hidden, weight, torch.tensor([3, 4]), banned=[4])
    assert logprobs[1] == -math.inf
    assert logprobs[0].isfinite()
    assert entropy.isfinite().all()


@pytest.mark.parametrize("tile", [2, VOCABULARY])
def test_a_tile_that_is_banned_as_a_whole_is_empty(tile: int) -> None:
    """Bug: the maximum of a tile without any possible id, which makes its powers NaN."""
    hidden, weight, _, _ = _inputs(3)
    everything_else = [v for v in range(VOCABULARY) if v != 22]
    logprobs, entropy = head.fused_token_scores(
        hidden, weight, torch.tensor([22] * 3), banned=everything_else, tile=tile
    )
    assert logprobs.tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert entropy.tolist() == pytest.approx([0.0] * 3, abs=1e-5)


def test_numbers_that_are_none_stay_visible() -> None:
    """Bug: a NaN of the policy turned into a finite log-prob by the sweep's maximum."""
    hidden, weight, targets, _ = _inputs(3)
    hidden[1, 0] = math.nan
    logprobs, _ = head.fused_token_scores(hidden, weight, targets, tile=4)
    assert logprobs.isnan().tolist() == [False, True, False]


def test_without_entropy_the_log_probs_are_the_same() -> None:
    """Bug: the branch without entropy overwriting logits that are still needed."""
    hidden, weight, targets, _ = _inputs(6)
    with_it, _ = head.fused_token_scores(hidden, weight, targets, tile=4)
    without, zeros = head.fused_token_scores(hidden, weight, targets, tile=4, entropy=False)
    assert torch.equal(with_it, without)
    assert not zeros.any()


def test_autocast_gives_what_the_plain_way_gives() -> None:
    """Bug: products in float32 under autocast, or a softmax in bfloat16: rollout and trainer differ."""
    hidden, weight, targets, upstream = _inputs(6)
    results = []
    for function in (head.fused_token_scores, ops.token_scores):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, entropy = function(*leaves, targets)
        (logprobs * upstream).sum().backward()
        assert logprobs.dtype == entropy.dtype == torch.float32
        results.append((logprobs.detach(), entropy, leaves[0].grad, leaves[1].grad))
    for fused, plain in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)
    for fused, plain in zip(results[0][2:], results[1][2:], strict=True):
        assert fused is not None
        torch.testing.assert_close(fused, plain, rtol=0, atol=0.05)  # bfloat16 has 8 bits; values are near 3


def test_a_second_way_back_is_refused() -> None:
    """Bug: gradients of a second backward pass made from logits that the first has overwritten."""
    hidden, weight, targets, _ = _inputs(6)
    logprobs, _ = head.fused_token_scores(hidden.requires_grad_(), weight, targets)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    """Bug: a [V, D] gradient made for a head that does not train, as with LoRA."""
    hidden, weight, targets, _ = _inputs(6)
    leaf = hidden.clone().requires_grad_()
    with _Products() as seen:
        head.fused_token_scores(leaf, weight, targets, tile=4)[0].sum().backward()
    assert weight.grad is None
    assert (VOCABULARY, WIDTH) not in seen.shapes


@pytest.mark.parametrize("chunk", [2, 1000])
def test_no_more_logits_at_once_than_a_tile_of_a_chunk(chunk: int) -> None:
    """Bug: memory that grows with tokens times vocabulary."""
    hidden, weight, targets, _ = _inputs(12)
    leaf, head_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with _Products() as seen:
        head.fused_token_scores(leaf, head_weight, targets, chunk=chunk, tile=4)[0].sum().backward()
    logits = [shape for shape in seen.shapes if shape[1:] == (4,)]
    assert logits
    assert max(shape[0] for shape in logits) == min(chunk, 12)
    assert (12, VOCABULARY) not in seen.shapes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0\.0\. Log-probs need one above 0"),
        ({"chunk": 0}, "chunk is 0. It counts tokens scored at once and must be at least 1"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    """Bug: a division by zero, or an endless range, instead of a sentence."""
    hidden, weight, targets, _ = _inputs(2)
    with pytest.raises(ValueError, match=message):
        head.fused_token_scores(hidden, weight, targets, **setting)


@pytest.mark.parametrize("keep", [True, False])
def test_a_banned_target_has_no_gradient_of_its_own(keep: bool) -> None:
    """Bug: a target that is impossible moving the head, as if its logit had taken part."""
    hidden, weight, targets, upstream = _inputs(4)
    targets[1], found = 20, []
    for function, extra in ((head.fused_token_scores, {"tile": 4}), (ops.token_scores, {})):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        chunk = {"chunk": 9 if keep else 2} if extra else {}
        logprobs, _ = function(*leaves, targets, banned=[20, 21], **extra, **chunk)
        (logprobs.nan_to_num(neginf=0.0) * upstream).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)
    assert not found[0][1][20].any()


def test_without_a_way_back_no_logits_are_kept() -> None:
    """Bug: scores of a reference keeping hundreds of megabytes of logits that nobody will read."""
    hidden, weight, targets, _ = _inputs(6)
    with torch.no_grad(), _Products() as seen:
        head.fused_token_scores(hidden, weight.requires_grad_(), targets, tile=4)
    assert seen.alive((6, 4)) <= 1


def test_second_derivatives_are_refused() -> None:
    """Bug: a second derivative of 0 instead of a sentence."""
    hidden, weight, targets, _ = _inputs(3)
    leaf = hidden.requires_grad_()
    logprobs, _ = head.fused_token_scores(leaf, weight, targets)
    (first,) = torch.autograd.grad(logprobs.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("rows", [0, 1, 2, head.FEW_ROWS, head.FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_few_rows_are_the_heads(rows: int, bias: bool) -> None:
    """Bug: a row lost or doubled where a single one is multiplied twice, or a head's bias left out."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias)
    hidden = torch.randn(rows, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(head.next_token_logits(layer, hidden), layer(hidden), rtol=0, atol=1e-5)


def test_a_wrapped_head_is_called_as_it_is() -> None:
    """Bug: an adapter around the head that decoding passes by."""
    wrapped = torch.nn.Sequential(torch.nn.Linear(WIDTH, VOCABULARY), torch.nn.Tanh())
    hidden = torch.randn(3, WIDTH)
    assert torch.equal(head.next_token_logits(wrapped, hidden), wrapped(hidden))


class _Products(TorchDispatchMode):
    """Notes the shapes of all tensors that are made, on the way back too."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self._made: list[weakref.ref[Tensor]] = []

    def alive(self, shape: tuple[int, ...]) -> int:
        """How many tensors of this shape that were made here are still held by somebody."""
        return sum(one is not None and tuple(one.shape) == shape for one in (made() for made in self._made))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.shapes.append(tuple(result.shape))
            self._made.append(weakref.ref(result))
        return result
