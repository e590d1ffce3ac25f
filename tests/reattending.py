"""Policies, prompts and rollouts for tests of COPY and ROUTE, and their oracles.

The oracles share nothing with the engine: COPY is the stock model given the image again at that place
through its own multi-image path; ROUTE is that sequence without the columns of the tokens left out;
ROUTE's choice is the stock model's eager attention.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fixtures import favour, make_policy, make_prompt, score_batch
from reflectvlm.batch import Batch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import DecodeState, Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.engine import InProcessEngine
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


def trained_logprobs(rollout: Rollout) -> list[float]:
    return [x for span in rollout.spans if isinstance(span, Text) and span.trained for x in span.logprobs]


def ratio_gap(policy: QwenVL, batch: Batch) -> float:
    """Largest |ratio - 1| between the trainer's and the behaviour probabilities."""
    scores = score_batch(policy, batch).logprobs
    return float(((scores - batch.old_logprobs)[batch.trained].exp() - 1).abs().max())


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


def difference(policy: QwenVL, rollouts: Sequence[Rollout]) -> float:
    gaps = [
        abs(a - b)
        for rollout in rollouts
        for a, b in zip(trained_logprobs(rollout), stock_logprobs(policy, rollout), strict=True)
    ]
    return max(gaps)


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
