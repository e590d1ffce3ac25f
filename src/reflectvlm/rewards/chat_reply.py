"""What an OpenAI-compatible server sends back, read strictly. Pure, no network.

`read_chat` takes the first choice of a completion apart; `read_text` wants a whole text of it and says why
there is none. Left out: streams, tools, several choices.
"""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image


class BadReply(Exception):
    """A reply without what was asked for. `kind` is what it is counted by."""

    kind: ClassVar[str] = "unread"
    again: ClassVar[bool] = True
    """Whether asking again may help."""


class NoCompletion(BadReply):
    """What came is no chat completion: the word of a proxy or of a broken server, not of the model."""

    kind = "garbled"


class Refusal(BadReply):
    """The model, or its server, declined to answer. Asking again would change nothing."""

    kind = "refused"
    again = False


class EmptyReply(BadReply):
    """The model said nothing."""

    kind = "empty"


class Chat(NamedTuple):
    """One completion. Tokens are None where the server does not count them."""

    text: str
    refusal: str
    """Why the model declined, in its words; empty if it did not."""
    cut: bool
    """It ended at its limit of tokens."""
    prompt_tokens: int | None = None
    tokens: int | None = None


def read_chat(body: bytes) -> Chat:
    """Raises `NoCompletion` for anything that is no chat completion."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        message = choice["message"]
        if not isinstance(message, dict):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise NoCompletion(
            f"the server's reply is no chat completion: {short(body.decode(errors='replace'))}"
        ) from None
    finish = choice.get("finish_reason")
    refusal = message.get("refusal") or ("content filter" if finish == "content_filter" else "")
    usage = reply.get("usage")
    return Chat(
        _text(message.get("content")),
        str(refusal),
        finish == "length",
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
    )


def read_text(body: bytes, who: str = "the judge") -> str:
    """The text of a chat completion. Raises `BadReply` if it is empty, cut or a refusal."""
    chat = read_chat(body)
    if chat.refusal:
        raise Refusal(f"{who} refused: {short(chat.refusal)}")
    if not chat.text.strip():
        raise EmptyReply(f"{who}'s reply is empty")
    if chat.cut:
        raise BadReply(f"{who}'s reply was cut at its limit of tokens: {short(chat.text)}")
    return chat.text


def data_url(image: Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return encoded_url("png", file.getvalue())


def encoded_url(kind: str, data: bytes) -> str:
    """`kind` is the second half of the media type: png, jpeg, webp."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def short(text: str) -> str:
    line = " ".join(str(text)[:400].split())
    return repr(line if len(line) <= 160 else f"{line[:157]}...")


def _text(content: Any) -> str:
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _count(usage: Any, name: str) -> int | None:
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None
