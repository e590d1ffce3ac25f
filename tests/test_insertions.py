"""What COPY and ROUTE insert: the trainer sees it where the engine put it, it counts nowhere, and tags of
several tokens find their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fixtures import favour, make_policy, sequences_of
from reattending import SPECIAL, TOLERANCE, exact, generate, prompts, ratio_gap, reattentions, spelled
from reflectvlm.batch import Batch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import ClippedSurrogate
from reflectvlm.protocols import DecodeState, Reattention
from reflectvlm.reattention import VisualCopy, VisualRoute
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.placing import place_insertions
from reflectvlm.train.optim import AdamW
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import Updater
from reflectvlm.types import Insertion, Prompt, Rollout, SamplingParams, Text, Visual

# -- engine and trainer ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(reattentions()))
def test_ratio_is_one_before_every_update(name: str) -> None:
    """A block the trainer sees elsewhere, or not at all; weights that a later rollout did not see."""
    policy = favour(make_policy(dtype=torch.float64), [SPECIAL], 4)
    updater = Updater(
        policy=policy,
        objective=ClippedSurrogate(),
        optimizer=AdamW(lr=1e-3).build(policy.module.parameters()),
        runtime=Runtime(),
        micro_tokens=400,
        max_grad_norm=1.0,
    )
    given = prompts(policy)[:3] if name == "copy, last image" else prompts(policy)
    for _ in range(3):
        rollouts = generate(policy, given, reattentions()[name])
        batch = policy.batch(sequences_of([rollouts]))
        assert ratio_gap(policy, batch) < TOLERANCE
        advantages = torch.linspace(-1, 1, len(batch), dtype=torch.float64)
        updater(dataclasses.replace(batch, advantages=advantages), 1e-3)
        assert ratio_gap(policy, batch) > TOLERANCE, "the update changed nothing"


@pytest.mark.parametrize("reattention", [VisualCopy(trigger="a"), VisualRoute(trigger="a", m=40)], ids=str)
def test_ratio_is_one_in_float32(reattention: Reattention) -> None:
    """The same at the precision of a usual run, with weights of a usual size."""
    policy = make_policy(gain=1.0)
    rollouts = generate(policy, prompts(policy), reattention)
    assert any(rollout.insertions for rollout in rollouts)
    assert ratio_gap(policy, policy.batch(sequences_of([rollouts]))) < TOLERANCE


def trigger_from_block(batch: Batch) -> Batch:
    left = (torch.arange(batch.ids.shape[1]) - 1).clamp(min=0).expand_as(batch.ids)
    return dataclasses.replace(batch, predictor=left)


def positions_off_by_one(batch: Batch) -> Batch:
    block = (batch.visual >= 0) & (batch.trained.long().cumsum(1) > 0)
    return dataclasses.replace(batch, positions=batch.positions + (block.long().cumsum(1) > 0))


def features_permuted(batch: Batch) -> Batch:
    """The features of inserted blocks in the wrong order."""
    visual = batch.visual.clone()
    inserted = (visual >= 0) & (batch.trained.long().cumsum(1) > 0)
    for row in range(len(batch)):
        visual[row, inserted[row]] = visual[row, inserted[row]].flip(0)
    return dataclasses.replace(batch, visual=visual)


def block_in_the_loss(batch: Batch) -> Batch:
    inserted = (batch.visual >= 0) & (batch.trained.long().cumsum(1) > 0)
    return dataclasses.replace(batch, trained=batch.trained | inserted)


MISTAKES = [trigger_from_block, positions_off_by_one, features_permuted, block_in_the_loss]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["copy, special", "route, special"])
def test_ratio_sees_mistakes(name: str, mistake: Callable[[Batch], Batch]) -> None:
    """Each of them must fail the test above by far."""
    policy = exact()
    batch = policy.batch(sequences_of([generate(policy, prompts(policy)[:3], reattentions()[name])]))
    assert ratio_gap(policy, batch) < TOLERANCE < 1000 * TOLERANCE < ratio_gap(policy, mistake(batch))


# -- what is inserted and what is trained ---------------------------------------------------------


def test_what_is_inserted_counts_nowhere() -> None:
    """Visual and forced tokens in the loss, in a length, in the text or in the budget of tokens."""
    policy = exact()
    for reattention in (VisualCopy(trigger=SPECIAL), VisualCopy(trigger=SPECIAL, close="<|box_end|>")):
        rollouts = generate(policy, prompts(policy)[:3], reattention, tokens=16)
        for rollout in rollouts:
            assert len(rollout.sampled_ids) == 16 or rollout.stop == "eos"
            batch = policy.batch([(rollout.prompt, rollout.spans)])
            assert int(batch.num_tokens) == len(rollout.sampled_ids)
            trained = batch.trained[0]
            assert not (trained & (batch.visual[0] >= 0)).any()
            assert tuple(batch.ids[0][trained].tolist()) == rollout.sampled_ids
            assert "<|image_pad|>" not in rollout.text
            if reattention.close:
                assert rollout.text.count(SPECIAL) <= rollout.text.count(f"{SPECIAL}<|box_end|>") + (
                    rollout.text.endswith(SPECIAL)
                )


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_tag_of_several_tokens(place: str) -> None:
    """In front: the pieces are taken back and come again behind the block, and only the first of them
    is trained, from the last token before the block. Behind: right after the last piece."""
    policy = exact()
    tag = spelled()
    copied = VisualCopy(trigger=tag, place=place, limit=1)  # type: ignore[arg-type]
    rollouts = generate(policy, prompts(policy), copied)
    found = 0
    for rollout in rollouts:
        at = next((i for i, span in enumerate(rollout.spans) if isinstance(span, Visual)), None)
        if at is None:
            continue
        found += 1
        around = rollout.spans
        before = around[at - 1]
        assert isinstance(before, Text)
        if place == "after":
            assert policy.decode(before.ids).endswith(tag)
            continue
        rest = [span for span in around[at:] if isinstance(span, Text)]
        assert tag in policy.decode([i for span in rest for i in span.ids])
        assert tag not in policy.decode(before.ids)
        assert [span.trained for span in rest[:3]] == [True, False, True]
        assert len(rest[0].ids) == 1
        assert len(rest[1].ids) == 2
        assert len(rollout.sampled_ids) == 16 or rollout.stop == "eos"
    assert found


# -- what cannot be shown or asked ----------------------------------------------------------------


def test_an_image_or_layer_that_is_not_there() -> None:
    policy = exact()
    with pytest.raises(ValueError, match=r"names image 2, but sample 'sample-0' has 1"):
        generate(policy, prompts(policy)[:1], VisualCopy(trigger=SPECIAL, images=[2]))
    with pytest.raises(ValueError, match=r"names layer 4, but the model has 4: 0 to 3"):
        generate(policy, prompts(policy)[:1], VisualRoute(trigger=SPECIAL, layers=[4]))


def test_attention_without_a_probe_is_refused() -> None:
    """A re-attention that asks late would get zeros."""
    policy = exact()

    @dataclasses.dataclass(frozen=True)
    class Unprepared:
        trigger: str = SPECIAL
        probe: None = None

        def __call__(self, state: DecodeState, /) -> Insertion | None:
            state.attention(0)
            return None

    with pytest.raises(ValueError, match=r"has probe=None\. Give it an AttentionProbe"):
        generate(policy, prompts(policy)[:1], Unprepared())


@dataclasses.dataclass(frozen=True)
class Bare:
    """Returns a span where an `Insertion` is wanted."""

    trigger: str = SPECIAL
    probe: None = None

    def __call__(self, state: DecodeState, /) -> Visual:
        del state
        return Visual(image=0)


def test_what_returns_no_insertion_is_refused() -> None:
    """An AttributeError from the middle of a rollout, or a model that was trained without any."""
    policy = exact()
    with pytest.raises(ValueError, match=r"re-attention returned Visual\(.*Return Insertion\(before="):
        generate(policy, prompts(policy)[:1], Bare())  # type: ignore[arg-type]


# -- answers that are drawn as told ---------------------------------------------------------------


def told(policy: QwenVL, prompt: Prompt, ids: Sequence[int], reattention: Reattention) -> Rollout:
    """The engine's rollout when these ids are all that is left to draw."""
    step = iter(ids)
    inner = QwenVL.logits

    def logits(hidden: Tensor) -> Tensor:
        made = inner(policy, hidden)
        return torch.full_like(made, float("-inf")).index_fill(1, torch.tensor([next(step)]), 0.0)

    vars(policy)["logits"] = logits
    try:
        (rollout,) = generate(policy, [prompt], reattention, n=1, tokens=len(ids))
    finally:
        del vars(policy)["logits"]
    return rollout


BACK = "<back>"


def tagged(policy: QwenVL, *words: str) -> list[int]:
    return [i for word in words for i in policy.tokenizer.encode(word, add_special_tokens=False)]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("m", [40, 100])
def test_a_tag_of_several_tokens_twice(place: str, m: float) -> None:
    """What a tag that was taken back had attended to must not count, and what it attends to behind its
    block must: engine and pass would choose differently at the next tag."""
    policy = exact()
    ids = tagged(policy, "one two", BACK, " three", BACK, "four five six", BACK, " seven")
    route = VisualRoute(trigger=BACK, m=m, place=place)  # type: ignore[arg-type]
    for prompt in prompts(policy)[:2]:
        rollout = told(policy, prompt, ids, route)
        assert rollout.sampled_ids == tuple(ids)
        assert rollout.text == policy.decode(ids)
        assert len(rollout.insertions) == 3 * len(prompt.patches)
        (placed,) = place_insertions(policy, [(prompt, ids)], route)
        spans = [span for one in placed for span in (*one.insertion.before, *one.insertion.after)]
        assert [(s.image, s.keep) for s in spans if isinstance(s, Visual)] == [
            (s.image, s.keep) for s in rollout.insertions
        ]


@pytest.mark.parametrize("place", ["before", "after"])
def test_tags_that_share_a_token(place: str) -> None:
    """`<back><back>` is `<`, `back`, `><`, `back`, `>` here: a tag taken back for its block would take
    with it the end of the tag before, which has a block already."""
    policy = exact()
    ids = tagged(policy, "one", BACK + BACK, "two")
    assert len(ids) < len(tagged(policy, "one", BACK, BACK, "two")), "the tags share no token"
    copied = VisualCopy(trigger=BACK, place=place)  # type: ignore[arg-type]
    prompt = prompts(policy)[0]
    rollout = told(policy, prompt, ids, copied)
    assert rollout.sampled_ids == tuple(ids)
    assert rollout.text == policy.decode(ids)
    assert len(rollout.insertions) == 1
    assert [(one.start, one.stop) for one in place_insertions(policy, [(prompt, ids)], copied)[0]] == [(1, 4)]


def test_forced_words_are_nobody_s_tokens() -> None:
    """A reward over the tokens of a block would pay for words that were put into the policy's mouth."""
    policy = exact()
    ids = tagged(policy, "one", BACK, "two", "</back>", "three")
    closing = VisualCopy(trigger=BACK, close="Looking once more.</back>", limit=1)
    rollout = told(policy, prompts(policy)[0], ids, closing)
    assert rollout.text == "one<back>Looking once more.</back>two</back>three"
    assert rollout.sampled_ids == tuple(ids)
    start, end = rollout.text.index("Looking"), rollout.text.index("two")
    assert rollout.tokens_between(start, end) == 0
    assert rollout.tokens_between(0, len(rollout.text)) == len(ids)
    with pytest.raises(ValueError, match=r"spells '<\|image_pad\|>', which stands for pixels or ends a turn"):
        told(policy, prompts(policy)[0], ids, VisualCopy(trigger=BACK, close="<|image_pad|>"))


def test_a_stream_tells_blocks_where_they_stand() -> None:
    """Forced text told before the block it stands behind."""
    policy = exact()
    prompt = prompts(policy)[0]
    given = SamplingParams(max_tokens=16)
    for reattention in (
        VisualCopy(trigger=SPECIAL, close="<|box_end|>"),
        VisualCopy(trigger=SPECIAL),
        VisualCopy(trigger="a", close=" yes"),
    ):
        told_as = list(InProcessEngine(policy=policy).stream(prompt, given, reattention, seed=1))
        rollout = told_as.pop()
        assert isinstance(rollout, Rollout)
        assert rollout.insertions
        told_blocks, text = [], ""
        for piece in told_as:
            if isinstance(piece, str):
                text += piece
            else:
                told_blocks.append((len(text), piece))
        assert text == rollout.text
        wanted, so_far = [], ()
        for span in rollout.spans:
            if isinstance(span, Text):
                so_far += span.ids
            else:
                wanted.append((len(policy.decode(so_far)), span))
        assert told_blocks == wanted
