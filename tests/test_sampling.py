"""Drawing tokens: the right frequencies, never an id of probability zero, no hidden state."""

from __future__ import annotations

import math
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.rollout.sampling import draw, keep_likely, uniforms
from reflectvlm.types import SamplingParams

LAST = 1 - 2.0**-24
"""The largest float32 below 1 that a generator of 24 random bits can give."""
finite = st.floats(-30, 30, width=32)
rows = st.lists(st.one_of(finite, st.just(float("-inf"))), min_size=2, max_size=40).filter(
    lambda row: max(row) > float("-inf")
)
cuts = st.sampled_from(
    [
        {},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"top_k": 1},
        {"top_k": 3},
        {"min_p": 0.1},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.01},
    ]
)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    """60,000 draws against softmax(logits / T). Chi-square over 8 ids has 7 degrees of freedom; it
    exceeds 29.9 once in 10^4 for a right sampler, and is in the hundreds at another temperature."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0])
    n = 60_000
    uniform = torch.from_numpy(np.random.default_rng(5).random(n, dtype=np.float32))
    ids, _ = draw(logits.expand(n, -1), uniform, SamplingParams(temperature=temperature))
    counts = ids.bincount(minlength=8)

    def chi_square(at: float) -> float:
        mean = n * (logits / at).softmax(0)
        return float(((counts - mean) ** 2 / mean).sum())

    assert chi_square(temperature) < 29.9
    assert chi_square(temperature * 1.1) > 100


def test_frequencies_behind_the_cuts() -> None:
    """What remains keeps its proportions: 0.5 : 0.3 of p = (0.5, 0.3, 0.15, 0.05) at top-p 0.8."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    n = 20_000
    uniform = torch.from_numpy(np.random.default_rng(6).random(n, dtype=np.float32))
    ids, logprobs = draw(logits.expand(n, -1), uniform, SamplingParams(top_p=0.79))
    counts = ids.bincount(minlength=4)
    assert counts[[0, 2]].tolist() == [0, 0]
    # Standard deviation of the share: sqrt(0.625 * 0.375 / 20000) = 0.0034; four of them.
    assert abs(counts[1] / n - 0.625) < 0.0137
    # Log-probs are those before the cut: log 0.5 and log 0.3, not log 0.625.
    assert torch.allclose(logprobs.exp(), torch.where(ids == 1, 0.5, 0.3))


@given(
    row=rows,
    uniform=st.sampled_from([0.0, LAST, 2.0**-24, 0.5]),
    cut=cuts,
    temperature=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
)
@settings(max_examples=300, deadline=None)
def test_an_id_of_probability_zero_is_never_drawn(
    row: list[float], uniform: float, cut: dict[str, Any], temperature: float
) -> None:
    """At u = 0 a search for "cumulated >= u" takes id 0 though it is banned; at u = 1 - 2^-24 rounding
    points past the last id."""
    logits = torch.tensor([row])
    params = SamplingParams(temperature=temperature, **cut)
    ids, logprobs = draw(logits, torch.tensor([uniform]), params)
    assert math.isfinite(logprobs.item())
    expected = (logits / params.logprob_temperature).log_softmax(-1)[0, ids.item()]
    assert logprobs.item() == pytest.approx(expected.item(), abs=1e-5)
    if temperature:
        # As `draw` computes them: a softmax may round otherwise, and then a cut falls elsewhere among equals.
        probs = (logits / params.logprob_temperature).log_softmax(-1).exp()
        # One rounding step of the sum may land on an id whose probability underflowed; never on a cut one.
        assert keep_likely(probs, params)[0, ids.item()] > 0
    else:
        assert row[ids.item()] >= max(row) - 1e-5  # smaller differences are lost in the log-softmax


@given(row=rows, cut=cuts)
@settings(max_examples=300, deadline=None)
def test_what_the_cuts_keep(row: list[float], cut: dict[str, Any]) -> None:
    """Against the definitions, written as loops over sorted ids."""
    probs = torch.tensor([row]).softmax(-1)
    params = SamplingParams(**cut)
    kept = keep_likely(probs, params)[0]
    p = probs[0].tolist()
    assert kept.argmax() == probs.argmax()
    for i, value in enumerate(kept.tolist()):
        assert value in (0.0, p[i])
        larger = [q for q in p if q > p[i]]
        if params.top_k and len(larger) >= params.top_k:
            assert value == 0
        if params.top_p < 1 and sum(larger) > params.top_p + 1e-5:
            assert value == 0
        if params.min_p and p[i] < params.min_p * max(p) * (1 - 1e-6):
            assert value == 0
    if params == SamplingParams(top_p=params.top_p) and params.top_p < 1:
        assert kept.sum() >= params.top_p - 1e-5


def test_cuts_by_hand() -> None:
    probs = torch.tensor([[0.05, 0.5, 0.15, 0.3]])

    def kept(**cut: Any) -> list[int]:
        return keep_likely(probs, SamplingParams(**cut))[0].nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=100) == [0, 1, 2, 3]
    assert kept(top_p=0.5) == [1]  # 0.5 reaches it
    assert kept(top_p=0.51) == [1, 3]
    assert kept(top_p=0.9) == [1, 2, 3]
    assert kept(min_p=0.3) == [1, 2, 3]  # 0.3 * 0.5 = 0.15
    assert kept(min_p=0.31) == [1, 3]
    assert kept(top_k=3, top_p=0.5) == [1]


def test_the_ends_of_the_unit_interval() -> None:
    """u = 0 draws the first possible id, not a banned one and not the likeliest; u just below 1 the last."""
    logits = torch.tensor([0.0, 0.3, 0.7, 0.0]).log()
    ids, _ = draw(logits.expand(2, -1), torch.tensor([0.0, LAST]), SamplingParams())
    assert ids.tolist() == [1, 2]


def test_greedy_logprobs_are_at_temperature_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    ids, logprobs = draw(logits, torch.tensor([0.99]), SamplingParams(temperature=0))
    assert ids.tolist() == [1]
    # log(e^3 / (e + e^2 + e^3)) = -log(1 + e^-1 + e^-2)
    assert logprobs.item() == pytest.approx(-math.log(1 + math.exp(-1) + math.exp(-2)), abs=1e-6)


def test_random_numbers_are_a_function_of_seed_prompt_and_member() -> None:
    """Siblings that share a stream give G equal rollouts, and a group without any signal."""
    a = uniforms(3, 1, 2, 100)
    assert torch.equal(a, uniforms(3, 1, 2, 100))
    assert torch.equal(a[:10], uniforms(3, 1, 2, 10))  # a smaller budget draws the same beginning
    others = [uniforms(*key, 100) for key in ((4, 1, 2), (3, 2, 2), (3, 1, 3), (3, 2, 1), (1, 3, 2))]
    for i, x in enumerate([a, *others]):
        for y in others[i:]:
            # Equal in at most a few of 24-bit numbers, by chance.
            assert (x == y).sum() < 3
    many = uniforms(0, 0, 0, 100_000)
    assert many.dtype == torch.float32
    assert many.min() >= 0
    assert many.max() < 1
    # Standard deviation of the mean: sqrt(1 / 12 / 1e5) = 9e-4; four of them.
    assert abs(many.mean() - 0.5) < 0.0037


def test_shapes_are_checked_in_tests() -> None:
    """The import hook of conftest is at work; without it no annotation is ever compared."""
    with pytest.raises(jaxtyping.TypeCheckError):
        draw(torch.zeros(2, 5), torch.zeros(3), SamplingParams())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. It must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.0}, "min_p is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**setting)
