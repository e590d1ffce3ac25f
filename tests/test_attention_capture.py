"""Captured attention against the stock model's own matrices, of every family and with blocks in the answer.

The oracle is the stock model given ids and pixels, for COPY with the image a second time by its own
multi-image path, with `output_attentions`. It shares nothing with the capture but the weights.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import make_policy, make_prompt, uneven
from reflectvlm.attention import capture
from reflectvlm.attention.capture import Ask, Capture, attended, chosen_layers
from reflectvlm.attention.places import IMAGE, KINDS, places
from reflectvlm.attention.trends import trend
from reflectvlm.models.families import FAMILIES
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.types import Rollout, SamplingParams, Text, Visual

TOLERANCE = 1e-5
GAIN = 2.0
"""Of the weights. At 4, as elsewhere, what eager attention rounds (its softmax is float32 whatever comes in)
reaches 3e-5 by the last layer; at 2 a position that is off by one still moves weights by more than 1e-2."""
NAMES: tuple[Any, ...] = tuple(family.model_type for family in FAMILIES)
ANSWER = "<think>upper left 7.</think> <back>Looking again: 7.</back> \\boxed{7}"
WAYS = {
    "implicit": Implicit(),
    "copy": VisualCopy(trigger="<back>"),
    "copy in front": VisualCopy(trigger="<back>", place="before"),
    "copy again and again": VisualCopy(trigger=" "),
    "route": VisualRoute(trigger="<back>", m=40),
}


@functools.cache
def exact(name: Any) -> QwenVL:
    """float64 and enlarged weights. Tests must not change it."""
    return uneven(make_policy(gain=GAIN, dtype=torch.float64, family=name))


def answer(policy: QwenVL, way: str, sizes: Sequence[tuple[int, int]] = ((64, 48),)) -> Rollout:
    prompt = make_prompt(policy, 3, sizes=sizes)
    engine = ScriptedEngine(policy=policy, texts=(ANSWER,))
    ((rollout,),) = engine.generate([prompt], 1, SamplingParams(max_tokens=200), WAYS[way], seed=0)
    return rollout


def stock_attention(policy: QwenVL, rollout: Rollout) -> Tensor:
    """[L, H, T, T] of the stock model in eager mode. Of a ROUTE block the language model alone is stock's."""
    eager = copy.deepcopy(policy.model)
    eager.set_attn_implementation("eager")
    eager.model.rope_deltas = None
    batch = policy.batch([(rollout.prompt, rollout.spans)])
    blocks = [span for span in rollout.sequence if isinstance(span, Visual)]
    with torch.no_grad():
        if all(block.keep is None for block in blocks):
            grids = [rollout.prompt.grids[block.image] for block in blocks]
            pixels = torch.cat([rollout.prompt.patches[block.image].pixels for block in blocks])
            out = eager(
                input_ids=batch.ids,
                mm_token_type_ids=(batch.ids == policy.vision.pad).int(),
                pixel_values=pixels.to(policy.model.dtype),
                image_grid_thw=torch.tensor([(g.frames, 2 * g.rows, 2 * g.columns) for g in grids]),
                output_attentions=True,
            )
        else:
            embedded = policy.embed(batch.ids, batch.visual, policy.features(batch.images))
            out = eager.model.language_model(
                inputs_embeds=embedded.tokens,
                position_ids=batch.positions,
                output_attentions=True,
                **embedded.deepstack,
            )
    return torch.stack([layer[0] for layer in out.attentions])


def captured(policy: QwenVL, rollout: Rollout, **settings: Any) -> Tensor:
    """All weights of all tokens, [L, H, T, T]."""
    width = len(places(policy, rollout).kind)
    ask = Ask(queries=torch.arange(width), readout=torch.eye(width), heads="each")
    (found,) = attended(policy, rollout.prompt, rollout.spans, [ask], **settings)
    return found


def gap(policy: QwenVL, rollout: Rollout, **settings: Any) -> float:
    return float((captured(policy, rollout, **settings) - stock_attention(policy, rollout)).abs().max())


# -- equal to the model's own ---------------------------------------------------------------------


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_stock_models(name: Any, way: str) -> None:
    """Bug: weights of other queries, keys, positions or masks than the model attends with, in a family whose
    rotary positions or norms differ, or behind an inserted block."""
    policy = exact(name)
    rollout = answer(policy, way)
    blocks = {"implicit": 0, "copy again and again": 6}.get(way, 1)
    assert len(rollout.insertions) == blocks
    assert gap(policy, rollout) < TOLERANCE


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "reflectvlm_tree"])
def test_any_attention_implementation(implementation: str) -> None:
    """Bug: a capture that works with one attention only, or leaves another one in place."""
    from reflectvlm.models.tree_attention import prefix_tree

    policy = uneven(make_policy(gain=GAIN, dtype=torch.float64))
    model = policy.model.model.language_model
    if implementation == "reflectvlm_tree":
        prefix_tree(model, lambda *_: torch.zeros(0))  # as packed rows leave it
    else:
        policy.model.set_attn_implementation(implementation)
    rollout = answer(policy, "copy")
    assert gap(policy, rollout) < TOLERANCE
    assert model.config._attn_implementation == implementation


def test_the_output_is_the_models_own() -> None:
    """Bug: a pass that looks at attention and thereby changes what the next layer sees."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, "copy")
    batch = policy.batch([(rollout.prompt, rollout.spans)])
    embedded = policy.embed(batch.ids, batch.visual, policy.features(batch.images))
    with torch.no_grad():
        plain = policy.hidden(embedded, batch.positions, None)
        seen = Capture(asks=[], layers=frozenset(range(4)), chunk=8)
        with capture.capturing(policy.model.model.language_model, seen):
            watched = policy.hidden(embedded, batch.positions, None)
    assert torch.equal(plain, watched)


def test_the_attention_is_given_back_after_an_error() -> None:
    """Bug: a model that goes on reporting to a capture that is gone, once a pass has failed."""
    policy = make_policy()
    model = policy.model.model.language_model
    with (
        pytest.raises(RuntimeError, match="stop"),
        capture.capturing(model, Capture(asks=[], layers=frozenset(), chunk=1)),
    ):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_change_nothing(chunk: int) -> None:
    """Bug: queries lost, doubled or moved where a chunk ends."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, "copy")
    assert torch.allclose(captured(policy, rollout, chunk=chunk), captured(policy, rollout), atol=1e-12)


@pytest.mark.parametrize("chunk", [3, 64])
def test_sums_over_queries_and_layers(chunk: int) -> None:
    """Bug: sums made on the way, to save memory, that are not those of the results themselves."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, "copy")
    found = places(policy, rollout)
    queries = found.queries()
    pool = torch.rand(2, len(queries), generator=torch.Generator().manual_seed(0))
    asks = [Ask(queries=queries, readout=found.kinds(), pool=one) for one in (None, pool)]
    each, pooled = attended(policy, rollout.prompt, rollout.spans, asks, layers=[3, 1], chunk=chunk)
    mean, both = attended(policy, rollout.prompt, rollout.spans, asks, layers=[3, 1], chunk=chunk, mean=True)
    assert torch.allclose(pooled, pool.double() @ each, atol=1e-12)
    assert torch.allclose(mean, each.mean(0, keepdim=True), atol=1e-12)
    assert torch.allclose(both, pooled.mean(0, keepdim=True), atol=1e-12)


def test_the_largest_tensor_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the whole [heads, T, T] is built for a moment, which ends a run on a long answer."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, "copy")
    sizes = []
    real = capture.attention_weights

    def measured(*arguments: Any) -> Tensor:
        made = real(*arguments)
        sizes.append(tuple(made.shape))
        return made

    monkeypatch.setattr(capture, "attention_weights", measured)
    found = places(policy, rollout)
    ask = Ask(queries=found.queries(), readout=found.kinds())
    attended(policy, rollout.prompt, rollout.spans, [ask], chunk=5)
    assert {size[:2] for size in sizes} == {(1, 4)}
    assert max(size[2] for size in sizes) == 5
    assert sum(size[2] for size in sizes) == 4 * len(found.sampled)


@pytest.mark.parametrize("way", list(WAYS))
def test_rows_sum_to_one(way: str) -> None:
    """Bug: kinds that leave a column out, or count one twice."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, way, sizes=((64, 64), (32, 48)))
    assert torch.allclose(captured(policy, rollout).sum(-1), torch.ones(()).double(), atol=1e-9)
    made = trend(policy, rollout)
    assert abs(made.attention.sum(-1) - 1).max() < 1e-6
    assert abs(made.shares.sum(-1) - 1).max() < 1e-6


def test_in_half_precision_weights_are_those_of_its_queries_and_keys() -> None:
    """Bug: weights rounded to three digits, whose rows no longer sum to 1, where products are bfloat16."""
    policy = make_policy(gain=1.0, compute="bfloat16")
    rollout = answer(policy, "copy")
    found = captured(policy, rollout)
    assert found.dtype == torch.float32
    assert float((found.sum(-1) - 1).abs().max()) < 1e-5
    assert gap(policy, rollout) < 0.05


# -- mistakes are seen ----------------------------------------------------------------------------


def test_positions_in_one_row_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a comparison that passes for rotary positions which count visual tokens one by one."""
    policy = uneven(make_policy(gain=GAIN, dtype=torch.float64))
    rollout = answer(policy, "copy")
    stock = stock_attention(policy, rollout)
    rotary = policy.model.model.language_model.rotary_emb
    real = rotary.forward
    monkeypatch.setattr(
        rotary, "forward", lambda x, positions: real(x, torch.arange(x.shape[1]).expand_as(positions))
    )
    assert float((captured(policy, rollout) - stock).abs().max()) > 1000 * TOLERANCE


def test_weights_before_rotary_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a comparison that passes for queries and keys as they come out of their projections."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, "copy")
    stock = stock_attention(policy, rollout)
    raw: dict[tuple[int, str], Tensor] = {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda *seen, at=(number, name): raw.__setitem__(at, seen[2])
        )
        for number, layer in enumerate(policy.model.model.language_model.layers)
        for name in ("q_proj", "k_proj")
    ]
    real = Capture.see

    def see(self: Capture, layer: int, query: Tensor, key: Tensor, *others: Any) -> None:
        query, key = (
            raw[layer, name].view(1, -1, like.shape[1], like.shape[3]).transpose(1, 2)
            for name, like in (("q_proj", query), ("k_proj", key))
        )
        real(self, layer, query, key, *others)

    monkeypatch.setattr(Capture, "see", see)
    assert float((captured(policy, rollout) - stock).abs().max()) > 1000 * TOLERANCE
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("way", ["implicit", "copy"])
def test_a_query_off_by_one_is_seen(way: str) -> None:
    """Bug: a comparison that passes for the attention of a token's neighbour."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, way)
    found = places(policy, rollout)
    mean = stock_attention(policy, rollout).mean(1) @ found.kinds().double()
    asks = [Ask(queries=found.queries() - shift, readout=found.kinds()) for shift in (0, 1)]
    right, wrong = attended(policy, rollout.prompt, rollout.spans, asks)
    assert float((right - mean[:, found.sampled]).abs().max()) < TOLERANCE
    assert float((wrong - mean[:, found.sampled]).abs().max()) > 1000 * TOLERANCE


def test_a_missing_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a mean over layers of which one was never looked at."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, "copy")
    found = places(policy, rollout)
    mean = (stock_attention(policy, rollout).mean(1) @ found.kinds().double())[:, found.sampled].mean(0)
    assert abs(trend(policy, rollout).absolute - mean.numpy()).max() < TOLERANCE
    for left in itertools.combinations(range(4), 3):
        assert abs(trend(policy, rollout, layers=left).absolute - mean.numpy()).max() > 1000 * TOLERANCE
    real = Capture.see
    monkeypatch.setattr(Capture, "see", lambda self, layer, *o: layer == 2 or real(self, layer, *o))
    with pytest.raises(KeyError, match="2"):
        trend(policy, rollout)


# -- attention set by hand ------------------------------------------------------------------------


def test_weights_of_queries_and_keys_made_by_hand() -> None:
    """Bug: a scale, a causal edge or a head's keys that are not those of softmax(q k^T * scale)."""
    # One key head, two query heads. Scores are log(1, 2, 3, 4) for head 0 and 0 for head 1.
    key = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()[None, None, :, None] * 2
    query = torch.stack([torch.ones(4, 1), torch.zeros(4, 1)])[None]
    asks = [
        Ask(queries=torch.tensor([3, 1]), readout=torch.eye(4), heads="each"),
        Ask(queries=torch.tensor([3]), readout=torch.tensor([[1.0], [0.0], [0.0], [1.0]])),
    ]
    seen = Capture(asks=asks, layers=frozenset({5}), chunk=1)
    seen.see(5, query, key, None, 0.5)
    seen.see(4, query, key, None, 0.5)  # a layer that nobody asked about
    each, ends = (found[5] for found in seen.found)
    assert seen.found[0].keys() == {5}
    wanted = [[0.1, 0.2, 0.3, 0.4], [1 / 3, 2 / 3, 0, 0]]
    assert torch.allclose(each[0], torch.tensor(wanted))
    assert torch.allclose(each[1], torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0]]))
    # Mean of the heads: first key (0.1 + 0.25) / 2, last (0.4 + 0.25) / 2; together 0.5.
    assert torch.allclose(ends, torch.tensor([[0.5]]))
    # With a mask, additive or boolean, that hides the first key from the last query.
    hidden = torch.tensor([[False, True, True, True]]).expand(4, 4)[None, None]
    for mask in (hidden, torch.zeros(1, 1, 4, 4).masked_fill(~hidden, -1e30)):
        seen.see(5, query, key, mask, 0.5)
        assert torch.allclose(seen.found[0][5][0, 0], torch.tensor([0, 2, 3, 4]) / 9)


@pytest.mark.parametrize("way", ["implicit", "copy"])
def test_uniform_attention_gives_shares_counted_by_hand(way: str) -> None:
    """Bug: a kind with a column too many or too few; a share that is normalised by something else."""
    policy = make_policy(gain=GAIN, dtype=torch.float64)
    with torch.no_grad():
        for layer in policy.model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.zero_()
                projection.bias.zero_()
    rollout = answer(policy, way)
    made = trend(policy, rollout)
    head, tail = (span for span in rollout.prompt.spans if isinstance(span, Text))
    # In front of the image's 4 x 3 tokens: the first text and vision-start; behind: vision-end and the rest.
    before, image, query = len(head.ids) + 1, 12, len(tail.ids) + 1
    block = 0
    number = 0
    for span in rollout.spans:
        if isinstance(span, Visual):
            block = 12
            continue
        for _ in span.ids:
            # A token attends evenly to all up to itself; the two tokens around a block count as generated.
            generated = number + 1 + (2 if block else 0)
            count = before + image + query + generated + block
            plain = [n / count for n in (before, image, query, generated, block)]
            assert made.absolute[number] == pytest.approx(plain, abs=1e-9)
            behind = count - before
            published = [n / behind for n in (image, query, generated, block)]
            assert made.shares[number] == pytest.approx(published, abs=1e-9)
            number += 1
    assert number == len(made.tokens)
    assert (block > 0) == (way == "copy")
    assert made.per_layer("visual")[3] == pytest.approx(made.absolute[:, [IMAGE, 4]].sum(1))
    assert KINDS[IMAGE] == "image"


# -- what is refused ------------------------------------------------------------------------------


def test_wrong_asks_are_refused() -> None:
    """Bug: weights of a padded or absent column, or of a layer counted from the wrong end."""
    policy = exact("qwen2_5_vl")
    rollout = answer(policy, "implicit")
    width = len(places(policy, rollout).kind)
    good = Ask(queries=torch.tensor([0]), readout=torch.eye(width))
    outside = Ask(queries=torch.tensor([0, 999]), readout=torch.eye(width))
    with pytest.raises(ValueError, match=r"queries \[999\] .* for a sequence of \d+ tokens"):
        attended(policy, rollout.prompt, rollout.spans, [outside])
    with pytest.raises(ValueError, match="a readout of 3 keys"):
        attended(
            policy, rollout.prompt, rollout.spans, [Ask(queries=torch.tensor([0]), readout=torch.eye(3))]
        )
    with pytest.raises(ValueError, match=r"names layer 4, but the model has 4: 0 to 3, or -1 to -4"):
        attended(policy, rollout.prompt, rollout.spans, [good], layers=[0, 4])
    with pytest.raises(ValueError, match="layers names no layer"):
        attended(policy, rollout.prompt, rollout.spans, [good], layers=[])
    with pytest.raises(ValueError, match="chunk is 0"):
        attended(policy, rollout.prompt, rollout.spans, [good], chunk=0)
    with pytest.raises(ValueError, match=r"Ask\.heads is 'max'"):
        Ask(queries=torch.tensor([0]), readout=torch.eye(2), heads="max")  # type: ignore[arg-type]
    assert chosen_layers([-1, 0], 4) == [3, 0]
