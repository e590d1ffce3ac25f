"""F5 and F6: policies that say what they should not, for every kind of re-attention.

A policy is made to want some tokens by turning their rows of the (tied) head into the mean direction of
its hidden states: then their logits lie near a level of our choice in every state, for the engine and
the trainer alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fixtures import make_policy, make_prompt, score_batch, sequences_of
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import ClippedSurrogate
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rewards.reflection import brpo_rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.types import Prompt, Rollout, SamplingParams, Text
from training import small_rl

TOLERANCE = 1e-5
SPECIAL = "<|box_end|>"
"""Without an "a", which is the trigger in plain text."""
PIXELS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
ENDS = ("<|im_end|>", "<|endoftext|>")
REATTENTIONS: dict[str, Reattention] = {
    "implicit": Implicit(),
    "copy": VisualCopy(trigger=SPECIAL),
    "copy, plain": VisualCopy(trigger="a"),
    "route": VisualRoute(trigger=SPECIAL, m=40),
    "route, plain": VisualRoute(trigger="a", m=40),
}
TRIGGERS = ["copy", "copy, plain", "route", "route, plain"]


@functools.cache
def direction() -> torch.Tensor:
    """v with hidden state · v near 1 in the states of the unchanged policy, their mean m over m · m."""
    policy = make_policy(gain=1.0, dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return QwenVL.logits(policy, hidden)

    vars(policy)["logits"] = logits
    rollouts_of(policy, Implicit(), tokens=12)
    mean = torch.cat(seen).mean(0)
    return mean / mean.square().sum()


def wants(levels: dict[str | int, float]) -> QwenVL:
    """A fresh policy in which these tokens' logits are about so large; all others lie within ±4."""
    policy = make_policy(gain=1.0, dtype=torch.float64)
    with torch.no_grad():
        for token, level in levels.items():
            row = token if isinstance(token, int) else id_of(policy, token)
            policy.model.lm_head.weight[row] = level * direction()
    return policy


def id_of(policy: QwenVL, token: str) -> int:
    (number,) = policy.tokenizer.encode(token, add_special_tokens=False)
    return int(number)


def prompts(policy: QwenVL) -> list[Prompt]:
    return [
        make_prompt(policy, 0),
        make_prompt(policy, 1, "Is <image> above <image>?", ((64, 48), (32, 80))),
        make_prompt(policy, 2, "One?", ()),
    ]


def rollouts_of(
    policy: QwenVL, reattention: Reattention, *, tokens: int = 12, n: int = 3, given: Sequence[Prompt] = ()
) -> list[Rollout]:
    groups = InProcessEngine(policy=policy, max_rows=2 * n).generate(
        given or prompts(policy), n, SamplingParams(max_tokens=tokens), reattention, seed=1
    )
    return [rollout for group in groups for rollout in group]


def check_agreement(policy: QwenVL, rollouts: Sequence[Rollout]) -> None:
    """Rollout and update give every sampled token the same, finite log-prob."""
    batch = policy.batch(sequences_of([rollouts]))
    made = score_batch(policy, batch).logprobs
    assert batch.old_logprobs.isfinite().all()
    assert (made - batch.old_logprobs).abs().max() < TOLERANCE
    assert int(batch.num_tokens) == sum(len(rollout.sampled_ids) for rollout in rollouts)


def check_step(tmp_path: Path, policy: QwenVL, reattention: Reattention, tokens: int = 8) -> None:
    """The trainer's step on what such a policy says is finite, with ratios of 1 before it."""

    def places(group: Sequence[Rollout]) -> list[float]:
        return [float(place) for place, _ in enumerate(group)]

    rubric = brpo_rubric(extra={"place": places}, extra_weights={"place": 1.0})
    trainer = small_rl(
        tmp_path,
        policy=policy,
        reattention=reattention,
        rubric=rubric,
        objective=ClippedSurrogate(),
        updates_per_step=1,
        epochs_per_step=1,
        sampling=SamplingParams(max_tokens=tokens),
    )
    result = trainer.step(0)
    assert all(all(group.scored) for group in result.groups)
    assert result.metrics["ratio_gap"] < 1e-4
    assert math.isfinite(result.metrics["loss"])
    assert math.isfinite(result.metrics["grad_norm"])
    assert all(bool(parameter.isfinite().all()) for parameter in policy.module.parameters())


# -- F5 special tokens ----------------------------------------------------------------------------


def special_ids(policy: QwenVL) -> dict[str, int]:
    return {token: int(number) for token, number in policy.tokenizer.get_added_vocab().items()}


def wants_everything_special(level: float = 12.0) -> QwenVL:
    """Every special token and every row of the embedding that no token owns; `<|image_pad|>` most."""
    plain = make_policy(gain=1.0)
    spare = range(len(plain.tokenizer), plain.model.lm_head.weight.shape[0])
    assert len(spare) > 100
    wanted = dict.fromkeys((*special_ids(plain).values(), *spare), level)
    ends = dict.fromkeys((special_ids(plain)[token] for token in ENDS), level - 2)
    return wants(wanted | ends | {special_ids(plain)["<|image_pad|>"]: level + 5})


@pytest.mark.parametrize("name", REATTENTIONS)
def test_f5_every_special_token_is_masked_or_text(name: str, tmp_path: Path) -> None:
    """Bug: a sampled `<|image_pad|>` makes tokens and features disagree; one of the spare ids cannot be
    decoded; a sampled `<|im_start|>` or a second end counts in the rollout and not in the update."""
    policy = wants_everything_special()
    rollouts = rollouts_of(policy, REATTENTIONS[name])
    known = special_ids(policy)
    text_like = {number for token, number in known.items() if token not in (*PIXELS, *ENDS)}
    sampled = {number for rollout in rollouts for number in rollout.sampled_ids}
    assert not sampled & {*policy.reserved_ids}
    assert text_like <= sampled, "some were never said, so this proved little"
    check_agreement(policy, rollouts)
    for rollout in rollouts:
        assert "<|image_pad|>" not in rollout.text
        assert rollout.text == policy.decode([i for i in written(rollout) if i not in policy.end_ids])
        assert rollout.count("<|im_start|>") == rollout.sampled_ids.count(known["<|im_start|>"])
        assert (rollout.stop == "eos") == (rollout.sampled_ids[-1] in policy.end_ids)
        assert not {*rollout.sampled_ids[:-1]} & {*policy.end_ids}
    if name in ("copy", "route"):
        assert any(rollout.insertions for rollout in rollouts)
    check_step(tmp_path, policy, REATTENTIONS[name])


def written(rollout: Rollout) -> list[int]:
    return [number for span in rollout.spans if isinstance(span, Text) for number in span.ids]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("wanted", [*PIXELS, -1])
def test_f5_an_id_that_stands_for_pixels_or_nothing_is_never_said(
    wanted: str | int, temperature: float
) -> None:
    """Bug: the one thing that the policy wants, with a logit of 30, is a token that it must not say: the
    ban holds at every temperature, and what is left has finite log-probs."""
    last = make_policy().model.lm_head.weight.shape[0] - 1
    policy = wants({last if wanted == -1 else wanted: 30.0})
    banned = last if isinstance(wanted, int) else id_of(policy, wanted)
    groups = InProcessEngine(policy=policy).generate(
        prompts(policy), 2, SamplingParams(max_tokens=10, temperature=temperature), Implicit(), seed=1
    )
    batch = policy.batch(sequences_of(groups))
    assert not bool((batch.ids[batch.trained] == banned).any())
    made = score_batch(policy, batch, temperature or 1.0).logprobs
    assert (made - batch.old_logprobs).abs().max() < TOLERANCE


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", REATTENTIONS)
def test_f5_either_end_ends_and_is_no_text(name: str, end: str) -> None:
    """Bug: generation goes on behind the second of two end tokens, or its text is graded."""
    policy = wants({end: 8.0, SPECIAL: 7.0})
    rollouts = rollouts_of(policy, REATTENTIONS[name], tokens=50)
    assert all(rollout.stop == "eos" for rollout in rollouts)
    assert {rollout.sampled_ids[-1] for rollout in rollouts} >= {id_of(policy, end)}
    assert not any(token in rollout.text for rollout in rollouts for token in ENDS)
    check_agreement(policy, rollouts)


@pytest.mark.parametrize("trigger", ["<|image_pad|>", "<|im_end|>", "<|endoftext|>"])
def test_f5_a_trigger_that_cannot_be_said_is_refused(trigger: str) -> None:
    """Bug: a run with COPY in which nothing is ever inserted."""
    policy = make_policy()
    with pytest.raises(ValueError, match=r"stands for pixels or ends a turn.*Give a tag of its own"):
        rollouts_of(policy, VisualCopy(trigger=trigger))


# -- F6 no end, nothing but an end, one token for ever --------------------------------------------


@pytest.mark.parametrize("name", REATTENTIONS)
def test_f6_a_policy_that_never_ends(name: str, tmp_path: Path) -> None:
    """Bug: a row that has no end outlives the token budget, or counts as ended."""
    policy = wants(dict.fromkeys(ENDS, -60.0) | {SPECIAL: 3.0, "a": 3.0})
    rollouts = rollouts_of(policy, REATTENTIONS[name], tokens=30)
    assert all(rollout.stop == "length" for rollout in rollouts)
    assert all(len(rollout.sampled_ids) == 30 for rollout in rollouts)
    assert name == "implicit" or any(rollout.insertions for rollout in rollouts)
    check_agreement(policy, rollouts)
    check_step(tmp_path, policy, REATTENTIONS[name])


@pytest.mark.parametrize("name", REATTENTIONS)
def test_f6_a_policy_that_ends_at_once(name: str, tmp_path: Path) -> None:
    """Bug: an empty answer has no text, no offsets and no tokens between them; one that still brings a
    block, or whose only token does not train."""
    policy = wants({"<|im_end|>": 40.0})
    rollouts = rollouts_of(policy, REATTENTIONS[name])
    for rollout in rollouts:
        assert rollout.sampled_ids == (id_of(policy, "<|im_end|>"),)
        assert (rollout.text, rollout.stop, rollout.insertions) == ("", "eos", ())
        assert rollout.tokens_between(0, 10) in (0, 1)
    check_agreement(policy, rollouts)
    check_step(tmp_path, policy, REATTENTIONS[name])


@pytest.mark.parametrize("name", REATTENTIONS)
@pytest.mark.parametrize("token", [" the", SPECIAL, "a"])
def test_f6_one_token_to_the_limit(name: str, token: str) -> None:
    """Bug: a row of equal tokens is cut where the text repeats, or its tags are not found one by one. A
    policy whose every token is the trigger is given a block at every step but the last."""
    policy = wants({token: 40.0})
    rollouts = rollouts_of(policy, REATTENTIONS[name], tokens=10)
    fires = REATTENTIONS[name].trigger == token
    for rollout in rollouts:
        assert rollout.sampled_ids == (id_of(policy, token),) * 10
        assert (rollout.text, rollout.stop) == (token * 10, "length")
        assert len(rollout.insertions) == (9 if fires else 0) * len(rollout.prompt.patches)
    check_agreement(policy, rollouts)


@pytest.mark.parametrize("name", TRIGGERS)
def test_f6_a_trigger_at_every_step_trains(name: str, tmp_path: Path) -> None:
    """Bug: a row that is almost all blocks has other positions in the update than in the rollout."""
    reattention = REATTENTIONS[name]
    policy = wants({str(reattention.trigger): 40.0})
    check_step(tmp_path, policy, reattention)


@pytest.mark.parametrize("make", [VisualCopy, VisualRoute])
@pytest.mark.parametrize("trigger", [SPECIAL, "a"])
def test_f6_limit_and_budget_hold_at_every_step(make: type, trigger: str) -> None:
    """Bug: a limit that counts tags and not insertions; a budget that the last block passes. A 64 x 64
    page has 16 tokens and two around them: 18 for COPY; at m = 40 7 are shown, or all 16 by the first tag,
    which has attended to nothing yet."""
    policy = wants({trigger: 40.0})
    given = prompts(policy)[:1]
    settings = {"m": 40} if make is VisualRoute else {}
    for limit in (0, 1, 3):
        rollouts = rollouts_of(policy, make(trigger=trigger, limit=limit, **settings), given=given)
        assert [len(rollout.insertions) for rollout in rollouts] == [limit] * 3
        check_agreement(policy, rollouts)
    # COPY: 3 * 18 = 54 fit and a fourth does not; ROUTE: 18 + 4 * 9 = 54.
    rollouts = rollouts_of(policy, make(trigger=trigger, budget=54, **settings), given=given)
    wanted = 5 if make is VisualRoute else 3
    assert [len(rollout.insertions) for rollout in rollouts] == [wanted] * 3
    rollouts = rollouts_of(policy, make(trigger=trigger, budget=53, **settings), given=given)
    assert [len(rollout.insertions) for rollout in rollouts] == [wanted - 1] * 3
    check_agreement(policy, rollouts)


@pytest.mark.parametrize("name", TRIGGERS)
def test_f6_a_row_ends_where_the_model_s_context_does(name: str) -> None:
    """Bug: with a block at every step 512 tokens of budget are 10,000 of memory, at positions that the model
    has never seen. A row may pass its context by one block and not more, and counts as cut."""
    reattention = REATTENTIONS[name]
    policy = wants({str(reattention.trigger): 40.0})
    context = 160
    policy.model.config.text_config.max_position_embeddings = context
    given = prompts(policy)
    rollouts = rollouts_of(policy, reattention, tokens=60, given=given)
    for rollout in rollouts:
        row = policy.batch([(rollout.prompt, rollout.spans)])
        # What the row held when its last token was drawn; two blocks of 12 + 2 and 10 + 2, and a tag.
        held = int(row.attention.sum()) - 1
        assert rollout.stop == "length"
        if rollout.prompt.patches:
            assert context <= held < context + 26 + 1
            assert len(rollout.sampled_ids) < 60
        else:
            assert len(rollout.sampled_ids) == 60
    check_agreement(policy, rollouts)
