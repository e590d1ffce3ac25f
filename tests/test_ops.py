"""Means, KL estimators and chunked log-probs, against plain formulas and exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from reflectvlm import ops


def test_masked_mean_divides_by_the_given_count_and_ignores_what_is_masked_out() -> None:
    """Bug: a mean over the micro-batch's own tokens, or a NaN at a padded token spoiling the sum."""
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, -math.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # 1 + 2 + 3 = 6 over 12 tokens of the whole update
    assert ops.masked_mean(values, mask, 12.0).item() == 0.5
    # row means: (1 + 2) / 2 and 3 / 1
    assert ops.row_mean(values, mask).tolist() == [1.5, 3.0]


def test_an_empty_mask_gives_zero_with_a_gradient_path() -> None:
    """Bug: 0 / 0 = NaN on a rank without trained tokens, or a loss that cannot be backpropagated."""
    values = torch.ones(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    total = ops.masked_mean(values, mask, 0.0) + ops.row_mean(values, mask).sum()
    total.backward()
    assert total.item() == 0.0
    assert values.grad is not None
    assert values.grad.abs().sum() == 0


LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, 0.2, -0.5, -0.9], dtype=torch.float64).log_softmax(0)


def _expected_loss_gradient(estimator) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Gradient of E_p[estimator(x)] by enumeration, x drawn from a *fixed* p: what a loss averages."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.detach().exp() * estimator(logprobs, REFERENCE)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def _divergence_gradient(forward: bool) -> torch.Tensor:
    """Gradient of KL(q || p) if forward, else of KL(p || q), for p the policy and q the reference."""
    logits = LOGITS.clone().requires_grad_()
    p, q = logits.log_softmax(0), REFERENCE
    divergence = (q.exp() * (q - p)).sum() if forward else (p.exp() * (p - q)).sum()
    divergence.backward()
    assert logits.grad is not None
    return logits.grad


def test_which_divergence_each_estimator_minimises_as_a_loss() -> None:
    """Bug: taking k3 as a loss for the reverse KL. It has the gradient of the forward one; k2 that of
    the reverse one; k1 none at all."""
    forward, reverse = _divergence_gradient(forward=True), _divergence_gradient(forward=False)
    assert not torch.allclose(forward, reverse, atol=0.05)
    torch.testing.assert_close(_expected_loss_gradient(ops.kl_k3), forward)
    torch.testing.assert_close(_expected_loss_gradient(ops.kl_k2), reverse)
    torch.testing.assert_close(_expected_loss_gradient(ops.kl_k1), torch.zeros_like(forward))


def test_k1_and_k3_are_unbiased_values_of_the_reverse_divergence() -> None:
    """Bug: swapped arguments, which would estimate nothing in particular."""
    p = LOGITS.log_softmax(0)
    reverse = (p.exp() * (p - REFERENCE)).sum()
    for estimator in (ops.kl_k1, ops.kl_k3):
        torch.testing.assert_close((p.exp() * estimator(p, REFERENCE)).sum(), reverse)


def test_estimators_by_hand() -> None:
    """Bug: a sign or a factor."""
    logprob, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    # k1 = log(.5/.25) = log 2; k2 = (log 2)^2 / 2; k3 = .25/.5 - 1 + log 2
    assert ops.kl_k1(logprob, reference).item() == pytest.approx(0.693147)
    assert ops.kl_k2(logprob, reference).item() == pytest.approx(0.240227, abs=1e-6)
    assert ops.kl_k3(logprob, reference).item() == pytest.approx(0.193147, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("logprob", "other"), [(-1e4, -0.1), (-0.1, -1e4), (-1e4, -1e4)])
def test_extreme_log_probs_stay_finite(dtype: torch.dtype, logprob: float, other: float) -> None:
    """Bug: exp(1e4) = inf, then inf - inf = NaN in the update."""
    first = torch.tensor([logprob], dtype=dtype, requires_grad=True)
    second = torch.tensor([other], dtype=dtype)
    values = torch.cat([ops.log_ratio(first, second).exp(), ops.kl_k3(first, second)])
    values.sum().backward()
    assert values.isfinite().all()
    assert first.grad is not None
    assert first.grad.isfinite().all()


def test_k3_still_pulls_back_where_the_policy_left_the_reference() -> None:
    """Bug: a clamp on both sides kills the gradient just where the policy is far too sure."""
    logprob = torch.tensor([-0.1], requires_grad=True)
    ops.kl_k3(logprob, torch.tensor([-1e4])).sum().backward()
    # d k3 / d log p = 1 - q/p = 1 - exp(-9999.9) = 1
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(1.0)


def _plain_scores(hidden, weight, targets, bias, banned, temperature):  # type: ignore[no-untyped-def]
    logits = (hidden @ weight.T).float() if bias is None else (hidden @ weight.T + bias).float()
    keep = torch.ones(len(weight), dtype=torch.bool)
    keep[list(banned)] = False
    logprobs = torch.where(keep, logits / temperature, -math.inf).log_softmax(-1)
    kept = logprobs[:, keep]
    return logprobs[torch.arange(len(targets)), targets], -(kept.exp() * kept).sum(-1)


@pytest.mark.parametrize("with_bias", [False, True])
@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(0, 7),
    chunk=st.integers(1, 9),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
    banned=st.sets(st.integers(6, 10)),
)
def test_chunked_scores_equal_the_plain_computation(
    with_bias: bool, tokens: int, chunk: int, temperature: float, banned: set[int]
) -> None:
    """Bug: a chunk boundary off by one, a temperature or a ban lost in the recomputed backward pass."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 5, generator=generator)
    weight, bias = torch.randn(11, 5, generator=generator), torch.randn(11, generator=generator)
    targets = torch.randint(0, 6, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)

    results = []
    for chunked in (True, False):
        leaves = [
            t.clone().requires_grad_() for t in ((hidden, weight, bias) if with_bias else (hidden, weight))
        ]
        with_own_bias = leaves[2] if with_bias else None
        if chunked:
            scores = ops.token_scores(
                leaves[0],
                leaves[1],
                targets,
                bias=with_own_bias,
                banned=sorted(banned),
                temperature=temperature,
                chunk=chunk,
            )
        else:
            scores = _plain_scores(leaves[0], leaves[1], targets, with_own_bias, banned, temperature)
        (scores[0] * upstream).sum().backward()
        results.append([scores[0].detach(), scores[1].detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_banned_ids_have_no_probability_no_gradient_and_no_entropy() -> None:
    """Bug: a banned id that takes probability mass biases the ratio; 0 * log 0 makes the entropy NaN."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [0.0], [50.0]], requires_grad=True)
    logprobs, entropy = ops.token_scores(hidden, weight, torch.tensor([0]), banned=[2])
    # two equally likely ids are left: log(1/2), and an entropy of log 2
    assert logprobs.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0.5, -0.5, 0.0]
    assert not entropy.requires_grad


def test_half_precision_states_get_a_float32_softmax() -> None:
    """Bug: a bfloat16 softmax over a large vocabulary loses the log-prob's digits."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 8, generator=generator).bfloat16()
    weight = torch.randn(1000, 8, generator=generator).bfloat16()
    targets = torch.tensor([0, 500, 999])
    logprobs, entropy = ops.token_scores(hidden, weight, targets)
    expected = (hidden @ weight.T).float().log_softmax(-1)[torch.arange(3), targets]
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected)


def test_the_full_logits_are_never_kept() -> None:
    """Bug: the backward pass keeping [K, V] numbers, which is what the chunks are there to prevent."""
    tokens, vocabulary, chunk = 64, 100, 8
    sizes: list[int] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    hidden = torch.randn(tokens, 4, requires_grad=True)
    with saved_tensors_hooks(record, lambda tensor: tensor):
        ops.token_scores(
            hidden, torch.randn(vocabulary, 4), torch.zeros(tokens, dtype=torch.long), chunk=chunk
        )
    assert sum(size for size in sizes if size >= chunk * vocabulary) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"temperature": 0.0},
            r"temperature is 0\.0\. Log-probs need one above 0; for greedy sampling use 1",
        ),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"chunk": 0}, "chunk is 0. It counts tokens scored at once and must be at least 1"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, float], message: str) -> None:
    """Bug: a division by zero, or an endless range, instead of a sentence."""
    with pytest.raises(ValueError, match=message):
        ops.token_scores(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), **setting)  # type: ignore[arg-type]
