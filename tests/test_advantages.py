"""Advantages: numbers by hand, and what must hold for every group."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.advantages import GroupMean, LeaveOneOut
from reflectvlm.protocols import Advantage
from reflectvlm.types import Prompt, Rollout, Sample, ScoredGroup

ALL: list[Advantage] = [GroupMean(), GroupMean(scale="none"), LeaveOneOut()]
# Sixteenths are exact in binary, so that equal rewards stay equal when shifted.
REWARDS = st.lists(st.integers(-64, 64).map(lambda n: n / 16), min_size=0, max_size=8)


def group_of(rewards: list[float], scored: list[bool] | None = None) -> ScoredGroup:
    prompt = Prompt(sample=Sample(id="s", question="?", answer="!"), spans=())
    return ScoredGroup(
        rollouts=tuple(Rollout(prompt=prompt, spans=(), text="", stop="eos") for _ in rewards),
        rewards=tuple(rewards),
        parts={},
        scored=tuple(scored or [True] * len(rewards)),
    )


def test_group_mean_by_hand() -> None:
    """Bug: a deviation that divides by n instead of n - 1."""
    # mean 1; squares 1, 1, 0, 0 -> 2 / (4 - 1) -> std 0.816497; -1 / 0.816497 = -1.224745
    expected = torch.tensor([-1.224745, 1.224745, 0.0, 0.0])
    torch.testing.assert_close(GroupMean()(group_of([0.0, 2.0, 1.0, 1.0])), expected, rtol=0, atol=3e-6)
    unscaled = GroupMean(scale="none")(group_of([0.0, 2.0, 1.0, 1.0]))
    assert unscaled.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_leave_one_out_by_hand() -> None:
    """Bug: the rollout's own reward in its own baseline."""
    # baselines: (2 + 4) / 2 = 3, (0 + 4) / 2 = 2, (0 + 2) / 2 = 1
    assert LeaveOneOut()(group_of([0.0, 2.0, 4.0])).tolist() == [-3.0, 0.0, 3.0]


@pytest.mark.parametrize("advantage", ALL)
@settings(deadline=None, max_examples=50)
@given(rewards=REWARDS, scored=st.lists(st.booleans(), min_size=8, max_size=8))
def test_unscored_rollouts_get_zero_and_move_nothing(
    advantage: Advantage, rewards: list[float], scored: list[bool]
) -> None:
    """Bug: a failed reward counted as 0 shifts the baseline and earns an advantage of its own."""
    scored = scored[: len(rewards)]
    mixed = advantage(group_of([r if s else 0.0 for r, s in zip(rewards, scored, strict=True)], scored))
    alone = advantage(group_of([r for r, s in zip(rewards, scored, strict=True) if s]))
    mask = torch.tensor(scored, dtype=torch.bool)
    assert mixed[~mask].abs().sum() == 0
    assert torch.equal(mixed[mask], alone)


@pytest.mark.parametrize("advantage", ALL)
@settings(deadline=None, max_examples=50)
@given(rewards=REWARDS, shift=st.integers(-100, 100), seed=st.integers(0, 99))
def test_advantages_sum_to_zero_ignore_shifts_and_follow_permutations(
    advantage: Advantage, rewards: list[float], shift: int, seed: int
) -> None:
    """Bug: a baseline that is not the group's own mean, or one that depends on the order."""
    values = advantage(group_of(rewards))
    assert values.dtype == torch.float32
    assert values.shape == (len(rewards),)
    assert abs(values.sum().item()) < 1e-4
    torch.testing.assert_close(
        advantage(group_of([r + shift for r in rewards])), values, rtol=1e-5, atol=1e-6
    )
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    permuted = advantage(group_of([rewards[i] for i in order]))
    torch.testing.assert_close(permuted, values[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantage", ALL)
@settings(deadline=None, max_examples=50)
@given(reward=st.floats(-1e6, 1e6), size=st.integers(0, 9))
def test_equal_rewards_give_exactly_zero(advantage: Advantage, reward: float, size: int) -> None:
    """Bug: 0.1 - mean(0.1, 0.1, 0.1) is not 0 in floats; divided by a tiny deviation it is an update.
    A group of one and an empty one are equal too."""
    assert advantage(group_of([reward] * size)).abs().sum().item() == 0.0


def test_a_truncated_rollout_left_out_is_unscored() -> None:
    """Bug: overlong filtering that keeps the truncated rollout in the baseline."""
    group = group_of([0.0, 1.0, 5.0])
    cut = Rollout(prompt=group.rollouts[0].prompt, spans=(), text="", stop="length")
    group = ScoredGroup(
        rollouts=(*group.rollouts[:2], cut), rewards=group.rewards, parts={}, scored=group.scored
    )
    assert LeaveOneOut()(group.without_truncated()).tolist() == [-1.0, 1.0, 0.0]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked, as in a user's run: the library's own message must come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": "batch"}, r"GroupMean.scale is 'batch'. It must be 'group' .* or 'none'"),
        ({"eps": 0.0}, r"GroupMean.eps is 0.0. .* above 0"),
        ({"eps": math.nan}, "GroupMean.eps is nan"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_refused(setting: dict[str, object], message: str) -> None:
    """Bug: a typo in a recipe that silently means "do not scale"."""
    with pytest.raises(ValueError, match=message):
        GroupMean(**setting)  # type: ignore[arg-type]
