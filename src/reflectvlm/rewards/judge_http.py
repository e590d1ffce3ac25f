"""A model behind an OpenAI-compatible server as a judge.

Every question ends with a verdict or with a reason why there is none; how the server is asked, and asked
again, is in `chat_client.py`. A reply that is no verdict is asked for again, too. Verdicts, refusals and what
stays unreadable are the model's word and are cached; what a broken server said is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reflectvlm.rewards.chat_client import ChatClient, client_of
from reflectvlm.rewards.judge_cache import VerdictCache
from reflectvlm.rewards.judge_reply import INSTRUCTION, messages, read_reply
from reflectvlm.rewards.verdict import Verdict, case_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class HttpJudge:
    """Example: `HttpJudge(url="http://localhost:8000/v1", model="Qwen2.5-72B-Instruct",
    key_env="JUDGE_KEY", cache="runs/judge.jsonl")("2 + 3?", "5", "five").score`
    """

    url: str
    """Up to and including `/v1`."""
    model: str
    key_env: str | None = None
    """Name of the environment variable that holds the API key; None: the server wants none."""
    instruction: str = INSTRUCTION
    temperature: float = 0.0
    max_tokens: int = 512
    json_mode: bool = True
    """Asks the server for `response_format: json_object`; turn it off for one that does not know it."""
    max_characters: int = 20_000
    """Of a longer answer only the end is judged."""
    connect_timeout: float = 10.0
    timeout: float = 60.0
    """Seconds for one attempt from beginning to end, however slowly the server sends."""
    retries: int = 4
    backoff: float = 1.0
    """Seconds before the second attempt; doubled each time, of which a random part from a half on."""
    max_backoff: float = 60.0
    """Longest pause. A server that asks for a longer one is not asked again."""
    concurrency: int = 8
    """Requests at the same time, whoever asks."""
    seed: int = 0
    """Of the random part of the pauses."""
    cache: str | None = None
    """File that keeps verdicts and refusals; asked for the same again, the judge reads it there."""
    _client: ChatClient = field(init=False, repr=False, compare=False)
    _cache: VerdictCache | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_client", client_of(self))
        for name in ("max_tokens", "max_characters"):
            if not getattr(self, name) > 0:
                raise ValueError(f"HttpJudge.{name} is {getattr(self, name)}. It must be above 0.")
        object.__setattr__(self, "_cache", VerdictCache(self.cache) if self.cache else None)

    def __call__(self, question: str, gold: str, answer: str, images: Sequence[Image] = (), /) -> Verdict:
        body = self._body(question, gold, answer, images)
        key = hashlib.sha256(f"{self.url}\n".encode() + body).hexdigest()
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            return known
        asked = self._client.ask(body, key, read_reply)
        verdict = asked.found or Verdict(score=None, why=asked.told)
        if self._cache is None or not asked.its_word:
            return verdict
        case = case_of(question, gold, answer, images)
        return self._cache.put(key, verdict, case=case, model=self.model)

    def _body(self, question: str, gold: str, answer: str, images: Sequence[Image]) -> bytes:
        chat = messages(self.instruction, question, gold, answer, images, self.max_characters)
        request: dict[str, Any] = {
            "model": self.model,
            "messages": chat,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.json_mode:
            request["response_format"] = {"type": "json_object"}
        return json.dumps(request, sort_keys=True).encode()
