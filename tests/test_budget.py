"""Which rows go through the model together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.batch import Layout
from reflectvlm.models.tree import lined
from reflectvlm.recipe_check import RecipeError, check_recipe
from reflectvlm.train.budget import image_parts, passes
from reflectvlm.types import Grid, Patches

Rows = list[tuple[int, int]]
"""(number of the prompt, tokens of the answer). Prompt p has 10 p + 1 tokens."""


def layout_of(rows: Rows) -> Layout:
    prompt, own = (np.array(part, dtype=np.int64) for part in zip(*rows, strict=True))
    head = 10 * prompt + 1
    return Layout(start=np.zeros_like(own), length=head + own, prompt=prompt, prompt_tokens=head)


def cost(layout: Layout, rows: torch.Tensor, share_prefix: bool) -> int:
    """Tokens of one pass with padding, as the model will run it."""
    part = layout.rows(rows.numpy())
    line = lined(part, 1000) if share_prefix else None
    if line is None:
        return len(part.length) * int(part.length.max())
    return line.rows * int(line.widths.max())


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), min_size=1, max_size=20),
    tokens=st.integers(1, 400),
    share_prefix=st.booleans(),
)
def test_every_row_once_and_no_pass_above_the_budget(rows: Rows, tokens: int, share_prefix: bool) -> None:
    """Bug: a row trained twice or never; memory that the budget does not bound; a plan that differs between
    two equal runs."""
    layout = layout_of(rows)
    made = passes(layout, tokens, share_prefix=share_prefix)
    assert sorted(row for part in made for row in part.tolist()) == list(range(len(rows)))
    for part in made:
        assert part.tolist() == sorted(part.tolist())
        assert len(part) == 1 or cost(layout, part, share_prefix) <= tokens
    again = passes(layout_of(rows), tokens, share_prefix=share_prefix)
    assert [part.tolist() for part in again] == [part.tolist() for part in made]


def test_groups_stay_together_where_they_fit() -> None:
    """Bug: a prompt that is run in two passes although one has room for its group."""
    # Two prompts of 11 and 21 tokens in turn; packed groups of 11 + 3 x 10 = 41 and 21 + 3 x 10 = 51 tokens.
    rows = [(1, 10), (2, 10)] * 3
    layout = layout_of(rows)

    def planned(tokens: int) -> list[list[int]]:
        return [part.tolist() for part in passes(layout, tokens, share_prefix=True)]

    assert planned(102) == [[0, 1, 2, 3, 4, 5]]  # two rows, padded to 51
    assert planned(101) == [[1, 3, 5], [0, 2, 4]]
    # Cut where a group does not fit: 21 + 2 x 10 = 41, then the last row alone, 31; beside it fits nothing.
    assert planned(41) == [[0, 2, 4], [1, 3], [5]]
    # Plain rows of 31 and 21 tokens: three of a length in a pass of at most 93.
    assert [p.tolist() for p in passes(layout, 93, share_prefix=False)] == [[1, 3, 5], [0, 2, 4]]


def test_rows_of_a_pass_are_of_similar_width() -> None:
    """Bug: one long row in every pass, and everything padded to it."""
    rows = [(number, length) for number, length in enumerate([5, 300, 7, 290, 6, 310])]
    layout = Layout(*(np.array(part) for part in ([0] * 6, [n for _, n in rows], range(6), [1] * 6)))
    planned = [part.tolist() for part in passes(layout, 930, share_prefix=True)]
    assert planned == [[1, 3, 5], [0, 2, 4]]


def patches(number: int) -> Patches:
    return Patches(pixels=torch.zeros(number, 2), grid=Grid(1, 1, number // 4))


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [(1, [1, 1, 1, 1]), (16, [1, 1, 1, 1]), (25, [1, 2, 1]), (1000, [4])],
)
def test_images_go_through_the_tower_in_parts(tokens: int, parts: list[int]) -> None:
    """Bug: a number of images that bounds no memory, because they differ in size. 64, 64, 32 and 128
    patches count as 16, 16, 8 and 32 tokens; an image alone may exceed the budget."""
    images = [patches(n) for n in (64, 64, 32, 128)]
    made = image_parts(images, tokens)
    assert [len(part) for part in made] == parts
    assert [image for part in made for image in part] == images
    assert image_parts([], tokens) == [()]


def test_an_old_recipe_is_told_the_new_name() -> None:
    """Bug: a recipe from before ends with a list of thirty arguments to search."""
    with pytest.raises(
        RecipeError, match=r"micro_rows is no argument of RLTrainer\. Did you mean 'micro_tokens'"
    ):
        check_recipe({"_target_": "reflectvlm.train.rl.RLTrainer", "micro_rows": 16})
