"""BRPO's rewards (Qwen-LA, arXiv 2505.23558): accuracy, format, and the balance of reflections.

    R = accuracy + format + balance,    balance = 1 - |L_total / N - lambda| / lambda,    lambda = 100

N is the number of reflections, L_total the number of tokens inside all of them. Not in the paper, and so
parameters here: the three weights (1 each), what N = 0 gives (0), and a clip (none: a reflection of many
times lambda tokens costs many times as much).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from reflectvlm.protocols import Reward
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.layout import TagFormat
from reflectvlm.rewards.rubric import MAX_FAILED_SHARE, OnError, Rubric, with_extras
from reflectvlm.tags import Found, Layout, qwen_la, tag_names
from reflectvlm.types import Rollout

TARGET_TOKENS = 100.0
"""The paper's lambda."""


@dataclass(frozen=True, kw_only=True)
class ReflectionBalance:
    """Pays for reflections of `target_tokens` tokens on average: long ones are to become more and shorter.

    Counted are all complete blocks, `closed_blocks`, wherever they stand: whether the whole text is the
    layout is another reward's question. An empty block counts in N and has 0 tokens. Tokens are sampled
    ones; what re-attention inserts never counts, and neither do the tags.
    """

    target_tokens: float = TARGET_TOKENS
    """lambda: the mean number of tokens per reflection that earns the most, 1."""
    tag: str = "REFLECTION"
    """The block's name, without brackets."""
    none: float = 0.0
    """What an answer without any reflection gets; `clip` does not change it."""
    clip: Sequence[float] | None = None
    """(lowest, highest); None for neither. The formula's own highest value is 1, a lowest it has not."""
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target_tokens) and self.target_tokens > 0):
            raise ValueError(
                f"ReflectionBalance.target_tokens is {self.target_tokens}. "
                "It must be a number of tokens above 0."
            )
        if not self.tag or not self.tag.replace("-", "_").isidentifier():
            raise ValueError(
                f"ReflectionBalance.tag is {self.tag!r}. "
                "Write the block's name without brackets: 'REFLECTION'."
            )
        if not math.isfinite(self.none):
            raise ValueError(f"ReflectionBalance.none is {self.none}. It must be a finite number.")
        if self.clip is not None and (len(self.clip) != 2 or not self.clip[0] <= self.clip[1]):
            raise ValueError(
                f"ReflectionBalance.clip is {list(self.clip)}. Give the lowest and the highest value, "
                "e.g. [-1, 1], or null for no limits."
            )

    def __call__(self, group: Sequence[Rollout], /) -> list[float]:
        return [self._balance(rollout) for rollout in group]

    def _balance(self, rollout: Rollout) -> float:
        blocks = closed_blocks(rollout.text, self.tag)
        if not blocks:
            return self.none
        each = sum(tokens_inside(rollout, block) for block in blocks) / len(blocks)
        balance = 1 - abs(each - self.target_tokens) / self.target_tokens
        if self.clip is None:
            return balance
        low, high = self.clip
        return min(max(balance, low), high)


def brpo_rubric(
    layout: Layout | None = None,
    *,
    accuracy_weight: float = 1.0,
    format_weight: float = 1.0,
    balance_weight: float = 1.0,
    target_tokens: float = TARGET_TOKENS,
    tag: str = "REFLECTION",
    none: float = 0.0,
    clip: Sequence[float] | None = None,
    accuracy: Reward | None = None,
    extra: Mapping[str, Reward] | None = None,
    extra_weights: Mapping[str, float] | None = None,
    on_error: OnError = "drop",
    max_failures: int | None = None,
    max_failed_share: float | None = MAX_FAILED_SHARE,
) -> Rubric:
    """R as a rubric with the parts `accuracy`, `format` and `balance`; the layout is `qwen_la()` by default.

    The answer is read where the layout has it: in `<CONCLUSION>`, or in the box of one that ends with a
    box. `target_tokens`, `tag`, `none` and `clip` are those of `ReflectionBalance`. `extra` are further
    rewards by name, added with `extra_weights`; `on_error`, `max_failures` and `max_failed_share` are
    those of `Rubric`.
    """
    layout = layout or qwen_la()
    if tag not in tag_names(layout):
        raise ValueError(
            f"brpo_rubric balances <{tag}>, which layout {layout.name!r} does not have. "
            f"Its tags are {list(tag_names(layout))}: pass tag=... or another layout."
        )
    rewards: dict[str, Reward] = {
        "accuracy": accuracy or Accuracy(answer_from=layout.answer_tag or "boxed"),
        "format": TagFormat(layout=layout),
        "balance": ReflectionBalance(target_tokens=target_tokens, tag=tag, none=none, clip=clip),
    }
    weights = {"accuracy": accuracy_weight, "format": format_weight, "balance": balance_weight}
    return with_extras(
        "brpo_rubric",
        rewards,
        weights,
        extra,
        extra_weights,
        on_error=on_error,
        max_failures=max_failures,
        max_failed_share=max_failed_share,
    )


def closed_blocks(text: str, tag: str) -> tuple[Found, ...]:
    """All complete blocks of one tag in any text, in order, in linear time.

    A block reaches from an opening tag to the closing one, with no other opening tag of its name in
    between. So of nested blocks the innermost counts, of two openings before one closing the second, and
    an opening that is never closed and a stray closing are none. Other tags are text here, also where
    they overlap with a block.
    """
    found: list[Found] = []
    opened: tuple[int, int] | None = None
    for match in re.finditer(f"<(/?){re.escape(tag)}>", text):
        if not match[1]:
            opened = match.span()
        elif opened is not None:
            found.append(Found(tag, text[opened[1] : match.start()], opened[0], match.end()))
            opened = None
    return tuple(found)


def tokens_inside(rollout: Rollout, block: Found) -> int:
    """Tokens that begin between a block's two tags.

    Of a tag in plain text a piece may be merged with what stands beside it ("." and "</"); such a token
    belongs to what it begins with.
    """
    closing = len(f"</{block.tag}>")
    return rollout.tokens_between(block.start + closing - 1, block.end - closing)
