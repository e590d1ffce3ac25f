"""Products through oneDNN against PyTorch's own."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fixtures import make_policy, make_prompt
from reflectvlm.head import fused_token_scores
from reflectvlm.models import products
from reflectvlm.models.decoder import Decoder
from reflectvlm.models.products import fast_linear, fast_products, product

needs_onednn = pytest.mark.skipif(
    not products.available(), reason="the processor has no AVX-512, so these products are never used on it"
)


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small ones of these tests would not be worth it."""
    monkeypatch.setattr(products, "LEAST", 0)


def _difference(bias: bool, shape: tuple[int, ...] = (3, 5, 40)) -> float:
    """Largest difference of results and gradients between `fast_linear` and the plain one in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    weight, own = torch.randn(24, shape[-1], generator=generator), torch.randn(24, generator=generator)
    upstream = torch.randn(*shape[:-1], 24, generator=generator)
    found = []
    for function, dtype in ((fast_linear, torch.float32), (F.linear, torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight, own)[: 2 + bias]]
        made = function(*leaves)
        (made * upstream).sum().backward()
        found.append(
            [made.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]
        )
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 40), (7, 40), (1, 40)])
def test_results_and_gradients_are_those_of_a_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    """Bug: a transposed product, a forgotten bias, or gradients of another shape."""
    assert _difference(bias, shape) < 2e-5


def _no_transposition(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    to_x, to_weight, to_bias = _BACKWARD(ctx, *grads)
    return to_x, to_weight.flip(0), to_bias


_BACKWARD = products._Linear.backward


@needs_onednn
def test_the_comparison_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a comparison that passes whatever the way back does."""
    monkeypatch.setattr(products._Linear, "backward", staticmethod(_no_transposition))
    assert _difference(bias=True) > 1e-2


@needs_onednn
def test_float32_stays_float32() -> None:
    """Bug: a kernel that multiplies in bfloat16: its error would be a thousand times as large."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 512, generator=generator), torch.randn(48, 512, generator=generator)
    exact = left.double() @ right.double().T
    own = float((product(left, right).double() - exact).abs().max())
    plain = float(((left @ right.T).double() - exact).abs().max())
    assert own < 4 * plain


@needs_onednn
def test_linear_layers_inside_use_it_and_others_do_not() -> None:
    """Bug: a mode that stays on behind its block, or that no layer notices."""
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    with fast_products():
        inside = layer(x)
    with fast_products(wanted=False):
        unwanted = layer(x)
    assert type(inside.grad_fn).__name__ == "_LinearBackward"
    assert {type(y.grad_fn).__name__ for y in (layer(x), unwanted)} == {"AddmmBackward0"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_the_usual_way(dtype: torch.dtype) -> None:
    """Bug: float64 cut down to float32, or a refusal."""
    x, weight = torch.randn(3, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype)
    assert torch.equal(fast_linear(x, weight), F.linear(x, weight))


def test_autocast_keeps_its_dtype() -> None:
    """Bug: float32 products where the run has asked for bfloat16."""
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast_linear(x, weight).dtype == torch.bfloat16


def test_no_rows_are_no_error() -> None:
    """Bug: an operator that refuses empty inputs, as for a batch without images."""
    assert fast_linear(torch.zeros(0, 4), torch.ones(2, 4)).shape == (0, 2)


@needs_onednn
def test_what_is_computed_again_on_the_way_back_is_the_same() -> None:
    """Bug: a checkpointed layer that takes another kernel the second time and so saves other tensors, which
    PyTorch refuses."""
    layer, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4)
    x.requires_grad_()
    with fast_products():
        made = checkpoint(layer, x, use_reentrant=False, context_fn=products.checkpoint_contexts)
    made.sum().backward()
    again = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, again)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_policy_says_the_same_with_either(share_prefix: bool) -> None:
    """Bug: a layer whose products differ by more than rounding."""
    scores = []
    for fast in (True, False):
        policy = make_policy(gain=1.0, fast_products=fast, share_prefix=share_prefix)
        prompt = make_prompt(policy, 0)
        batch = policy.batch([(prompt, policy.answer("seven and three")), (prompt, policy.answer("no"))])
        scores.append(policy.score(batch, policy.features(batch.images)).logprobs.detach())
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)


@needs_onednn
def test_a_call_by_names_is_a_call() -> None:
    """Bug: a layer that calls torch's function by its names being refused."""
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    with fast_products():
        torch.testing.assert_close(F.linear(input=x, weight=weight), x @ weight.T)
        torch.testing.assert_close(F.linear(x, weight[0]), x @ weight[0])


@needs_onednn
@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_only_what_the_way_back_needs_is_kept(frozen: str) -> None:
    """Bug: inputs kept for a weight that is frozen, as with adapters, which is most of the memory."""
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    (weight if frozen == "input" else x).requires_grad_()
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = fast_linear(x, weight)
    assert kept == [(2, 4) if frozen == "weight" else (3, 4)]
    made.sum().backward()


@needs_onednn
def test_second_derivatives_are_refused() -> None:
    """Bug: a second derivative of 0 instead of a sentence."""
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    (first,) = torch.autograd.grad(fast_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_onednn
def test_an_expanded_gradient_does_not_stop_it() -> None:
    """Bug: a sum's gradient, one number expanded, for which oneDNN needs seconds."""
    x, weight = torch.randn(512, 256), torch.randn(768, 256, requires_grad=True)
    start = time.perf_counter()
    fast_linear(x, weight).sum().backward()
    assert time.perf_counter() - start < 1  # it took 2 s; it takes some milliseconds
    torch.testing.assert_close(weight.grad, x.sum(0).expand(768, -1), rtol=1e-4, atol=1e-3)


def test_small_products_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a tiny model slower than before, because entering oneDNN takes longer than the product."""
    monkeypatch.undo()
    layer = nn.Linear(4, 3)
    with fast_products():
        assert type(layer(torch.randn(2, 4)).grad_fn).__name__ == "AddmmBackward0"


@pytest.mark.parametrize("fast", [True, False])
def test_the_setting_reaches_every_product(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: layers that obey `fast_products=False` beside a head or a decode step that does not."""
    used = []
    monkeypatch.setattr(
        products, "_onednn", lambda x, weight, bias=None: used.append(1) or F.linear(x, weight, bias)
    )
    policy = make_policy(gain=1.0, fast_products=fast)
    prompt = make_prompt(policy, 0)
    parts = {
        "layers": lambda: policy.features(prompt.patches),
        "score": lambda: policy.score(
            policy.batch([(prompt, policy.answer("no"))]), policy.features(prompt.patches)
        ),
        "decode": lambda: Decoder.of(policy).layers[0].down(torch.ones(2, 384)),
    }
    for name, part in parts.items():
        used.clear()
        with torch.no_grad():
            part()
        assert bool(used) == (fast and products.available()), name
    used.clear()
    found = fused_token_scores(torch.ones(2, 4), torch.ones(6, 4), torch.tensor([0, 1]), fast_products=fast)
    assert bool(used) == (fast and products.available())
    assert found[0].tolist() == pytest.approx([-math.log(6)] * 2)
