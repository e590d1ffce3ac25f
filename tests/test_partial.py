"""Rollouts that are left unfinished and go on in another call or step.

Equality runs in float64 on weights times 4, as in test_engine.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import ShowAgain, favour, make_policy, make_prompt, score_batch
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout import continuing, decoding
from reflectvlm.rollout.continuing import Begun, BegunGroup
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.placing import Placed
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.train.optim import AdamW
from reflectvlm.train.pending import PartialRollouts, Pending, versions_of
from reflectvlm.train.rl import DynamicSampling, RLTrainer
from reflectvlm.types import Insertion, Prompt, Rollout, SamplingParams, Text, Visual
from training import crashed, same_runs, small_brpo_copy, small_rl

SPECIAL = "<|box_start|>"
SAMPLING = SamplingParams(max_tokens=16, stop=("in",))
ACROSS = "><"
"""A tag that mostly lies across two tokens."""


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


@pytest.fixture(scope="module")
def prompts(policy: QwenVL) -> list[Prompt]:
    return [
        make_prompt(policy, 0),
        make_prompt(policy, 1, "<image> is above <image> or not?", ((64, 48), (32, 80))),
        make_prompt(policy, 2, "Which page?", ((48, 48),), "Put the final answer in a box, please."),
    ]


@dataclasses.dataclass(frozen=True)
class Back(ShowAgain):
    """In front of a tag of several tokens, which is taken back for it; with forced text behind it."""

    def __call__(self, state: Any, /) -> Insertion | None:
        given = super().__call__(state)
        return given and Insertion(before=given.before, after=(*given.after, Text(ids=state.ids(" so"))))


PROBE = VisualRoute(trigger="a").probe


@dataclasses.dataclass(frozen=True)
class Routed(ShowAgain):
    """As ShowAgain, of those visual tokens whose attention has an odd digit: a change of 1e-3 in what was
    looked at shows other ones."""

    def __call__(self, state: Any, /) -> Insertion | None:
        if (given := super().__call__(state)) is None:
            return None
        looked = state.attention(0)
        keep = tuple(((looked * 1000).long() % 2).nonzero().flatten().tolist())
        block = (Visual(image=0, keep=keep),)
        return Insertion(before=block if given.before else (), after=block if not given.before else ())


REATTENTIONS: dict[str, Reattention] = {
    "implicit": Implicit(),
    "copy, special": ShowAgain(SPECIAL),
    "copy, plain": ShowAgain("a"),
    "copy, in front, forced text": Back(ACROSS, place="before"),
    "route, special": Routed(SPECIAL, probe=PROBE),
    "route, plain": Routed("a", probe=PROBE),
    "route, in front": Routed(ACROSS, place="before", probe=PROBE, at_most=8),
    "route, as shipped": VisualRoute(trigger=SPECIAL, m=40),
    "copy, as shipped": VisualCopy(trigger=SPECIAL),
}


def whole(policy: QwenVL, prompts: Sequence[Prompt], how: Reattention) -> list[tuple[Rollout, ...]]:
    return InProcessEngine(policy=policy).generate(prompts, 4, SAMPLING, how, seed=4)


def in_parts(
    policy: QwenVL, prompts: Sequence[Prompt], how: Reattention, tokens: Sequence[int], max_rows: int = 64
) -> list[tuple[Rollout, ...]]:
    """In parts of so many tokens, and all others as long as the last."""
    parts = itertools.chain(tokens, itertools.repeat(tokens[-1]))
    engine = InProcessEngine(policy=policy, max_rows=max_rows)
    groups = [BegunGroup.fresh(prompt, 4, 4, place) for place, prompt in enumerate(prompts)]
    while not all(group.ended for group in groups):
        made = dict(engine.go_on(groups, SAMPLING, how, tokens=next(parts)))
        groups = [made[place] for place in range(len(groups))]
    return [group.finished(policy) for group in groups]


def difference(one: Sequence[tuple[Rollout, ...]], other: Sequence[tuple[Rollout, ...]]) -> float:
    """Infinite if a token, a block or a reason differs; else the largest gap of two log-probs."""
    gap = 0.0
    for a, b in zip([r for g in one for r in g], [r for g in other for r in g], strict=True):
        if (a.text, a.stop, a.offsets, len(a.spans)) != (b.text, b.stop, b.offsets, len(b.spans)):
            return float("inf")
        for left, right in zip(a.spans, b.spans, strict=True):
            if isinstance(left, Visual) or isinstance(right, Visual):
                if left != right:
                    return float("inf")
                continue
            if (left.ids, left.trained) != (right.ids, right.trained):
                return float("inf")
            gaps = [abs(x - y) for x, y in zip(left.logprobs, right.logprobs, strict=True)]
            gap = max([gap, *gaps])
    return gap


@pytest.mark.parametrize("name", REATTENTIONS)
def test_an_interrupted_rollout_is_the_uninterrupted_one(
    policy: QwenVL, prompts: list[Prompt], name: str
) -> None:
    """Bug: what goes on is another answer than the one that was begun: another position, another random
    number, a block that is gone, attention that counts only since the interruption."""
    how = REATTENTIONS[name]
    at_once = whole(policy, prompts, how)
    for tokens, max_rows in (([1], 64), ([5, 3], 4), ([4, 16], 64)):
        assert difference(in_parts(policy, prompts, how, tokens, max_rows), at_once) < 1e-5, tokens
    rollouts = [rollout for group in at_once for rollout in group]
    assert len({rollout.stop for rollout in rollouts}) > 1
    assert len({len(rollout.sampled_ids) for rollout in rollouts}) > 2
    if how.trigger is not None:
        assert sum(bool(rollout.insertions) for rollout in rollouts) > 2
    if how.trigger == ACROSS:
        assert any(not s.trained for r in rollouts for s in r.spans if isinstance(s, Text) and s.logprobs)


def restarted(real: Any) -> Any:
    """Random numbers of a continued rollout from the first one on."""

    def uniforms(seed: int, prompt: int, member: int, count: int) -> torch.Tensor:
        numbers = real(seed, prompt, member, count)
        return torch.cat([numbers[:5], numbers[: count - 5]])

    return uniforms


def late(real: Any) -> Any:
    """Everything behind the prompt one position too far."""

    def take_up(rows: Any, *others: Any) -> None:
        rows.position += 1
        real(rows, *others)

    return take_up


def without_attention(real: Any) -> Any:
    def take_up(rows: Any, *others: Any) -> None:
        real(rows, *others)
        rows.attended.zero_()

    return take_up


def without_recent(real: Any) -> Any:
    def take_up(rows: Any, *others: Any) -> None:
        real(rows, *others)
        rows.recent.zero_()

    return take_up


def without_blocks(real: Any) -> Any:
    def pieces(begun: Begun, *others: Any) -> Any:
        return real(dataclasses.replace(begun, placed=()), *others)

    return pieces


@pytest.mark.parametrize(
    ("module", "name", "mistake", "how"),
    [
        (decoding, "uniforms", restarted, "implicit"),
        (decoding, "take_up", late, "implicit"),
        (decoding, "take_up", without_attention, "route, special"),
        (decoding, "take_up", without_recent, "route, in front"),
        (continuing, "pieces", without_blocks, "copy, special"),
    ],
)
def test_the_comparison_sees_mistakes(
    policy: QwenVL,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    mistake: Callable[[Any], Any],
    how: str,
) -> None:
    at_once = whole(policy, prompts, REATTENTIONS[how])
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    gaps = [
        difference(in_parts(policy, prompts, REATTENTIONS[how], tokens), at_once) for tokens in ([1], [4, 16])
    ]
    assert max(gaps) > 1e-2


def test_a_group_waits_for_its_longest_rollout_only(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: rows of ended rollouts are decoded again, or a group is handed out before it is complete."""
    engine = InProcessEngine(policy=policy)
    groups = [BegunGroup.fresh(prompt, 4, 4, place) for place, prompt in enumerate(prompts)]
    made = dict(engine.go_on(groups, SAMPLING, Implicit(), tokens=7))
    lengths = [len(rollout.sampled_ids) for rollout in whole(policy, prompts, Implicit())[2]]
    assert sorted(lengths) == [6, 6, 13, 16]
    assert [len(one.ids) for one in made[2].rollouts] == [min(length, 7) for length in lengths]
    assert [one.stop is not None for one in made[2].rollouts] == [length <= 7 for length in lengths]
    # In its last call what has not ended is cut: 7 + 5 tokens are fewer than the budget of 16.
    last = dataclasses.replace(made[2], last=True)
    ((_, after),) = engine.go_on([last], SAMPLING, Implicit(), tokens=5)
    assert after.ended
    assert sorted((len(one.ids), one.stop) for one in after.rollouts) == [
        (6, "stop"), (6, "stop"), (12, "cut"), (12, "cut"),
    ]  # fmt: skip
    # What has ended needs no row, and a smaller budget than before ends what has used it up.
    assert list(engine.go_on([after], SAMPLING, Implicit())) == [(0, after)] or after.ended
    ((_, short),) = engine.go_on([made[2]], SamplingParams(max_tokens=7), Implicit(), tokens=5)
    assert {one.stop for one in short.rollouts} == {"stop", "length"}


# -- in training ----------------------------------------------------------------------------------


ENDING = SamplingParams(max_tokens=8, stop=("e", "o"))
"""So that answers differ in length."""


def partial_rl(root: Path, **changes: Any) -> RLTrainer:
    """Answers of up to 8 tokens in steps of 3, some of which end early: they span up to three steps."""
    settings: dict[str, Any] = {
        "partial": PartialRollouts(tokens=3, max_steps=4),
        "optimizer": AdamW(lr=1e-2),
        "steps": 6,
        "sampling": ENDING,
        "prompts_per_step": 6,
        "group_size": 2,
    }
    return small_rl(root, **settings | changes)


def partial_brpo_copy(root: Path, **changes: Any) -> RLTrainer:
    settings: dict[str, Any] = {
        "partial": PartialRollouts(tokens=4, max_steps=3),
        "steps": 6,
        "sampling": SamplingParams(max_tokens=10, stop=("</REFLECTION></REFLECTION>",)),
        "prompts_per_step": 4,
        "group_size": 2,
    }
    return small_brpo_copy(root, **settings | changes)


def old_and_new(trainer: RLTrainer, steps: int) -> list[tuple[int, int, float, float]]:
    """Steps of a trainer -> for each token trained on: its version, the current one, the batch's behaviour
    log-prob and what the current policy says of it."""
    found: list[tuple[int, int, float, float]] = []
    real = trainer.batch

    def batch(groups: Any) -> Any:
        made = real(groups)
        rollouts = [r for g in groups for r, scored in zip(g.rollouts, g.scored, strict=True) if scored]
        now = score_batch(trainer.policy, made).logprobs
        for row, rollout in enumerate(rollouts):
            mask = made.trained[row]
            values = zip(
                versions_of(rollout),
                made.old_logprobs[row][mask].tolist(),
                now[row][mask].tolist(),
                strict=True,
            )
            found.extend((version, trainer.updates, old, new) for version, old, new in values)
        return made

    vars(trainer)["batch"] = batch
    for step in range(steps):
        trainer.step(step)
    return found


def agrees(tokens: Sequence[tuple[int, int, float, float]]) -> bool:
    """Whether tokens of the current policy have ratio 1, and older ones that of the policy that drew them."""
    own = [abs(old - new) for version, current, old, new in tokens if version == current]
    older = [abs(old - new) for version, current, old, new in tokens if version < current]
    assert own
    assert older
    return max(own) < 1e-4 and sum(gap > 1e-3 for gap in older) > len(older) / 2


def test_ratios_are_against_the_policy_that_drew_each_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a continued rollout's behaviour log-probs are those of the policy that ended it, so its old tokens
    count as on-policy and the correction corrects nothing."""
    settings: dict[str, Any] = {"updates_per_step": 1, "epochs_per_step": 1}
    assert agrees(old_and_new(partial_rl(tmp_path, **settings), 4))

    real = continuing.take_up

    def recomputed(rows: Any, first: int, resumed: Any, intake: Any, remembered: int) -> None:
        real(rows, first, resumed, intake, remembered)
        for row, one in enumerate(resumed):
            if one is not None:
                batch = intake.policy.batch([(one[1], one[0].spans)])
                now = score_batch(intake.policy, batch).logprobs[batch.trained]
                rows.logprobs[row, : len(now)] = now

    monkeypatch.setattr(decoding, "take_up", recomputed)
    assert not agrees(old_and_new(partial_rl(tmp_path, **settings), 4))


def test_what_was_drawn_stays_and_is_counted(tmp_path: Path) -> None:
    """Bug: a step changes log-probs or ids of the step before; the metrics tell another share."""
    trainer = partial_rl(tmp_path, updates_per_step=1, epochs_per_step=1)
    assert trainer.pending is not None
    results = [trainer.step(0)]
    before = {one.position: one for one in trainer.pending.waiting}
    assert before, "nothing was left unfinished"
    results.append(trainer.step(1))
    after = {one.position: one for one in trainer.pending.waiting}
    for position in {*before} & {*after}:
        for old, new in zip(before[position].group.rollouts, after[position].group.rollouts, strict=True):
            assert new.ids[: len(old.ids)] == old.ids
            assert new.logprobs[: len(old.ids)] == old.logprobs
    for step in range(2, 5):
        version = trainer.updates
        results.append(trainer.step(step))
    rollouts = [rollout for group in results[-1].groups for rollout in group.rollouts]
    versions = [of for rollout in rollouts for of in versions_of(rollout)]
    assert len(versions) == sum(len(rollout.sampled_ids) for rollout in rollouts)
    metrics = results[-1].metrics
    assert metrics["partial/off_policy"] == pytest.approx(sum(v < version for v in versions) / len(versions))
    assert metrics["partial/age"] == pytest.approx(version - sum(versions) / len(versions))
    assert metrics["partial/pending"] == len(trainer.pending.waiting) > 0
    assert all(rollout.policy_version == min(versions_of(rollout)) for rollout in rollouts)
    assert any(rollout.token_versions for rollout in rollouts)
    # Three steps of 3 tokens hold any answer: what waits began in the last two steps, 6 prompts each.
    assert len(trainer.pending.waiting) <= 12


def test_with_unchanged_weights_partial_groups_are_the_plain_ones(tmp_path: Path) -> None:
    """Bug: a prompt's answers depend on whether they were made in one step or in three."""
    still = {
        "optimizer": AdamW(lr=1e-30),
        "prompts_per_step": 2,
        "updates_per_step": 1,
        "sampling": ENDING,
        "group_size": 2,
    }
    plain = small_rl(tmp_path / "plain", **still)
    wanted = {g.rollouts[0].prompt.sample.id: g for step in range(3) for g in plain.sample_groups(step)}
    trainer = partial_rl(tmp_path / "partial", **still)
    found = {g.rollouts[0].prompt.sample.id: g for step in range(6) for g in trainer.sample_groups(step)}
    assert len({*wanted} & {*found}) == 6
    for name, group in wanted.items():
        assert [r.sampled_ids for r in found[name].rollouts] == [r.sampled_ids for r in group.rollouts]
        assert found[name].rewards == group.rewards


def test_a_rollout_is_cut_after_its_last_step(tmp_path: Path) -> None:
    """Bug: an answer that never ends keeps its group waiting for ever."""
    trainer = partial_rl(tmp_path, partial=PartialRollouts(tokens=2, max_steps=2))
    groups = [group for step in range(3) for group in trainer.step(step).groups]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.stop for rollout in rollouts} >= {"cut"}
    assert max(len(rollout.sampled_ids) for rollout in rollouts) == 4
    assert all(rollout.truncated == (rollout.stop == "cut") for rollout in rollouts)


@pytest.mark.parametrize("make", [partial_rl, partial_brpo_copy])
def test_b1_resumed_with_rollouts_pending(make: Any, tmp_path: Path) -> None:
    """Bug: a run that was killed between two steps has forgotten what it had begun, or begins it again."""
    whole_run = make(tmp_path / "whole").run()
    lines = [json.loads(line) for line in (whole_run.folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("partial/pending", 0) > 0 for line in lines)
    for cut in (3, 6):
        root = tmp_path / f"cut-{cut}"
        trainer = make(root)
        crashed(trainer, type(trainer), "step", cut)
        resumed = make(root, output={"resume": "auto"})
        result = resumed.run()
        same_runs(result.folder, whole_run.folder)


def test_the_state_is_plain_json_and_comes_back(tmp_path: Path) -> None:
    """Bug: an insertion, a kept token or a log-prob is another after a checkpoint."""
    trainer = partial_rl(tmp_path)
    trainer.step(0)
    pending = trainer.pending
    assert pending is not None
    assert pending.waiting
    block = Visual(image=0, keep=(1, 3), before_sampled=True)
    placed = Placed(
        start=0, stop=2, insertion=Insertion(before=(block,), after=(Text(ids=(5,)), Visual(image=0)))
    )
    first = pending.waiting[0]
    begun = (dataclasses.replace(first.group.rollouts[0], placed=(placed,)), *first.group.rollouts[1:])
    pending.waiting[0] = dataclasses.replace(first, group=dataclasses.replace(first.group, rollouts=begun))
    state = json.loads(json.dumps(pending.state()))
    other = Pending(settings=pending.settings, policy=pending.policy)
    other.load_state(state)
    assert json.loads(json.dumps(other.state())) == state
    other.read(trainer.feed)
    assert [(one.versions, one.position, one.steps) for one in other.waiting] == [
        (one.versions, one.position, one.steps) for one in pending.waiting
    ]
    for one, same in zip(other.waiting, pending.waiting, strict=True):
        assert one.group.rollouts == same.group.rollouts
        assert (one.group.seed, one.group.number) == (same.group.seed, same.group.number)
        assert one.group.prompt.spans == same.group.prompt.spans


def test_a_step_given_up_is_taken_again(tmp_path: Path) -> None:
    """Bug: after a stop in the middle of a step the rollouts that were pending before are others."""
    trainer, other = partial_rl(tmp_path / "a"), partial_rl(tmp_path / "b")
    for step in range(2):
        trainer.step(step)
        other.step(step)
    state = trainer.state()
    asked = iter([False] * 9 + [True])
    with pytest.raises(Abandoned), abandonable(lambda: next(asked)):
        trainer.step(2)
    trainer.load_state(state)
    again, plain = trainer.step(2), other.step(2)
    assert [g.rewards for g in again.groups] == [g.rewards for g in plain.groups]
    assert again.metrics["loss"] == plain.metrics["loss"]
    assert trainer.state() == other.state()


def test_what_cannot_go_together_is_refused(tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(ValueError, match=r"PartialRollouts.tokens is 0. It must be at least 1"):
        PartialRollouts(tokens=0)
    with pytest.raises(ValueError, match="partial and dynamic_sampling are both set"):
        partial_rl(tmp_path, dynamic_sampling=DynamicSampling())
    with pytest.raises(ValueError, match=r"ScriptedEngine cannot go on with rollouts.*InProcessEngine"):
        partial_rl(tmp_path, engine=lambda policy: ScriptedEngine(policy=policy, texts=("a",))).step(0)
    trainer = partial_rl(tmp_path)
    with pytest.raises(ValueError, match=r"tokens=0 more. Ask for at least 1"):
        list(trainer.rollout_engine.go_on([], SAMPLING, Implicit(), tokens=0))  # type: ignore[attr-defined]
    trainer.step(0)
    small_rl(tmp_path).load_state(trainer.state())
    assert "groups that are begun are dropped: partial is not set" in caplog.text


@pytest.mark.parametrize("wrong", [True, 256])
def test_a_plain_value_for_partial_is_refused(wrong: Any, tmp_path: Path) -> None:
    """Bug: `+partial=true` passing all checks and ending in an AttributeError at the first step."""
    with pytest.raises(ValueError, match=r"partial is .* It takes PartialRollouts, in a recipe \{_target_:"):
        small_rl(tmp_path, partial=wrong)
