"""Re-attention: when, and with what, a row looks at its image again. See `protocols.Reattention`.

`Implicit` is Look-Back's: the model is taught to look back by itself and nothing is inserted.
"""

from __future__ import annotations

from dataclasses import dataclass

from reflectvlm.protocols import DecodeState
from reflectvlm.types import Spans


@dataclass(frozen=True)
class Implicit:
    """Inserts nothing (Look-Back, arXiv 2507.03019)."""

    @property
    def trigger(self) -> None:
        return None

    def __call__(self, state: DecodeState, /) -> Spans:
        del state
        return ()
