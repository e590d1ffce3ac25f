"""Shares, regions, maps, boxes and means over answers, against numbers counted by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures import make_policy, make_prompt
from reflectvlm import Digits
from reflectvlm.attention.boxes import Box, coverage, objects_of
from reflectvlm.attention.maps import heat_maps, looks, token_maps
from reflectvlm.attention.places import (
    GENERATED,
    IMAGE,
    INSERTED,
    marked,
    part_of,
    places,
    regions,
    token_texts,
)
from reflectvlm.attention.readings import SHARES, Reading, by_part, by_step, read_answers
from reflectvlm.attention.trends import published, trend
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.types import Instruction, Prompt, Rollout, Sample, SamplingParams, Text, Visual

ANSWER = (
    "<think>upper left 7.</think> <back>Looking again: upper left 7.</back> <think>It is 7.</think> "
    "\\boxed{7}"
)


@functools.cache
def policy() -> QwenVL:
    """Tests must not change it."""
    return make_policy()


@functools.cache
def uniform() -> QwenVL:
    """Every token attends evenly to all up to itself."""
    made = make_policy()
    with torch.no_grad():
        for layer in made.model.model.language_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.zero_()
                projection.bias.zero_()
    return made


def answer(
    by: QwenVL, reattention: Reattention | None = None, text: str = ANSWER, prompt: Prompt | None = None
) -> Rollout:
    engine = ScriptedEngine(policy=by, texts=(text,))
    sampling = SamplingParams(max_tokens=300)
    made = engine.generate([prompt or make_prompt(by)], 1, sampling, reattention or Implicit(), seed=0)
    return made[0][0]


# -- places and regions ---------------------------------------------------------------------------


def test_regions_are_the_tagged_text() -> None:
    """Bug: a region that begins a token late, because "<" is sampled together with the space in front, or
    ends before the closing tag."""
    rollout = answer(policy())
    found = places(policy(), rollout)
    texts = token_texts(found, rollout.text)
    assert "".join(texts) == rollout.text
    ((first, stop),) = regions(found, rollout.text)
    assert "".join(texts[first:stop]).strip() == "<back>Looking again: upper left 7.</back>"
    assert len(texts) == len(rollout.sampled_ids)  # the end of the turn is one of them, and spells nothing
    assert texts[-1] == ""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a<back>b</back>c", ["<back>b</back>"]),
        ("<back>a</back><REFLECTION></REFLECTION>", ["<back>a</back>", "<REFLECTION></REFLECTION>"]),
        ("a<back>never closed", ["<back>never closed"]),
        ("<back>a<REFLECTION>b</back>c", ["<back>a<REFLECTION>b</back>"]),
        ("</back>nothing<think>a</think>", []),
    ],
)
def test_marked_regions(text: str, wanted: list[str]) -> None:
    """Bug: an unclosed tag that hides its region, or a closing tag that ends another one's."""
    assert [text[a:b] for a, b in marked(text)] == wanted
    assert marked(text, ()) == []


def test_parts_of_an_answer() -> None:
    """Bug: tokens between two looks back that count as in front of them."""
    assert part_of(9, [(2, 4), (6, 7)]).tolist() == [0, 0, 1, 1, 2, 2, 1, 2, 2]
    assert part_of(3, []).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("place", ["before", "after"])
def test_places_of_blocks(place: Any) -> None:
    """Bug: an inserted image that counts as generated, or its edges as visual; a query that is a forced
    token's; a tag behind a block whose predictor is the block's end."""
    rollout = answer(policy(), VisualCopy(trigger="<back>", place=place, close="</back>"))
    found = places(policy(), rollout)
    batch = policy().batch([(rollout.prompt, rollout.spans)])
    answered = int(batch.prompt_tokens[0])
    assert (found.kind[:answered] == IMAGE).sum() == 16
    assert (found.kind == INSERTED).sum() == 16
    assert np.array_equal(found.block >= 0, found.kind == INSERTED)
    sampled = {i for span in rollout.spans if isinstance(span, Text) and span.logprobs for i in span.ids}
    ids = batch.ids[0].numpy()
    assert set(ids[found.sampled].tolist()) == sampled
    assert len(found.sampled) == len(rollout.sampled_ids)
    assert np.array_equal(found.predictor, batch.predictor[0].numpy()[found.sampled])
    edges = [
        n
        for n in np.flatnonzero(found.kind == GENERATED)
        if ids[n] in (policy().vision.start, policy().vision.end)
    ]
    assert len(edges) == 2
    if place == "before":
        tag = next(n for n in range(len(found.sampled)) if found.sampled[n] > edges[-1])
        assert found.predictor[tag] < edges[0]


def test_prompts_without_images_are_refused() -> None:
    """Bug: shares of an image that is not there, as zeros."""
    prompt = policy().prompt(Sample(id="t", question="Why?", answer=""), Instruction())
    with pytest.raises(ValueError, match="prompt of 't' shows no image"):
        places(policy(), answer(policy(), prompt=prompt))
    with pytest.raises(ValueError, match="has no token"):
        places(policy(), dataclasses.replace(answer(policy()), spans=(), text=""))
    with pytest.raises(ValueError, match=r"query is 'next'\. It must be 'token'"):
        places(policy(), answer(policy())).queries("next")


# -- trend ----------------------------------------------------------------------------------------


def test_the_published_shares_by_hand() -> None:
    """Bug: layers averaged before they are normalised, which weighs layers by how much they leave to the
    system prompt; or the system prompt left in."""
    # before, image, query, generated, inserted; two layers, one token.
    layers = np.array([[[0.8, 0.1, 0.1, 0.0, 0.0]], [[0.0, 0.2, 0.3, 0.5, 0.0]]])
    # Layer 1: 0.1 and 0.1 of 0.2. Layer 2 as it is. Image: (0.5 + 0.2) / 2; query: (0.5 + 0.3) / 2.
    assert published(layers)[0] == pytest.approx([0.35, 0.4, 0.25, 0.0])
    # Averaged first, image would be 0.15 / 0.6 = 0.25.


def test_step_is_the_query_that_predicted_the_token() -> None:
    """Bug: a curve that is moved by one token without saying so."""
    rollout = answer(policy())
    own, step = trend(policy(), rollout), trend(policy(), rollout, query="step")
    assert np.allclose(step.absolute[1:], own.absolute[:-1], atol=1e-6)
    assert not np.allclose(step.absolute, own.absolute, atol=1e-3)


def test_sampled_answers_are_read_as_they_were_sampled() -> None:
    """Bug: an answer of the engine, cut by its budget, with blocks and special tags, that cannot be looked
    at."""
    sampling = SamplingParams(max_tokens=20)
    engine = InProcessEngine(policy=policy())
    (group,) = engine.generate([make_prompt(policy())], 3, sampling, VisualRoute(trigger="a", m=40), seed=3)
    for rollout in group:
        made = trend(policy(), rollout)
        assert made.attention.shape == (4, len(rollout.sampled_ids), 5)
        assert abs(made.attention.sum(-1) - 1).max() < 1e-5


# -- maps -----------------------------------------------------------------------------------------


def test_maps_add_up_to_the_shares() -> None:
    """Bug: a map of other tokens, layers or columns than the curve beside it."""
    rollout = answer(policy(), VisualRoute(trigger="<back>", m=40))
    made = trend(policy(), rollout)
    heats = heat_maps(policy(), rollout)
    assert [(heat.look, heat.shown) for heat in heats] == [
        ("first look", "prompt"),
        ("look back", "prompt"),
        ("look back", "block 1"),
    ]
    ((first, stop),) = made.regions
    wanted = [
        made.absolute[:first, IMAGE],
        made.absolute[first:stop, IMAGE],
        made.absolute[first:stop, INSERTED],
    ]
    assert [heat.share for heat in heats] == pytest.approx([one.mean() for one in wanted], abs=1e-6)
    block = next(span for span in rollout.spans if isinstance(span, Visual))
    shown = np.flatnonzero(~np.isnan(heats[2].maps[0].flatten()))
    assert tuple(shown) == block.keep
    each = token_maps(policy(), rollout)
    assert each.sum((1, 2)) == pytest.approx(made.per_layer("visual").mean(0), abs=1e-6)


def test_a_cell_is_where_its_token_is() -> None:
    """Bug: rows and columns exchanged, or a map that is turned."""
    prompt = make_prompt(policy(), sizes=((80, 48),))  # 3 rows of 5 cells
    rollout = answer(policy(), prompt=prompt)
    found = places(policy(), rollout)
    (heat,) = (one for one in heat_maps(policy(), rollout) if one.look == "first look")
    assert heat.maps.shape == (4, 3, 5)
    from reflectvlm.attention.capture import Ask, attended

    first = int(np.flatnonzero(found.kind == IMAGE)[0])
    readout = torch.zeros(len(found.kind), 1)
    readout[first + 1 * 5 + 3] = 1  # second row, fourth column
    before = regions(found, rollout.text)[0][0]
    ask = Ask(queries=found.queries()[:before], readout=readout)
    (weights,) = attended(policy(), prompt, rollout.spans, [ask])
    assert heat.mean[1, 3] == pytest.approx(float(weights.mean()), abs=1e-7)


def test_looks_at_words() -> None:
    """Bug: the second time that words stand is missed, or is not told apart from the first."""
    rollout = answer(policy())
    found = places(policy(), rollout)
    made = looks(found, rollout.text, ["upper left"])
    assert [look.name for look in made] == ["'upper left' 1", "'upper left' 2, looking back"]
    texts = token_texts(found, rollout.text)
    assert all("".join(texts[n] for n in look.tokens).strip() == "upper left" for look in made)
    with pytest.raises(ValueError, match="at='lower' stands nowhere in the answer"):
        looks(found, rollout.text, ["lower"])
    assert [look.name for look in looks(found, rollout.text, tags=())] == ["answer"]


# -- boxes ----------------------------------------------------------------------------------------


def test_quarters_of_a_page() -> None:
    """Bug: attention held against another quarter than the one that was asked about."""
    data = Digits(split="test", size=40, kinds=["read"])
    for row in range(40):
        found = objects_of(data[row])
        assert found is not None
        (name,) = found.asked
        (place,) = data[row].columns["looks"]
        covered = coverage(found.wanted, 4, 4)
        ((top, left),) = [(0, 0), (0, 2), (2, 0), (2, 2)][place : place + 1]
        wanted = np.zeros((4, 4))
        wanted[top : top + 2, left : left + 2] = 1
        assert np.array_equal(covered, wanted), name
        page = np.asarray(data[row].images[0].convert("L"), dtype=float)
        quarter = page[top * 16 : top * 16 + 32, left * 16 : left * 16 + 32]
        assert quarter.max() > 120  # a digit is written there; noise stays below 60


def test_coverage_by_hand() -> None:
    """Bug: cells that a box touches with a corner count whole, or not at all."""
    # On 2 x 4 cells: rows 0 to 1 whole and half of row 1; columns: half of 1, all of 2.
    covered = coverage([Box(0.375, 0.0, 0.75, 0.75)], 2, 4)
    assert covered.tolist() == [[0, 0.5, 1, 0], [0, 0.25, 0.5, 0]]


@given(st.tuples(*[st.floats(0, 1)] * 4), st.integers(1, 9), st.integers(1, 9))
def test_coverage_is_the_boxs_area(corners: tuple[float, ...], rows: int, columns: int) -> None:
    """Bug: a share held against a chance that is not the box's area."""
    left, right = sorted(corners[:2])
    top, bottom = sorted(corners[2:])
    box = Box(left, top, right, bottom)
    assert coverage([box], rows, columns).sum() / (rows * columns) == pytest.approx(box.area, abs=1e-9)


def test_boxes_of_a_users_row() -> None:
    """Bug: pixels taken as shares, or objects that nobody asked about counted in."""
    sample = dataclasses.replace(
        make_prompt(policy(), sizes=((64, 32),)).sample,
        columns={"boxes": {"cup": [0, 0, 32, 16], "cat": [32, 16, 64, 32]}, "asked": ["cat"]},
    )
    found = objects_of(sample)
    assert found is not None
    assert found.wanted == (Box(0.5, 0.5, 1.0, 1.0),)
    assert found.others == {"cup": Box(0.0, 0.0, 0.5, 0.5)}
    for columns, message in [
        ({"boxes": {"cat": [0, 0, 65, 10]}}, r"box 'cat' = \[0, 0, 65, 10\] on an image of 64 x 32"),
        ({"boxes": {"cat": [0, 0]}}, "box 'cat'"),
        ({"boxes": {}}, "boxes is an object of names"),
        ({"boxes": {"cat": [0, 0, 9, 9]}, "asked": ["dog"]}, r"asked=\['dog'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            objects_of(dataclasses.replace(sample, columns=columns))
    assert objects_of(dataclasses.replace(sample, columns={})) is None


# -- many answers ---------------------------------------------------------------------------------


def test_uniform_attention_lies_on_boxes_by_chance() -> None:
    """Bug: a share on what is asked about that depends on the prompt's length, or leaves inserted blocks
    out."""
    data = Digits(split="test", size=6)
    by = uniform()
    for way in (Implicit(), VisualCopy(trigger="<back>")):
        rollouts = [answer(by, way, prompt=by.prompt(data[n], Instruction())) for n in range(6)]
        read = list(read_answers(by, rollouts))
        assert len(read) == 6
        for reading, rollout in zip(read, rollouts, strict=True):
            # Of the page's 16 tokens each asked quarter holds 4.
            quarters = len(rollout.prompt.sample.columns["looks"]) / 4
            assert reading.chance == pytest.approx(np.full(len(reading.shares), quarters))
            assert reading.on_asked == pytest.approx(reading.chance, abs=1e-6)
            assert reading.blocks == (not isinstance(way, Implicit))
            made = trend(by, rollout)
            assert reading.shares[:, 2] == pytest.approx(made.per_layer("visual").mean(0), abs=1e-6)
            assert reading.shares[:, 3] == pytest.approx(made.shares[:, 0], abs=1e-6)
        assert by_part(read)["inside"]["lift"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("way", [Implicit(), VisualRoute(trigger="<back>", m=40)], ids=["implicit", "route"])
def test_attention_on_a_box_is_that_of_its_cells(way: Reattention) -> None:
    """Bug: cells of a box with rows and columns exchanged, which even attention does not notice."""
    sample = dataclasses.replace(
        make_prompt(policy(), sizes=((80, 48),)).sample, columns={"boxes": {"cup": [48, 0, 80, 16]}}
    )
    rollout = answer(policy(), way, prompt=policy().prompt(sample, Instruction()))
    (read,) = read_answers(policy(), [rollout])
    maps = token_maps(policy(), rollout)  # 3 rows of 5 cells: the box is the last two of the first row
    assert read.on_asked == pytest.approx(maps[:, 0, 3:].sum(1) / maps.sum((1, 2)), abs=1e-5)
    assert read.chance is not None
    assert read.chance[0] == pytest.approx(2 / 15)


def test_what_route_chooses_is_no_lift() -> None:
    """Bug: even attention that is more than chance, because a block holds more of the asked cells than the
    image in the prompt, over which alone chance was taken."""
    by = uniform()
    sample = dataclasses.replace(
        make_prompt(by, sizes=((80, 48),)).sample, columns={"boxes": {"cup": [0, 0, 48, 16]}}
    )
    route = VisualRoute(trigger="<back>", m=40)
    rollout = answer(by, route, prompt=by.prompt(sample, Instruction()))
    (block,) = (span for span in rollout.spans if isinstance(span, Visual))
    assert block.keep is not None
    # The box is cells 0, 1, 2 of 15; a block of K cells shows so many of them again.
    again = sum(cell in (0, 1, 2) for cell in block.keep)
    behind = (3 + again) / (15 + len(block.keep))
    assert behind != pytest.approx(3 / 15)  # else this page shows nothing
    (read,) = read_answers(by, [rollout])
    assert read.chance is not None
    assert read.chance[[0, -1]] == pytest.approx([3 / 15, behind])
    assert read.on_asked == pytest.approx(read.chance, abs=1e-6)
    assert by_part([read])["after"]["lift"] == pytest.approx(1, abs=1e-6)


def reading(shares: list[float], part: list[int]) -> Reading:
    columns = np.repeat(np.array(shares)[:, None], len(SHARES), 1)
    return Reading(id="r", text="", shares=columns, part=np.array(part))


def test_means_by_hand() -> None:
    """Bug: a long answer that weighs more than a short one in the means of parts; steps that count answers
    which have ended."""
    read = [reading([0.1, 0.3, 0.5], [0, 1, 2]), reading([0.4], [-1]), reading([0.2, 0.2], [1, 1])]
    parts = by_part(read)
    assert parts["all"]["visual"] == pytest.approx((0.3 + 0.4 + 0.2) / 3)
    inside = {key: value for key, value in parts["inside"].items() if not key.endswith("_se")}
    assert inside | {"image": 0} == pytest.approx(
        {"answers": 2, "tokens": 1.5, "image": 0, "inserted": 0.25, "visual": 0.25, "published": 0.25}
    )
    assert parts["before"]["answers"] == parts["after"]["answers"] == 1
    rows = by_step(read, width=2)
    assert [(row["from"], row["to"], row["answers"], row["tokens"]) for row in rows] == [
        (0, 2, 3, 5),
        (2, 3, 1, 1),
    ]
    assert [row["visual"] for row in rows] == pytest.approx([(0.1 + 0.3 + 0.4 + 0.2 + 0.2) / 5, 0.5])
    assert by_step([]) == []
    with pytest.raises(ValueError, match="width is 0"):
        by_step(read, width=0)


def test_what_cannot_be_read_is_told() -> None:
    """Bug: answers without an image that vanish from a mean without a word."""
    text = policy().prompt(Sample(id="t", question="Why?", answer=""), Instruction())
    told: list[str] = []
    rollouts = [answer(policy(), prompt=text), answer(policy())]
    read = list(read_answers(policy(), rollouts, skipped=lambda _, why: told.append(why)))
    assert len(read) == len(told) == 1
    assert "shows no image" in told[0]
