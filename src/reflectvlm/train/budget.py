"""Which rows of an update go through the model together: as many as a budget of tokens allows.

Rows differ in length, so a number of rows bounds neither memory nor waste. A pass costs its rows' tokens,
padding included; where rows of one prompt run it once (`models/prefix.py`), a group costs its prompt once
and its answers. Groups stay together where the budget allows and are cut where it does not. A single row
above the budget is a pass of its own. The plan depends on lengths alone, not on contents or time, and no
result depends on the plan beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reflectvlm.batch import Layout
from reflectvlm.types import Patches

MICRO_TOKENS = 16384
"""Tokens of a pass unless told otherwise: some 13 rows of 1,000 visual tokens and an answer of 250."""
PATCHES_PER_TOKEN = 4
"""Patches of the vision tower that count as one token: what a tower with 2 x 2 merging makes one of."""


def passes(layout: Layout, tokens: int, *, share_prefix: bool) -> list[Tensor]:
    """Rows of each pass, every row once, the widest first; rows of one pass are of similar width."""
    units = _groups(layout, tokens) if share_prefix else [[row] for row in range(len(layout.length))]
    widths = [_width(layout, unit) for unit in units]
    found: list[list[int]] = []
    widest = members = 0
    for number in sorted(range(len(units)), key=lambda number: -widths[number]):
        if found and (members + 1) * widest <= tokens:
            found[-1] += units[number]
            members += 1
        else:
            found.append(list(units[number]))
            widest, members = widths[number], 1
    return [torch.tensor(sorted(rows)) for rows in found]


def image_parts(images: Sequence[Patches], tokens: int) -> list[tuple[Patches, ...]]:
    """Images in their order, in parts of at most `tokens` visual tokens (of 4 patches each, whatever the
    tower merges) or of one image; one empty part if there are none."""
    found: list[list[Patches]] = [[]]
    spent = 0.0
    for image in images:
        cost = len(image.pixels) / PATCHES_PER_TOKEN
        if found[-1] and spent + cost > tokens:
            found.append([])
            spent = 0.0
        found[-1].append(image)
        spent += cost
    return [tuple(part) for part in found]


def _groups(layout: Layout, tokens: int) -> list[list[int]]:
    """Rows of one prompt, in order of first appearance, cut where prompt and answers exceed the budget."""
    units: list[list[int]] = []
    spent: list[int] = []
    current: dict[int, int] = {}  # prompt -> its unit that still takes rows
    for row, prompt in enumerate(layout.prompt.tolist()):
        own = int(layout.length[row] - layout.prompt_tokens[row])
        unit = current.get(prompt)
        if unit is not None and spent[unit] + own <= tokens:
            units[unit].append(row)
            spent[unit] += own
        else:
            current[prompt] = len(units)
            units.append([row])
            spent.append(int(layout.length[row]))
    return units


def _width(layout: Layout, unit: Sequence[int]) -> int:
    """Tokens of a packed row."""
    shared = int(layout.prompt_tokens[unit[0]])
    return shared + sum(int(layout.length[row]) - shared for row in unit)
