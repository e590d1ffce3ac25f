"""Tags in what is being sampled: found exactly when completed, however they are cut into tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import tokenizer
from reflectvlm.rollout.watch import TextWatch

PIECES = ["", "<", ">", "b", "a", "<b", "a>", ">b", "<ba>", "ba", "x", ">x<", "<ba>x"]


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def fires(watch: TextWatch, ids: Sequence[int], budget: int) -> list[int]:
    """Counts of sampled tokens at which the watch fires, for one row among others."""
    buffer = torch.zeros(2, budget, dtype=torch.long)
    found = []
    for n, i in enumerate(ids, start=1):
        buffer[1, n - 1] = i
        done = watch.completed(buffer, torch.tensor([1, n]), torch.tensor([0, i]))
        assert not done[0]
        if done[1]:
            found.append(n)
    return found


@given(ids=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=25))
@settings(max_examples=300, deadline=None)
def test_fires_at_each_completion_and_nowhere_else(ids: list[int]) -> None:
    """A tag found twice inserts two blocks; one that is missed inserts none."""
    watch = TextWatch.create(("<ba>",), decode, len(PIECES), torch.device("cpu"))
    expected = [
        n
        for n in range(1, len(ids) + 1)
        if decode(ids[:n]).count("<ba>") > decode(ids[: n - 1]).count("<ba>")
    ]
    assert fires(watch, ids, 30) == expected


def test_several_texts_and_none() -> None:
    several = TextWatch.create(("xb", "a>"), decode, len(PIECES), torch.device("cpu"))
    assert fires(several, [10, 3, 4, 2, 6], 8) == [2, 4, 5]
    none = TextWatch.create((), decode, 1, torch.device("cpu"))
    assert fires(none, [1, 2, 3], 4) == []


@pytest.mark.parametrize("tag", ["<back>", "</think>", "é!", "中文", "😀"])
def test_with_the_real_tokenizer(tag: str) -> None:
    """Characters of several bytes are several tokens, and no single one of them spells the last."""
    tok = tokenizer()
    text = f"see {tag}\n\nand {tag}{tag}."
    ids = tok.encode(text, add_special_tokens=False)
    watch = TextWatch.create((tag,), lambda i: tok.decode(list(i)), len(tok), torch.device("cpu"))
    counts = [tok.decode(ids[:n]).count(tag) for n in range(len(ids) + 1)]
    expected = [n for n in range(1, len(ids) + 1) if counts[n] > counts[n - 1]]
    assert counts[-1] == 3
    assert fires(watch, ids, len(ids)) == expected


def test_only_possible_last_tokens_are_decoded() -> None:
    """Decoding every row at every step would cost more than the model."""
    calls: list[int] = []

    def counting(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return decode(ids)

    watch = TextWatch.create(("<ba>",), counting, len(PIECES), torch.device("cpu"))
    calls.clear()
    assert fires(watch, [1, 3, 4, 10, 9], 8) == []
    assert calls == []
    fires(watch, [1, 3, 4, 2], 8)
    assert calls == [4, 3]


def test_an_empty_text_is_refused() -> None:
    """It would stop every rollout at its first token."""
    with pytest.raises(ValueError, match="Cannot watch for an empty text"):
        TextWatch.create(("a", ""), decode, 3, torch.device("cpu"))
