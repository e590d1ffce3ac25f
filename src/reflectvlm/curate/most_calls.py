"""The most that may be asked, said before anybody is: calls, tokens, and money if there are prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reflectvlm.curate.call_counts import Prices, guessed_tokens
from reflectvlm.curate.types import Request


@dataclass(frozen=True, kw_only=True)
class Most:
    """What one role may be asked. Tokens of prompts are guessed as those of a `Calls` before its trials."""

    calls: int
    prompt_tokens: int = 0
    tokens: int = 0
    """Of replies: each as long as it may be."""

    @classmethod
    def of(cls, calls: int, examples: Sequence[Request], answer: int = 0) -> Most:
        """So many calls like the examples, into each of which an answer of so many tokens will be put."""
        if not (calls and examples):
            return cls(calls=0)
        prompt = sum(map(guessed_tokens, examples)) / len(examples) + answer
        reply = sum(one.max_tokens for one in examples) / len(examples)
        return cls(calls=calls, prompt_tokens=round(calls * prompt), tokens=round(calls * reply))

    def told(self, prices: Prices) -> str:
        """`at most 24 calls, about 1,200 + at most 24,576 tokens, money about 0.31`: prompts are guessed."""
        said = f"at most {self.calls:,} calls, about {self.prompt_tokens:,} + at most {self.tokens:,} tokens"
        money = prices.of(self.prompt_tokens, self.tokens)
        return said if money is None else f"{said}, money about {money:,.2f}"
