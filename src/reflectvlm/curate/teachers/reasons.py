"""Why a teacher said nothing, in one word that reports count by: the start of `Said.why`, up to the colon.

refused, cut, empty     what the teacher itself did: kept, because asked again it would do the same
http 3xx to 5xx, timeout, no connection, garbled, too large, missing, image, unknown
                        what stood between: never kept, so the next run asks again
"""

from __future__ import annotations

import re

from reflectvlm.curate.types import Said

KEPT = frozenset({"refused", "cut", "empty"})
"""Its own word, to be remembered."""
OUT_OF_REACH = frozenset({"http 3xx", "http 4xx", "http 5xx", "timeout", "no connection", "garbled"})
"""The server is not there, or does not let us in; many in a row mean that the next will not get through."""


_ABOUT_THE_REQUEST = re.compile(r"http 4xx: HTTP (?:400|413|415|422)\b")


def is_about_the_request(said: Said) -> bool:
    """A server that answers others may turn this one down for its own sake: too long a prompt, too large an
    image. Nothing follows from it about the next."""
    return said.text is None and _ABOUT_THE_REQUEST.match(said.why) is not None


def nothing(reason: str, why: str, *, prompt_tokens: int = 0, tokens: int = 0, seconds: float = 0.0) -> Said:
    """A `Said` without text."""
    return Said(
        text=None, why=f"{reason}: {why}", prompt_tokens=prompt_tokens, tokens=tokens, seconds=seconds
    )


def reason_of(said: Said) -> str:
    """The word; empty if there is a text."""
    return "" if said.text is not None else said.why.partition(":")[0].strip() or "unknown"


def is_kept(said: Said) -> bool:
    """Whether the cache remembers it."""
    return said.text is not None or reason_of(said) in KEPT
