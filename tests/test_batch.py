"""Cutting a batch: rows, predictors and features point at the same things as before."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import make_prompt
from reflectvlm.batch import Batch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.spans import collate
from reflectvlm.types import Spans, Text, Visual

PER_TOKEN = ("ids", "visual", "trained", "old_logprobs", "ref_logprobs")


def make_batch(policy: QwenVL, lengths: Sequence[int], side: Any) -> Batch:
    prompts = [make_prompt(policy, 0), make_prompt(policy, 1, "Why?", ((32, 32),))]

    def answer(n: int) -> Spans:
        some = Text(ids=tuple(range(1, n + 1)), trained=True, logprobs=tuple(-0.1 * i for i in range(n)))
        return (some, Visual(image=0, before_sampled=True), Text(ids=(9,), trained=True, logprobs=(-2.0,)))

    rows = [(prompts[i % 2], answer(n)) for i, n in enumerate(lengths)]
    batch = collate(rows, policy.vision, policy.pad_id, side=side)
    advantages = torch.arange(float(len(lengths)))
    return dataclasses.replace(batch, advantages=advantages, ref_logprobs=batch.old_logprobs - 1)


def content(batch: Batch) -> list[dict[str, Any]]:
    """What each row says, without its padding; predictors counted from the row's first token."""
    rows = []
    for b in range(len(batch)):
        used = batch.attention[b]
        first = int(used.nonzero()[0])
        row = {name: getattr(batch, name)[b][used].tolist() for name in PER_TOKEN}
        row["positions"] = batch.positions[:, b, used].tolist()
        row["predictor"] = (batch.predictor[b][used] - first)[1:].tolist()
        row["advantage"] = float(batch.advantages[b])
        row["prompt"] = (int(batch.prompt[b]), int(batch.prompt_tokens[b]))
        rows.append(row)
    return rows


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    size=st.integers(1, 7),
    side=st.sampled_from(["right", "left"]),
)
@settings(max_examples=40, deadline=None)
def test_micro_batches_say_what_the_batch_says(
    tiny_policy: QwenVL, lengths: list[int], order: random.Random, size: int, side: str
) -> None:
    """Columns cut on the left without moving the predictors would score every token from its past; a part
    whose rows are not neighbours takes a neighbour's."""
    batch = make_batch(tiny_policy, lengths, side)
    rows = list(range(len(batch)))
    order.shuffle(rows)
    pieces = list(batch.split(torch.tensor(rows).split(size)))
    whole = content(batch)
    assert [row for piece in pieces for row in content(piece)] == [whole[row] for row in rows]
    assert [id_ for piece in pieces for id_ in piece.row_ids] == [batch.row_ids[row] for row in rows]
    assert content(batch) == content(make_batch(tiny_policy, lengths, "left" if side == "right" else "right"))
    for piece in pieces:
        assert len(piece) <= size
        assert piece.images is batch.images
        assert (piece.num_tokens, piece.num_sequences) == (batch.num_tokens, batch.num_sequences)
        fresh = dataclasses.replace(piece)  # asks its own tensors where its tokens are
        assert all(np.array_equal(*facts) for facts in zip(piece.layout, fresh.layout, strict=True))
        # No column is padding in all rows, and no pointer leaves the piece.
        assert piece.attention.any(0).all()
        assert piece.predictor.min() >= 0
        assert piece.predictor.max() < piece.ids.shape[1]
    assert batch.num_tokens == sum(lengths) + len(lengths)
    for b in range(len(batch)):
        # Rows alternate between two prompts; a row's first trained token is the first of its answer.
        assert batch.prompt[b] == b % 2
        used = batch.trained[b][batch.attention[b]]
        assert batch.prompt_tokens[b] == int(used.nonzero()[0])


def test_rows_without_reference() -> None:
    """A batch has no reference log-probs until somebody scores one; all-padding rows have no columns."""
    zeros = torch.zeros(2, 3)
    batch = Batch(
        ids=zeros.long(),
        positions=torch.zeros(3, 2, 3, dtype=torch.long),
        attention=torch.tensor([[True, True, False], [False, False, False]]),
        visual=zeros.long() - 1,
        trained=zeros.bool(),
        predictor=zeros.long(),
        images=(),
        old_logprobs=zeros,
        advantages=torch.zeros(2),
        prompt=torch.tensor([0, 1]),
        prompt_tokens=torch.tensor([2, 0]),
        num_tokens=0.0,
        num_sequences=2.0,
    )
    assert batch.rows(torch.tensor([0, 1])).ref_logprobs is None
    assert batch.rows(torch.tensor([0, 1])).ids.shape == (2, 2)
    assert batch.rows(torch.tensor([1])).ids.shape == (1, 0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_all_tensors_move(tiny_policy: QwenVL, device: str) -> None:
    """One field left behind fails only on a machine with an accelerator; "meta" is one everywhere."""
    moved = make_batch(tiny_policy, [2, 3], "right").to(device)
    for field in dataclasses.fields(moved):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == device, field.name
    # Pixels are moved by whoever encodes them: a cached image's need not be moved at all.
    assert all(image.pixels.device.type == "cpu" for image in moved.images)
