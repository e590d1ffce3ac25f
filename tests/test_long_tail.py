"""Groups that do not wait for their longest rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures import ShowAgain, favour, make_policy, make_prompt
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import LongTail, Reattention
from reflectvlm.reattention import Implicit
from reflectvlm.rollout.decoding import Decoding
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.long_tail import StopGroup
from reflectvlm.train.evaluate import summarize
from reflectvlm.types import Prompt, Rollout, SamplingParams, ScoredGroup
from training import small_rl

SPECIAL = "<|box_start|>"
SAMPLING = SamplingParams(max_tokens=20, stop=("in", "er"))


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


@pytest.fixture(scope="module")
def prompts(policy: QwenVL) -> list[Prompt]:
    return [make_prompt(policy, seed, sizes=((64, 48),)) for seed in range(5)]


def generate(
    policy: QwenVL,
    prompts: Sequence[Prompt],
    long_tail: LongTail | None,
    how: Reattention | None = None,
    max_rows: int = 64,
) -> list[tuple[Rollout, ...]]:
    engine = InProcessEngine(policy=policy, max_rows=max_rows, long_tail=long_tail)
    return engine.generate(prompts, 4, SAMPLING, how or Implicit(), seed=1)


def lengths(group: Sequence[Rollout]) -> list[int]:
    return [len(rollout.sampled_ids) for rollout in group]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=16), st.floats(0.01, 1.0), st.integers(0, 99))
def test_the_share_and_the_grace(ended: list[int], share: float, grace: int) -> None:
    """Bug: the first or the last that ended starts the clock; a rounding error asks for one more."""
    size = len(ended) + 2
    limit = StopGroup(share=share, grace=grace)(sorted(ended), size)
    enough = math.ceil(share * size - 1e-9)
    assert limit == (sorted(ended)[enough - 1] + grace if enough <= len(ended) else None)


def test_examples_by_hand() -> None:
    """Six of eight, the sixth after 210: 274 at most. 0.55 of 20 is 11, not 12."""
    policy = StopGroup(share=0.75, grace=64)
    assert policy([10, 20, 30, 40, 50], 8) is None
    assert policy([10, 20, 30, 40, 50, 210], 8) == 274
    assert policy([10, 20, 30, 40, 50, 210, 230], 8) == 274
    assert StopGroup(share=0.55, grace=0)(range(1, 12), 20) == 11


@pytest.mark.parametrize("how", [Implicit(), ShowAgain(SPECIAL)], ids=["plain", "copy"])
@pytest.mark.parametrize("grace", [0, 3])
def test_the_rest_of_a_group_is_cut(
    policy: QwenVL, prompts: list[Prompt], how: Reattention, grace: int
) -> None:
    """Bug: other rows are cut, or later, or what was sampled before the cut is another answer."""
    rule = StopGroup(share=0.5, grace=grace)
    plain, cut = generate(policy, prompts, None, how), generate(policy, prompts, rule, how)
    seen = 0
    for before, after in zip(plain, cut, strict=True):
        limit = min(sorted(lengths(before))[1] + grace, 20)
        assert lengths(after) == [min(length, limit) for length in lengths(before)]
        for one, other in zip(before, after, strict=True):
            count = len(other.sampled_ids)
            assert other.sampled_ids == one.sampled_ids[:count]
            if len(one.sampled_ids) > count:
                assert (other.stop, other.truncated) == ("cut", True)
                seen += 1
            else:
                assert other.stop == one.stop
    assert seen > 2


def everybody(self: Decoding, place: int, now: dict[int, int] | None = None) -> int | None:
    """A limit by what has ended in all groups, which is a matter of who is decoded together."""
    del place
    assert self.long_tail is not None
    ended = [len(one.ids) for one in self.rollouts if one.stop is not None] + [*(now or {}).values()]
    return self.long_tail(sorted(ended), 4) if ended else None


def test_a_cut_does_not_depend_on_what_is_decoded_together(
    policy: QwenVL, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: with another max_rows, or on another machine, other rollouts are cut."""
    rule = StopGroup(share=0.5, grace=2)

    def found(max_rows: int) -> list[Any]:
        groups = generate(policy, prompts, rule, ShowAgain(SPECIAL), max_rows)
        return [[(rollout.sampled_ids, rollout.stop) for rollout in group] for group in groups]

    assert found(64) == found(8) == found(4) == found(1)
    monkeypatch.setattr(Decoding, "_group_limit", everybody)
    assert found(64) != found(4)


def test_any_function_of_counts_will_do(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a user's function is asked before any has ended, or with lengths of another group."""
    asked: list[tuple[tuple[int, ...], int]] = []

    def never(ended: Sequence[int], size: int, /) -> int | None:
        asked.append((tuple(ended), size))
        return None

    groups = generate(policy, prompts, never, max_rows=8)
    assert groups == generate(policy, prompts, None)
    assert {size for _, size in asked} == {4}
    whole = [tuple(sorted(lengths(group))) for group in groups]
    assert all(any(ended == one[: len(ended)] for one in whole) for ended, _ in asked)
    assert {ended for ended, _ in asked if len(ended) == 4} == {*whole}


def test_cut_rollouts_count_as_truncated(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: overlong filtering, or the share of truncated answers, does not know of the new reason."""
    (group,) = generate(policy, prompts[:1], StopGroup(share=0.25, grace=1))
    reasons = [rollout.stop for rollout in group]
    assert "cut" in reasons
    scored = ScoredGroup(rollouts=group, rewards=(1.0,) * 4, parts={"a": (1.0,) * 4}, scored=(True,) * 4)
    assert scored.without_truncated().scored == tuple(reason not in ("cut", "length") for reason in reasons)
    values = summarize([scored], "<back>")
    assert values["cut"] == reasons.count("cut") / 4
    assert values["truncated"] == sum(rollout.truncated for rollout in group) / 4


def test_a_trainer_with_it(tmp_path: Path) -> None:
    """Bug: the trainer cannot give the setting to its engine."""

    def engine(policy: QwenVL) -> InProcessEngine:
        return InProcessEngine(policy=policy, long_tail=StopGroup(share=0.3, grace=0))

    sampling = SamplingParams(max_tokens=8, stop=("e",))
    result = small_rl(tmp_path, engine=engine, sampling=sampling).step(0)
    for group in result.groups:
        assert len({len(rollout.sampled_ids) for rollout in group.rollouts}) == 1
    assert result.metrics["cut"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"StopGroup.share is 0.0. It is a share of a group"),
        ({"share": 1.1}, r"StopGroup.share is 1.1"),
        ({"grace": -1}, r"StopGroup.grace is -1. It must be 0 tokens or more"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StopGroup(**settings)


@pytest.mark.parametrize("wrong", [0.5, "StopGroup", True])
def test_a_plain_value_for_long_tail_is_refused(wrong: Any) -> None:
    """Bug: `+engine.long_tail=0.5` ending in a TypeError in the middle of a rollout."""
    with pytest.raises(ValueError, match=r"engine.long_tail is .* It takes a rule such as StopGroup"):
        InProcessEngine(policy=make_policy(), long_tail=wrong)
