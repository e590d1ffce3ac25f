"""The rubric: sums, policies for failures, and a batch that is never poisoned."""

# ruff: noqa: ARG005 - scripted rewards take what they are passed
from __future__ import annotations

import logging
import math
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reflectvlm.rewards import Custom, RewardFailure, Rubric, brpo_rubric, look_back_rubric, per_rollout
from reflectvlm.tags import look_back
from reflectvlm.types import Prompt, Rollout, Sample, Text


@pytest.fixture
def untyped() -> Iterator[None]:
    """As a user runs it: tests check annotations at run time, which would hide the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def group(size: int = 2) -> tuple[Rollout, ...]:
    prompt = Prompt(sample=Sample(id="geo-7", question="?", answer="5"), spans=())
    spans = (Text(ids=(1,), trained=True, logprobs=(-0.1,)),)
    return tuple(Rollout(prompt=prompt, spans=spans, text=str(i), stop="eos") for i in range(size))


def gives(*values: Any) -> Callable[[Sequence[Rollout]], Any]:
    return lambda rollouts: list(values)


def rubric(reward: Any, on_error: Any = "drop", weight: float = 0.5, **options: Any) -> Rubric:
    """`reward` beside a sound one that gives 1.0 at weight 1."""
    sound = per_rollout(lambda rollout: 1.0)
    return Rubric(
        rewards={"sound": sound, "x": reward},
        weights={"sound": 1.0, "x": weight},
        on_error=on_error,
        **options,
    )


def test_weighted_sum_and_parts() -> None:
    """Raw parts are logged unweighted; tensors, arrays and booleans are numbers."""
    scored = rubric(gives(2, True))(group())
    assert scored.rewards == (2.0, 1.5)
    assert scored.parts == {"sound": (1.0, 1.0), "x": (2.0, 1.0)}
    assert scored.scored == (True, True)
    assert rubric(lambda rollouts: torch.tensor([2.0, 4.0]))(group()).rewards == (2.0, 3.0)
    assert pickle.loads(pickle.dumps(scored)).rewards == scored.rewards


BAD: list[tuple[Any, str]] = [
    (gives(math.nan, math.nan), "nan, not a finite number"),
    (gives(-math.inf, math.inf), "inf, not a finite number"),
    (gives("1.0", "2.0"), "'1.0', not a number"),
    (gives([1], [2]), "TypeError"),
    (gives(1.0), "1 values for 2 rollouts"),
    (lambda rollouts: 1.0, "1.0, not one number per rollout"),
    (lambda rollouts: "12", "'12', not one number per rollout"),
    (lambda rollouts: None, "None, not one number per rollout"),
    (lambda rollouts: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda rollouts: sys.exit(1), "SystemExit: 1"),
    (gives(10**400, 10**400), "OverflowError"),
    (per_rollout(lambda rollout: 1 / 0), "ZeroDivisionError"),
    (Custom(function=lambda texts: [math.nan for _ in texts]), "nan, not a finite number"),
]


@pytest.mark.parametrize(("reward", "reason"), BAD)
def test_failures_never_poison_the_batch(reward: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """drop unscores, zero counts 0, raise stops; rewards stay finite and the log names reward and row."""
    with caplog.at_level(logging.WARNING, logger="reflectvlm"):
        dropped = rubric(reward)(group())
    assert (dropped.rewards, dropped.scored) == ((0.0, 0.0), (False, False))
    assert all(map(math.isnan, dropped.parts["x"]))
    assert dropped.parts["sound"] == (1.0, 1.0)
    assert any("Reward 'x' failed on sample 'geo-7'" in text and reason in text for text in caplog.messages)
    zeroed = rubric(reward, "zero")(group())
    assert (zeroed.rewards, zeroed.scored) == ((1.0, 1.0), (True, True))
    with pytest.raises(RewardFailure, match="Reward 'x' failed on sample 'geo-7'") as failure:
        rubric(reward, "raise")(group())
    assert failure.value.__cause__ is not None


def test_a_failure_is_told_once_per_occurrence(caplog: pytest.LogCaptureFixture) -> None:
    """A group-level failure is one event, not one line for each of its rollouts."""
    rubric(lambda rollouts: 1 / 0)(group(8))
    assert len(caplog.messages) == 1
    assert "8 rollouts" in caplog.messages[0]


def test_one_bad_row_costs_one_row() -> None:
    """A grader that fails on one answer must not throw away its siblings."""
    scored = rubric(per_rollout(lambda rollout: 1 / int(rollout.text)))(group(3))
    assert scored.scored == (False, True, True)
    assert scored.rewards == (0.0, 1.5, 1.25)
    mixed = rubric(gives(1.0, math.nan, 2.0))(group(3))
    assert mixed.scored == (True, False, True)


@pytest.mark.parametrize("on_error", ["drop", "zero", "raise"])
@pytest.mark.parametrize("lift", [lambda f: f, lambda f: Custom(function=f)])
def test_none_is_no_failure(on_error: str, lift: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A TRL reward that says "does not apply" once unscored the row, with a warning for each."""
    x = lift(lambda texts: [None, *[2.0] * (len(texts) - 1)])
    scored = rubric(x, on_error, max_failures=0)(group(2))
    assert scored.rewards == (1.0, 2.0)  # 1 alone; 1 + 0.5 * 2
    assert scored.scored == (True, True)
    assert math.isnan(scored.parts["x"][0])
    assert scored.parts["x"][1] == 2.0
    assert caplog.messages == []


def test_no_reward_that_applies_leaves_a_rollout_unscored() -> None:
    """A sum over nothing is no reward of 0; a statistic of weight 0 does not count as a reward."""
    mixed = Rubric(
        rewards={"a": gives(None, 1.0, None), "b": gives(None, None, None), "seen": gives(1.0, 1.0, 1.0)},
        weights={"a": 1.0, "b": 1.0, "seen": 0.0},
        on_error="zero",
    )(group(3))
    assert (mixed.rewards, mixed.scored) == ((0.0, 1.0, 0.0), (False, True, False))
    measured = Rubric(rewards={"a": gives(None)}, weights={"a": 0.0})(group(1))
    assert measured.scored == (True,)


def test_none_and_a_failure_in_one_row() -> None:
    """None beside NaN: the failure decides under drop, and counts as 0 under zero."""
    rewards = {"a": gives(None), "b": gives(math.nan)}
    weights = {"a": 1.0, "b": 1.0}
    assert Rubric(rewards=rewards, weights=weights)(group(1)).scored == (False,)
    assert Rubric(rewards=rewards, weights=weights, on_error="zero")(group(1)).scored == (True,)


def test_weight_zero_is_measured_only() -> None:
    """A broken statistic must not unscore rollouts, nor may 0 * NaN enter the sum."""
    scored = rubric(gives(3.0, math.nan), weight=0.0)(group())
    assert (scored.rewards, scored.scored) == ((1.0, 1.0), (True, True))
    assert scored.parts["x"][0] == 3.0
    assert math.isnan(scored.parts["x"][1])


def test_a_sum_that_overflows_is_a_failure() -> None:
    """Finite parts can still add up to infinity: 1e308 * 1e3."""
    scored = rubric(gives(1e308, 0.0), weight=1e3)(group())
    assert scored.rewards == (0.0, 1.0)
    assert scored.scored == (False, True)


@pytest.mark.parametrize("make", [lambda **o: look_back_rubric(look_back(), **o), brpo_rubric])
def test_the_papers_rubrics_hand_their_policy_on(make: Any) -> None:
    """Bug: what a failure does can be set for a rubric of one's own, and not for those of the recipes."""
    rubric = make(on_error="zero", max_failures=7)
    assert (rubric.on_error, rubric.max_failures) == ("zero", 7)
    assert (make().on_error, make().max_failures) == ("drop", None)


def test_budget_for_failures() -> None:
    """A reward that is broken for good must end the run instead of training on nothing."""
    checked = rubric(lambda rollouts: 1 / 0, max_failures=3)
    checked(group(2))
    with pytest.raises(RewardFailure, match=r"4 failures so far, max_failures=3.*raise rubric.max_failures"):
        checked(group(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rewards": {"accuracy": gives(), "back": gives()}, "weights": {"accuracy": 1.0}},
            r"rubric.weights lacks 'back'. Rewards and weights must name the same terms: "
            r"rewards \{accuracy, back\}, weights \{accuracy\}.",
        ),
        ({"rewards": {"a": gives()}, "weights": {"a": 1.0, "b": 1.0}}, "rubric.rewards lacks 'b'"),
        ({"rewards": {}, "weights": {}}, "no rewards"),
        ({"rewards": {"a": gives()}, "weights": {"a": math.nan}}, "'a'.* is nan.*finite"),
        ({"rewards": {"a": "Accuracy"}, "weights": {"a": 1.0}}, "'Accuracy'.*must be callable"),
        ({"rewards": {"a": gives()}, "weights": {"a": 1.0}, "on_error": "dorp"}, "'dorp'.*Meant 'drop'"),
        ({"rewards": {"a": gives()}, "weights": {"a": 1.0}, "max_failures": -1}, "max_failures is -1"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_errors_name_the_remedy(options: dict[str, Any], message: str) -> None:
    """A reward without a weight once trained for days at weight 0."""
    with pytest.raises(ValueError, match=message):
        Rubric(**options)


@given(
    st.lists(
        st.one_of(st.floats(), st.none(), st.text(max_size=3), st.booleans(), st.integers()), max_size=5
    ),
    st.sampled_from(["drop", "zero"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rewards_are_always_finite(values: list[Any], on_error: str) -> None:
    """Whatever a reward gives, the numbers that reach the advantages are finite and complete."""
    scored = rubric(gives(*values), on_error)(group(3))
    assert len(scored.rewards) == 3
    assert all(map(math.isfinite, scored.rewards))
    assert all(reward == 0.0 for reward, kept in zip(scored.rewards, scored.scored, strict=True) if not kept)
