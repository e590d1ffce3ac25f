"""COPY and ROUTE against stock Qwen2.5-VL, and between the engine and the trainer. The other families are in
`test_families.py`, with the same oracles.

The oracles share nothing with the engine: COPY is the stock model given the image again at that place
through its own multi-image path; ROUTE is that sequence without the columns of the tokens left out;
ROUTE's choice is the stock model's eager attention.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fixtures import favour, make_policy, make_prompt, score_batch, sequences_of
from reflectvlm.batch import Batch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import ClippedSurrogate
from reflectvlm.protocols import DecodeState, Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.looking import looks
from reflectvlm.rollout.placing import place_insertions
from reflectvlm.train.optim import AdamW
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import Updater
from reflectvlm.types import AttentionProbe, Insertion, Prompt, Rollout, SamplingParams, Span, Text, Visual

TOLERANCE = 1e-5
SPECIAL = "<|box_start|>"
SIZES = (((64, 64),), ((64, 48), (32, 80)), ((48, 48),), ())


@functools.cache
def exact() -> QwenVL:
    """float64 and large weights: a mistake of one position is 1e-2, rounding 1e-6."""
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


def prompts(policy: QwenVL) -> list[Prompt]:
    return [
        make_prompt(policy, i, "Is <image> above <image>?" if len(sizes) == 2 else "Which page?", sizes)
        for i, sizes in enumerate(SIZES)
    ]


def generate(
    policy: QwenVL, given: Sequence[Prompt], reattention: Reattention, *, n: int = 3, tokens: int = 16
) -> list[Rollout]:
    engine = InProcessEngine(policy=policy, max_rows=2 * n)
    groups = engine.generate(given, n, SamplingParams(max_tokens=tokens), reattention, seed=1)
    return [rollout for group in groups for rollout in group]


@functools.cache
def spelled() -> str:
    """A trigger in plain text of several tokens that the policy samples: found in what it says without
    re-attention, since the same seed says the same until the first insertion."""
    policy = exact()
    for rollout in generate(policy, prompts(policy), Implicit()):
        ids = rollout.sampled_ids[4:7]
        text = policy.decode(ids)
        if rollout.prompt.patches and text.isascii() and rollout.text.count(text) == 1 and "<|" not in text:
            return text
    raise AssertionError("no text serves as a trigger")


# -- the stock model as an oracle -----------------------------------------------------------------


def stock_ids(policy: QwenVL, rollout: Rollout) -> tuple[Tensor, list[int], list[Tensor]]:
    """Ids of prompt and answer with every block written out in full; the image of each block in order;
    and for each block which of its columns are kept."""
    ids: list[int] = []
    images: list[int] = []
    kept: list[Tensor] = []
    start, pad, end = policy.vision
    for span in rollout.sequence:
        if isinstance(span, Text):
            ids += span.ids
            continue
        cells = rollout.prompt.grids[span.image].tokens
        first = len(ids) + 1
        ids += [start, *[pad] * cells, end]
        images.append(span.image)
        chosen = range(cells) if span.keep is None else span.keep
        kept.append(torch.tensor([first + cell for cell in chosen], device=policy.device, dtype=torch.long))
    return torch.tensor(ids, device=policy.device)[None], images, kept


def stock_logits(policy: QwenVL, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(logits, ids) of the whole sequence by the stock model, with only the kept columns of each block."""
    ids, images, kept = stock_ids(policy, rollout)
    model = policy.model
    model.model.rope_deltas = None
    grids = [rollout.prompt.grids[image] for image in images]
    sides = [(g.frames, 2 * g.rows, 2 * g.columns) for g in grids]
    thw = torch.tensor(sides, device=policy.device).reshape(-1, 3)
    types = (ids == policy.vision.pad).int()
    if all(len(k) == g.tokens for k, g in zip(kept, grids, strict=True)):
        pictures = {}
        if images:
            pixels = torch.cat([rollout.prompt.patches[image].pixels for image in images])
            pixels = pixels.to(policy.device, model.dtype)
            pictures = {"pixel_values": pixels, "image_grid_thw": thw}
        with torch.no_grad():
            return model(input_ids=ids, mm_token_type_ids=types, **pictures).logits[0], ids[0]
    positions, _ = model.model.get_rope_index(ids, types, thw)
    with torch.no_grad():
        pixels = torch.cat([rollout.prompt.patches[image].pixels for image in images])
        pixels = pixels.to(policy.device, model.dtype)
        made = model.model.get_image_features(pixels, thw, return_dict=True)
        features = torch.cat(list(made.pooler_output))
        embedded = model.get_input_embeddings()(ids).masked_scatter((types > 0)[..., None], features)
        inside = types[0] > 0
        keep = ~inside
        keep[torch.cat(kept)] = True
        columns = keep.nonzero().flatten()
        layers = getattr(
            made, "deepstack_features", ()
        )  # of all images or, in later versions, image by image
        whole = (layer if isinstance(layer, Tensor) else torch.cat(layer) for layer in layers)
        deep = [layer[keep[inside]] for layer in whole]
        added = {"visual_pos_masks": inside[columns][None], "deepstack_visual_embeds": deep} if deep else {}
        out = model.model.language_model(
            inputs_embeds=embedded[:, columns], position_ids=positions[:, :, columns], **added
        )
        logits = model.lm_head(out.last_hidden_state)
    return logits[0], ids[0, columns]


def stock_logprobs(policy: QwenVL, rollout: Rollout) -> list[float]:
    """Log-prob of each sampled id, that of a tag behind a block from the column before the block."""
    logits, ids = stock_logits(policy, rollout)
    logits = logits.float().index_fill(-1, policy.banned, float("-inf"))
    found: list[float] = []
    place = 0
    predictor = -1
    for span in rollout.sequence:
        if isinstance(span, Visual):
            width = 2 + (rollout.prompt.grids[span.image].tokens if span.keep is None else len(span.keep))
            if not span.before_sampled:
                predictor = place + width - 1
            place += width
            continue
        for token in span.ids:
            if span.trained:
                found.append(float(logits[predictor].log_softmax(-1)[token]))
            assert int(ids[place]) == token
            predictor = place
            place += 1
    return found


def trained_logprobs(rollout: Rollout) -> list[float]:
    return [x for span in rollout.spans if isinstance(span, Text) and span.trained for x in span.logprobs]


def difference(policy: QwenVL, rollouts: Sequence[Rollout]) -> float:
    gaps = [
        abs(a - b)
        for rollout in rollouts
        for a, b in zip(trained_logprobs(rollout), stock_logprobs(policy, rollout), strict=True)
    ]
    return max(gaps)


def reattentions() -> dict[str, Reattention]:
    return {
        "copy, special": VisualCopy(trigger=SPECIAL),
        "copy, special, behind": VisualCopy(trigger=SPECIAL, place="after"),
        "copy, last image": VisualCopy(trigger=SPECIAL, images=[0]),
        "copy, plain": VisualCopy(trigger="a"),
        "copy, spelled": VisualCopy(trigger=spelled()),
        "copy, spelled, in front": VisualCopy(trigger=spelled(), place="before"),
        "route, special": VisualRoute(trigger=SPECIAL, m=40),
        "route, plain": VisualRoute(trigger="a", m=30, layers=[-1], heads="max"),
        "route, spelled": VisualRoute(trigger=spelled(), m=50),
        "route, spelled, in front": VisualRoute(trigger=spelled(), m=50, place="before"),
        "vision-only": VisualCopy(trigger=SPECIAL, close="<|box_end|>"),
        "implicit": Implicit(),
    }


@pytest.mark.parametrize("name", list(reattentions()))
def test_decoding_with_blocks_is_the_stock_model_given_the_image_again(name: str) -> None:
    """Ids, positions or features of a block that are not those a stock model would see there; a cache
    that moved a neighbour; rows insert at different steps, several times, and are replaced."""
    policy = exact()
    given = prompts(policy)
    reattention = reattentions()[name]
    if name == "copy, last image":
        given = given[:3]
    rollouts = generate(policy, given, reattention)
    assert difference(policy, rollouts) < TOLERANCE
    if name != "implicit":
        assert any(rollout.insertions for rollout in rollouts), "nothing was inserted: this proved nothing"


@pytest.mark.parametrize("name", ["copy, special", "copy, plain", "route, special"])
def test_logits_are_the_stock_models_in_float32(name: str) -> None:
    """All logits of a row, not only those of what was sampled, at the precision of a usual CPU run."""
    policy = make_policy(gain=1.0)
    trigger = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    seen: list[Tensor] = []
    inner = policy.logits

    def logits(hidden: Tensor) -> Tensor:
        """The engine's own, but at two steps only the trigger is left to draw."""
        seen.append(inner(hidden))
        if len(seen) not in (6, 13):
            return seen[-1]
        return torch.full_like(seen[-1], float("-inf")).index_fill(1, torch.tensor([trigger]), 0.0)

    vars(policy)["logits"] = logits
    blocks = 0
    for prompt in prompts(policy)[:3]:
        seen.clear()
        (rollout,) = generate(policy, [prompt], reattentions()[name], n=1, tokens=24)
        blocks += len(rollout.insertions)
        stock, _ = stock_logits(policy, rollout)
        stock = stock.float().index_fill(-1, policy.banned, float("-inf"))
        row = policy.batch([(rollout.prompt, rollout.spans)])
        predictors = row.predictor[row.trained]
        made = torch.cat(seen)
        finite = torch.isfinite(made)
        assert torch.equal(finite, torch.isfinite(stock[predictors]))
        assert (made - stock[predictors])[finite].abs().max() < TOLERANCE
    assert blocks >= 3


# -- ROUTE's choice -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Looking:
    """Shows the whole first image and writes down what it was told about attention."""

    trigger: str
    probe: AttentionProbe
    seen: list[tuple[Prompt, int, tuple[Tensor, ...]]]

    def __call__(self, state: DecodeState, /) -> Insertion | None:
        images = range(len(state.prompt.patches))
        told = tuple(state.attention(image).clone() for image in images)
        self.seen.append((state.prompt, len(state.sampled), told))
        block = (Visual(image=0),) if state.prompt.patches else ()
        return Insertion(before=block) if state.special else Insertion(after=block)


def cut(spans: Sequence[Span], count: int) -> tuple[Span, ...]:
    """The spans up to the first `count` sampled tokens; no block that stands behind them."""
    kept: list[Span] = []
    for span in spans:
        if count <= 0:
            break
        if isinstance(span, Text):
            part = dataclasses.replace(span, ids=span.ids[:count], logprobs=span.logprobs[:count])
            kept.append(part)
            count -= len(part.ids)
        else:
            kept.append(span)
    return tuple(kept)


def eager_attention(policy: QwenVL, rollout: Rollout, count: int, probe: AttentionProbe) -> list[Tensor]:
    """Mean attention of the first `count` sampled tokens to each image's tokens in the prompt, from the
    stock model's attention matrices."""
    eager = copy.deepcopy(policy.model)
    eager.set_attn_implementation("eager")
    batch = policy.batch([(rollout.prompt, cut(rollout.spans, count))])
    with torch.no_grad():
        embedded = policy.embed(batch.ids, batch.visual, policy.features(batch.images))
        out = eager.model.language_model(
            inputs_embeds=embedded.tokens,
            position_ids=batch.positions,
            output_attentions=True,
            **embedded.deepstack,
        )
    layers = torch.stack(out.attentions)[:, 0].float()  # [L, H, T, T]
    if probe.layers is not None:
        layers = layers[list(probe.layers)]
    heads = layers.amax(1) if probe.heads == "max" else layers.mean(1)
    mean = heads.mean(0)[batch.trained[0]].mean(0)
    prompt = int(batch.prompt_tokens[0])
    columns = batch.visual[0, :prompt]
    sizes = [grid.tokens for grid in rollout.prompt.grids]
    ends = list(itertools.accumulate(sizes))
    return [
        mean[:prompt][(columns >= end - size) & (columns < end)]
        for size, end in zip(sizes, ends, strict=True)
    ]


PROBES = [
    AttentionProbe(),
    AttentionProbe(heads="max"),
    AttentionProbe(layers=(1, -1)),
]


@pytest.mark.parametrize("probe", PROBES, ids=str)
@pytest.mark.parametrize("trigger", [SPECIAL, "a"])
def test_attention_is_that_of_eager_attention(probe: AttentionProbe, trigger: str) -> None:
    """ROUTE would choose by something else than what the answer attended to."""
    policy = exact()
    looking = Looking(trigger=trigger, probe=probe, seen=[])
    rollouts = generate(policy, prompts(policy)[:3], looking)
    compared = 0
    for prompt, count, told in looking.seen:
        owners = [r for r in rollouts if r.prompt is prompt]
        if count == 1:
            assert not any(bool(one.any()) for one in told)
            continue
        gaps = []
        for owner in owners:
            wanted = eager_attention(policy, owner, count - 1, probe)
            gaps.append(max(float((a - b).abs().max()) for a, b in zip(told, wanted, strict=True)))
        assert min(gaps) < 1e-6
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("trigger", [SPECIAL, "a"])
def test_a_pass_over_an_answer_finds_what_decoding_found(trigger: str, side: str) -> None:
    """SFT would choose other tokens than a rollout does; also with several insertions in one answer."""
    policy = dataclasses.replace(exact(), padding_side=side)  # type: ignore[arg-type]
    route = VisualRoute(trigger=trigger, m=40)
    rollouts = generate(policy, prompts(policy)[:3], route, tokens=20)
    answers = [(rollout.prompt, rollout.sampled_ids) for rollout in rollouts]
    again = place_insertions(policy, answers, route)
    several = 0
    for rollout, placed in zip(rollouts, again, strict=True):
        made = [span for one in placed for span in (*one.insertion.before, *one.insertion.after)]
        assert [(span.image, span.keep) for span in made if isinstance(span, Visual)] == [
            (span.image, span.keep) for span in rollout.insertions
        ]
        several += len(placed) > 1
    assert several, "no answer with two insertions"


def test_a_pass_with_a_wrong_token_count_is_noticed() -> None:
    """The comparison above must see one token more."""
    policy = exact()
    rollouts = generate(policy, prompts(policy)[:1], Implicit(), n=1)
    ids = rollouts[0].sampled_ids
    one, other = (looks(policy, [(rollouts[0].prompt, ids[:n], ())], AttentionProbe())[0] for n in (6, 7))
    assert one is not None
    assert other is not None
    assert (one(0) - other(0)).abs().max() > 1e-4


def test_watching_changes_no_logprob() -> None:
    """The watched attention function is used for the answer itself."""
    policy = exact()
    given = prompts(policy)
    plain = generate(policy, given, VisualCopy(trigger=SPECIAL))
    watched = generate(policy, given, VisualRoute(trigger=SPECIAL, m=99.999))
    for a, b in zip(plain, watched, strict=True):
        assert a.sampled_ids == b.sampled_ids
        gaps = [abs(x - y) for x, y in zip(trained_logprobs(a), trained_logprobs(b), strict=True)]
        assert max(gaps) < TOLERANCE
    assert policy.model.model.language_model.config._attn_implementation == "sdpa"


# -- engine and trainer ---------------------------------------------------------------------------


def ratio_gap(policy: QwenVL, batch: Batch) -> float:
    """Largest |ratio - 1| between the trainer's and the behaviour probabilities."""
    scores = score_batch(policy, batch).logprobs
    return float(((scores - batch.old_logprobs)[batch.trained].exp() - 1).abs().max())


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
