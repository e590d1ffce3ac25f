"""A model behind an OpenAI-compatible server as a teacher: vLLM, SGLang, llama.cpp, or a hosted one.

How the server is asked, and asked again, is in `rewards/chat_client.py`; `requests_per_minute` and
`tokens_per_minute` keep to its limits, and a pause that it asks for holds for all requests. A refusal and a
reply cut at `max_tokens` are not asked again: the answer would be the same, and it is paid for.

Left out: streaming, tools, batch interfaces with other addresses.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from reflectvlm.curate.call_counts import CHARACTERS_PER_TOKEN, guessed_tokens
from reflectvlm.curate.teachers.reasons import nothing
from reflectvlm.curate.types import Request, Said
from reflectvlm.data.fetch import ImageLimits, RowImage, fetch
from reflectvlm.data.images import BadImage, load_image
from reflectvlm.data.rows import IMAGE_MARKER
from reflectvlm.rewards.chat_client import ChatClient, client_of
from reflectvlm.rewards.chat_pace import Pace
from reflectvlm.rewards.chat_reply import Chat, EmptyReply, data_url, encoded_url, read_chat, short
from reflectvlm.rewards.lanes import side_by_side

_SENT_AS_THEY_ARE = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True, eq=False)
class HttpTeacher:
    """Example: `HttpTeacher(url="http://localhost:8000/v1", model="Qwen2.5-VL-72B-Instruct",
    requests_per_minute=300)([Request(row="17", purpose="answer", text="How many?")])`
    """

    url: str
    """Up to and including `/v1`."""
    model: str
    key_env: str | None = None
    """Name of the environment variable that holds the API key; None: the server wants none."""
    label: str | None = None
    """Stands for the address in the cache's keys, so that a server may move; None: the address itself."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, over our own; None leaves a field out. Example: a server that knows
    no seed and wants other words: `{"seed": None, "max_tokens": None, "max_completion_tokens": 2048}`."""
    max_pixels: int | None = None
    """Larger images are shrunk to so many, which costs less; None sends them as they are."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompt and reply together."""
    connect_timeout: float = 10.0
    timeout: float = 180.0
    """Seconds for one attempt from beginning to end."""
    retries: int = 5
    backoff: float = 1.0
    """Seconds before the second attempt; doubled each time, of which a random part from a half on."""
    max_backoff: float = 120.0
    """Longest pause. A server that asks for a longer one is not asked again."""
    concurrency: int = 8
    """Requests at the same time."""
    seed: int = 0
    """Of the random part of the pauses; and, where the temperature is above 0, of what the server draws."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """What an image may cost."""
    batch: ClassVar[int] = 1
    """`Calls` gives a thread one request at a time."""
    _pace: Pace = field(init=False, repr=False)
    _client: ChatClient = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"HttpTeacher.{name} is {value}. It must be above 0, or None for no limit.")
        if not self.model:
            raise ValueError("HttpTeacher.model is empty. Name the model as the server does.")
        object.__setattr__(self, "_pace", Pace(self.requests_per_minute, self.tokens_per_minute))
        object.__setattr__(self, "_client", client_of(self, who="the teacher", pace=self._pace))

    @property
    def name(self) -> str:
        decides: dict[str, Any] = {"extra": dict(self.extra), "max_pixels": self.max_pixels}
        decides["seed"] = self.seed
        told = {key: value for key, value in decides.items() if value}
        more = f" {json.dumps(told, sort_keys=True)}" if told else ""
        return f"{self.model} at {self.label or self.url.rstrip('/')}{more}"

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        return side_by_side([partial(self._said, request) for request in requests], self.concurrency)

    def _said(self, request: Request) -> Said:
        try:
            body = json.dumps(self._body(request), sort_keys=True).encode()
        except BadImage as bad:
            return nothing("image", str(bad))
        guessed = guessed_tokens(request) + request.max_tokens
        start = time.monotonic()
        asked = self._client.ask(body, hashlib.sha256(body).hexdigest(), _read, guessed)
        seconds = time.monotonic() - start
        if asked.found is None:
            return nothing(asked.kind, asked.why, seconds=seconds)
        said = _as_said(asked.found, request, seconds)
        self._pace.end(guessed, said.prompt_tokens + said.tokens)
        return said

    def _body(self, request: Request) -> dict[str, Any]:
        turns = [{"role": "system", "content": request.system}] if request.system is not None else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*turns, {"role": "user", "content": self._content(request)}],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        if request.temperature > 0:
            # One text is asked several times for several answers: the same seed would give the same one.
            body["seed"] = self.seed + request.number
        return {key: value for key, value in {**body, **self.extra}.items() if value is not None}

    def _content(self, request: Request) -> str | list[dict[str, Any]]:
        """Images stand where the text has a marker for each, else in front of it, as a policy sees them."""
        if not request.images:
            return request.text
        pictures = [
            {"type": "image_url", "image_url": {"url": self._address(image, request.root)}}
            for image in request.images
        ]
        texts = request.text.split(IMAGE_MARKER)
        if len(texts) != len(pictures) + 1:
            return [*pictures, {"type": "text", "text": request.text}]
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(texts):
            parts += [{"type": "text", "text": text}] if text else []
            parts += pictures[number : number + 1]
        return parts

    def _address(self, image: RowImage, root: Path) -> str:
        """A data URL; a PNG or an upright JPEG that is small enough is sent as it is."""
        opened = load_image(image, root, self.limits)  # also the check that it is an image at all
        if self.max_pixels is not None and opened.width * opened.height > self.max_pixels:
            return data_url(_shrunk(opened, self.max_pixels))
        if not isinstance(image, Image.Image):
            data = fetch(image, root, self.limits)
            kind = next((kind for start, kind in _SENT_AS_THEY_ARE.items() if data.startswith(start)), None)
            if kind is not None and _upright(data):
                return encoded_url(kind, data)
        return data_url(opened)


def _read(body: bytes) -> Chat:
    """A refusal and a cut reply are results; nothing at all is asked for again."""
    chat = read_chat(body)
    if not chat.refusal and not chat.text.strip() and not chat.cut:
        raise EmptyReply("the teacher's reply is empty")
    return chat


def _as_said(chat: Chat, request: Request, seconds: float) -> Said:
    prompt_tokens, tokens = chat.prompt_tokens, chat.tokens
    if prompt_tokens is None:
        prompt_tokens = guessed_tokens(request)
    if tokens is None:
        tokens = -(-len(chat.text) // CHARACTERS_PER_TOKEN)
    spent: dict[str, Any] = {"prompt_tokens": prompt_tokens, "tokens": tokens, "seconds": seconds}
    if chat.refusal:
        return nothing("refused", short(chat.refusal), **spent)
    if chat.cut:
        return nothing("cut", f"at {request.max_tokens} tokens: {short(chat.text)}", **spent)
    return Said(text=chat.text, **spent)


def _shrunk(image: Image.Image, pixels: int) -> Image.Image:
    scale = math.sqrt(pixels / (image.width * image.height))
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def _upright(data: bytes) -> bool:
    """Servers differ in whether they turn a photo the way its camera was held; we do it before."""
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(_ORIENTATION, 1) == 1
