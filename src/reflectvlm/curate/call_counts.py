"""What calls took and will take: counts after, estimates before, and what they cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from reflectvlm.curate.teachers.reasons import reason_of
from reflectvlm.curate.types import Request, Said
from reflectvlm.train.console import duration

CHARACTERS_PER_TOKEN = 4
IMAGE_TOKENS = 1000
"""Both for guesses only: of a teacher that counts no tokens, and before it is asked."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Money per million tokens, in a currency of your choice. Example: `Prices(prompt=2.5, reply=10)`"""

    prompt: float = 0.0
    reply: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt", "reply"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Prices.{name} is {value}. It is money per million tokens, 0 or more.")

    def of(self, prompt_tokens: float, tokens: float) -> float | None:
        """None: nobody gave a price."""
        if not (self.prompt or self.reply):
            return None
        return (self.prompt * prompt_tokens + self.reply * tokens) / 1e6


class Outcome(NamedTuple):
    """What became of one request."""

    purpose: str
    said: Said
    new: bool
    """It was asked now, and not read from the cache."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of the requests of one purpose, each counted once."""

    requests: int = 0
    replies: int = 0
    new: int = 0
    """Asked by this process."""
    prompt_tokens: int = 0
    tokens: int = 0
    new_prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of all requests so far. What is not called new is the same whether or not a run was killed between."""

    total: Tally = field(default_factory=Tally)
    by_purpose: Mapping[str, Tally] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    """How many have no reply, by reason."""
    money: float | None = None
    """Of all tokens, those of earlier runs as well; None without prices."""
    new_money: float | None = None

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], prices: Prices) -> Counts:
        found = list(outcomes)
        purposes = sorted({one.purpose for one in found})
        total = _tally(found)
        errors = Counter(reason_of(one.said) for one in found if one.said.text is None)
        return cls(
            total=total,
            by_purpose={name: _tally([one for one in found if one.purpose == name]) for name in purposes},
            errors=dict(sorted(errors.items())),
            money=prices.of(total.prompt_tokens, total.tokens),
            new_money=prices.of(total.new_prompt_tokens, total.new_tokens),
        )

    def row(self) -> dict[str, Any]:
        """Plain values for a report's file."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: `answer: 40 requests, 38 replies, 12 asked now, 9,000 + 4,000 tokens`."""
        lines = [f"{name}: {_told(tally)}" for name, tally in self.by_purpose.items()]
        if len(lines) > 1:
            lines.append(f"in all: {_told(self.total)}")
        if self.errors:
            lines.append("no reply: " + ", ".join(f"{name} {count:,}" for name, count in self.errors.items()))
        if self.money is not None and self.new_money is not None:
            lines.append(f"money: {self.money:,.2f}, of which now {self.new_money:,.2f}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is still to be asked, and what it will take. Numbers of tokens are means of the trials times the
    calls; without a trial the prompts' are guessed from their characters and the replies' are unknown."""

    calls: int
    """Not in the cache, the trials among them."""
    cached: int
    trials: int
    """How many calls it was measured on."""
    prompt_tokens: int
    tokens: int | None = None
    seconds: float | None = None
    """On the clock, with as many at one time as there will be, and within the limits per minute."""
    money: float | None = None
    errors: Mapping[str, int] = field(default_factory=dict)
    """What the trials failed for, by reason."""

    def __str__(self) -> str:
        said = f"{self.calls:,} calls to make, {self.cached:,} in the cache"
        if not self.calls:
            return said
        replies = "?" if self.tokens is None else f"{self.tokens:,}"
        time = "unknown" if self.seconds is None else duration(self.seconds)
        said += f"; about {self.prompt_tokens:,} + {replies} tokens, time {time}"
        if self.money is not None:
            said += f", money {self.money:,.2f}"
        said += f" ({self.trials} trial calls" if self.trials else " (no trial calls"
        said += "".join(f", {count} without a reply: {name}" for name, count in self.errors.items())
        return said + ")"


LIMITS = ("requests_per_minute", "tokens_per_minute")
"""What a teacher may have."""


def estimated(
    missing: Sequence[Request],
    trials: Sequence[Said],
    *,
    cached: int,
    each: float,
    at_once: int,
    limits: Mapping[str, float | None],
    prices: Prices,
) -> Estimate:
    """From what the trials took, which were some of the missing ones; `each` is one call's seconds."""
    calls = len(missing)
    errors = Counter(reason_of(said) for said in trials if said.text is None)
    known: dict[str, Any] = {"calls": calls, "cached": cached, "trials": len(trials)}
    known["errors"] = dict(sorted(errors.items()))
    if not missing:
        return Estimate(**known, prompt_tokens=0, tokens=0, seconds=0.0, money=prices.of(0, 0))
    replies = [said for said in trials if said.prompt_tokens or said.tokens]
    if not replies:
        return Estimate(**known, prompt_tokens=sum(map(guessed_tokens, missing)))
    prompt_tokens, tokens = (
        calls * sum(counted) / len(replies)
        for counted in ([said.prompt_tokens for said in replies], [said.tokens for said in replies])
    )
    amounts = (calls, prompt_tokens + tokens)
    waits = [
        60 * amount / limit for amount, name in zip(amounts, LIMITS, strict=True) if (limit := limits[name])
    ]
    return Estimate(
        **known,
        prompt_tokens=round(prompt_tokens),
        tokens=round(tokens),
        seconds=max([calls * each / at_once, *waits]),
        money=prices.of(prompt_tokens, tokens),
    )


def guessed_tokens(request: Request) -> int:
    """About how many tokens a prompt has, for teachers that do not say."""
    characters = len(request.text) + len(request.system or "")
    return -(-characters // CHARACTERS_PER_TOKEN) + IMAGE_TOKENS * len(request.images)


def _tally(outcomes: list[Outcome]) -> Tally:
    new = [one.said for one in outcomes if one.new]
    return Tally(
        requests=len(outcomes),
        replies=sum(one.said.text is not None for one in outcomes),
        new=len(new),
        prompt_tokens=sum(one.said.prompt_tokens for one in outcomes),
        tokens=sum(one.said.tokens for one in outcomes),
        new_prompt_tokens=sum(said.prompt_tokens for said in new),
        new_tokens=sum(said.tokens for said in new),
    )


def _told(tally: Tally) -> str:
    return (
        f"{tally.requests:,} requests, {tally.replies:,} replies, {tally.new:,} asked now, "
        f"{tally.prompt_tokens:,} + {tally.tokens:,} tokens"
    )
