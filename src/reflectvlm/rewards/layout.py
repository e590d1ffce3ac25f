"""Format reward: 1.0 if the whole output is the layout, else 0.0 (see `reflectvlm.tags`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.tags import Layout, parse
from reflectvlm.types import Rollout


@dataclass(frozen=True, kw_only=True)
class TagFormat:
    """Example: `TagFormat(layout=look_back())` demands the `<back>` block."""

    layout: Layout
    rowwise: ClassVar[bool] = True

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        return [float(parse(self.layout, rollout.text).valid) for rollout in group]
