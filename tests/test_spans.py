"""Spans -> ids, positions, predictors: equal to the stock model's own positions, by any grouping."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import make_prompt, noise_image
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.spans import Row, VisionIds, cell_positions, collate, flatten
from reflectvlm.types import Grid, Instruction, Sample, Spans, Text, Visual

IDS = VisionIds(start=90, pad=91, end=92)
MERGE = 2

grids = st.builds(Grid, st.just(1), st.integers(1, 6), st.integers(1, 6))


Layout = tuple[list[Grid], list[tuple[bool, int]]]
# Grids, and what stands in a row: (True, image) or (False, length of a text). Spans are built in the
# tests: the runtime checks of a constructor draw random numbers, which hypothesis forbids in here.
layouts = st.tuples(
    st.lists(grids, min_size=1, max_size=3),
    st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=6),
)


def build(layout: Layout) -> tuple[Spans, tuple[Grid, ...]]:
    """Text and images in any order, images repeated, empty texts too; text at the end."""
    chosen, items = layout
    spans = [
        Visual(image=number % len(chosen)) if image else Text(ids=tuple(range(1, number + 1)))
        for image, number in items
    ]
    return (*spans, Text(ids=(7,))), tuple(chosen)


def stock_positions(policy: QwenVL, spans: Spans, chosen: tuple[Grid, ...], row: Row) -> torch.Tensor:
    shown = [chosen[span.image] for span in spans if isinstance(span, Visual)]
    thw = torch.tensor([[g.frames, g.rows * MERGE, g.columns * MERGE] for g in shown]).reshape(-1, 3)
    ids = torch.from_numpy(row.ids)[None]
    positions, _ = policy.model.model.get_rope_index(ids, (ids == IDS.pad).int(), image_grid_thw=thw)
    return positions[:, 0]


@given(layout=layouts)
@settings(max_examples=150, deadline=None)
def test_positions_are_those_of_the_stock_model(tiny_policy: QwenVL, layout: Layout) -> None:
    """An M-RoPE position that is off after an image shifts all text behind it, silently."""
    spans, chosen = build(layout)
    row = flatten(spans, chosen, IDS)
    assert torch.equal(stock_positions(tiny_policy, spans, chosen, row), torch.from_numpy(row.positions))
    # The last token is text, so the next one stands one further.
    assert row.next_position == row.positions[0, -1] + 1


@pytest.mark.parametrize("mistake", ["after image", "rows for columns", "no jump"])
def test_the_comparison_sees_wrong_positions(tiny_policy: QwenVL, mistake: str) -> None:
    """The comparison with the stock model must fail for each usual mistake."""
    spans: Spans = (Text(ids=(1, 2)), Visual(image=0), Text(ids=(3, 4)))
    chosen = (Grid(1, 2, 5),)
    row = flatten(spans, chosen, IDS)
    wrong = row.positions.copy()
    inside = row.image >= 0
    if mistake == "after image":
        wrong[:, 14:] += 1  # 2 text, start, 10 cells, end stands at 13
    elif mistake == "rows for columns":
        wrong[:, inside] = wrong[[0, 2, 1]][:, inside]
    else:
        wrong[:, ~inside] = np.arange((~inside).sum())
    assert not torch.equal(stock_positions(tiny_policy, spans, chosen, row), torch.from_numpy(wrong))


def test_positions_by_hand() -> None:
    """A 2 x 3 image after two tokens: start at 2, cells from (3, 3, 3), end at 3 + max(2, 3) = 6."""
    row = flatten((Text(ids=(1, 2)), Visual(image=0), Text(ids=(3,))), (Grid(1, 2, 3),), IDS)
    assert row.ids.tolist() == [1, 2, 90, 91, 91, 91, 91, 91, 91, 92, 3]
    assert row.positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert row.cell.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5, -1, -1]
    assert row.next_position == 8


@given(layout=layouts, cut=st.integers(0, 7), start=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_pieces_of_a_sequence_continue_one_another(layout: Layout, cut: int, start: int) -> None:
    """The engine flattens a prompt first and each chunk later; the trainer flattens all at once."""
    spans, chosen = build(layout)
    whole = flatten(spans, chosen, IDS, start=start)
    head = flatten(spans[:cut], chosen, IDS, start=start)
    tail = flatten(spans[cut:], chosen, IDS, start=head.next_position)
    for name in ("ids", "positions", "image", "cell", "trained"):
        joined = np.concatenate([getattr(head, name), getattr(tail, name)], axis=-1)
        assert np.array_equal(joined, getattr(whole, name)), name
    assert tail.next_position == whole.next_position


@given(grid=grids, data=st.data())
@settings(max_examples=60, deadline=None)
def test_kept_tokens_stand_where_they_stand_in_the_full_block(grid: Grid, data: st.DataObject) -> None:
    """ROUTE shows a selection; renumbering it would tell the model a different picture."""
    keep = tuple(sorted(data.draw(st.sets(st.integers(0, grid.tokens - 1)))))
    text = Text(ids=(3,))
    full = flatten((text, Visual(image=0), text), (grid,), IDS)
    some = flatten((text, Visual(image=0, keep=keep), text), (grid,), IDS)
    columns = [0, 1, *(2 + cell for cell in keep), len(full) - 2, len(full) - 1]
    assert np.array_equal(some.positions, full.positions[:, columns])
    assert np.array_equal(some.cell, full.cell[columns])
    assert some.next_position == full.next_position


def test_predictors_by_hand() -> None:
    """A token sampled before a block was put in front of it is predicted from before the block.

    Columns: 0-1 text, 2-4 first block (start, one cell, end), 5-7 second, 8-9 sampled text."""
    one = (Grid(1, 1, 1),)
    given = Text(ids=(1, 2))
    sampled = Text(ids=(3, 4), trained=True)
    late = Visual(image=0, before_sampled=True)
    expected = {
        (Visual(image=0), Visual(image=0)): [7, 8],  # the block was there first
        (late, late): [1, 8],
        (late, Visual(image=0)): [1, 8],
        (Visual(image=0), late): [4, 8],  # only the second was put in late
    }
    for blocks, predictor in expected.items():
        row = flatten((given, *blocks, sampled), one, IDS)
        assert row.predictor[-2:].tolist() == predictor, blocks
    # An empty text between block and token changes nothing.
    row = flatten((given, late, Text(ids=()), sampled), one, IDS)
    assert row.predictor[-2:].tolist() == [1, 5]


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (Visual(image=1), r"Visual\(image=1\) in a sequence with 1 images"),
        (Visual(image=-1), "Image indices run from 0 to 0"),
        (Visual(image=0, keep=(0, 6)), "on an image of 6 visual tokens"),
        (Visual(image=0, keep=(2, 1)), "distinct, ascending"),
        (Visual(image=0, keep=(1, 1)), "distinct, ascending"),
    ],
)
def test_a_wrong_visual_is_refused(span: Visual, message: str) -> None:
    """A cell of another image would be looked up in whatever features come next."""
    with pytest.raises(ValueError, match=message):
        flatten((span,), (Grid(1, 2, 3),), IDS)


def test_empty_sequence() -> None:
    row = flatten((), (), IDS)
    assert (len(row), row.positions.shape, row.next_position) == (0, (3, 0), 0)
    assert cell_positions(Grid(1, 1, 1)).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_and_points(tiny_policy: QwenVL, side: str) -> None:
    """Rows of one prompt share its features, and padding on the left shifts every predictor."""
    first = make_prompt(tiny_policy, 0)
    second = make_prompt(tiny_policy, 1, "<image> or <image>?", ((64, 48), (32, 64)))
    answers = [
        (Text(ids=(5, 6, 7), trained=True, logprobs=(-1.0, -2.0, -3.0)),),
        (Text(ids=(8,), trained=True),),
    ]
    rows = [(second, answers[0]), (first, answers[1]), (second, answers[1])]
    batch = collate(rows, tiny_policy.vision, tiny_policy.pad_id, side=side)  # type: ignore[arg-type]
    # 3 x 4 + 4 x 2 cells of the second prompt's images, then 16 of the first's.
    assert [image.grid.tokens for image in batch.images] == [12, 8, 16]
    assert batch.num_tokens == 5
    assert batch.num_sequences == 3
    for b, (prompt, answer) in enumerate(rows):
        row = flatten(prompt.spans + answer, prompt.grids, tiny_policy.vision)
        used = batch.attention[b]
        first_column = int(used.nonzero()[0])
        assert used.sum() == len(row)
        assert first_column == (0 if side == "right" else batch.ids.shape[1] - len(row))
        assert batch.ids[b][used].tolist() == row.ids.tolist()
        assert batch.positions[:, b, used].tolist() == row.positions.tolist()
        assert torch.equal(batch.old_logprobs[b][used], torch.from_numpy(row.logprobs))
        assert (batch.predictor[b][used] - first_column)[1:].tolist() == row.predictor[1:].tolist()
        assert (batch.ids[b][~used] == tiny_policy.pad_id).all()
        assert not batch.trained[b][~used].any()
    assert batch.visual[0].unique().tolist() == [-1, *range(20)]
    assert batch.visual[1].unique().tolist() == [-1, *range(20, 36)]
    assert batch.visual[2].unique().tolist() == [-1, *range(20)]


words = st.text(st.sampled_from("ab .?\n1é<|>"), max_size=12)


@given(question=words, instruction=words, system=words, images=st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_prompt_ids_are_those_of_stock_processing(
    tiny_policy: QwenVL, question: str, instruction: str, system: str, images: int
) -> None:
    """Encoding question and instruction apart gives other tokens at their border than vLLM, TRL or
    the stock processor give, and the policy trains on prompts that it will never meet."""
    pages = tuple(noise_image(i, 64, 48) for i in range(images))
    sample = Sample(id="x", question=question, answer="", images=pages)
    prompt = tiny_policy.prompt(sample, Instruction(text=instruction, system=system))
    content = question + ("\n" + instruction if instruction else "")
    if not images and not question.strip():
        content = content.removeprefix(question)  # an empty question is no text part
    parts = [{"type": "image"}] * images + [{"type": "text", "text": content}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": parts}]
    rendered = tiny_policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expanded = rendered.replace("<|image_pad|>", "<|image_pad|>" * 12)  # 64 x 48 is 4 x 3 cells
    row = flatten(prompt.spans, prompt.grids, tiny_policy.vision)
    assert row.ids.tolist() == tiny_policy.tokenizer.encode(expanded)


def test_a_text_with_too_few_logprobs_is_refused() -> None:
    with pytest.raises(ValueError, match="2 ids and 1 logprobs"):
        dataclasses.replace(Text(ids=(1, 2)), logprobs=(-1.0,))
