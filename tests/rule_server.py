"""What the server of `teacher_server.py` says if the rule teacher sits behind it: a request is put together
again from what came over the wire, so that the reply is the one that the rule gives without a server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reflectvlm.curate.teachers.rule import RuleTeacher
from reflectvlm.curate.types import Question, Request, Said
from teacher_server import says

Reply = Callable[[dict[str, Any]], tuple[int, bytes]]


def rules(questions: Sequence[Question], who: Mapping[str, RuleTeacher]) -> Reply:
    """By the model that a request names."""
    rows = {_digest(question.images[0]): question.id for question in questions}

    def reply(body: dict[str, Any]) -> tuple[int, bytes]:
        (said,) = who[body["model"]]([_request(body, rows)])
        return 200, _written(said)

    return reply


def _request(body: dict[str, Any], rows: Mapping[str, str]) -> Request:
    *turns, user = body["messages"]
    system = turns[0]["content"] if turns else None
    parts = user["content"]
    images = [
        base64.b64decode(part["image_url"]["url"].partition(",")[2])
        for part in parts
        if part["type"] == "image_url"
    ]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return Request(
        row=rows[_digest(images[0])],
        purpose="answer" if system is None else _purpose(json.loads(text)),
        text=text,
        system=system,
        images=tuple(images),
        number=body.get("seed", 0),
        max_tokens=body["max_tokens"],
        temperature=body["temperature"],
    )


def _purpose(case: Mapping[str, Any]) -> str:
    if "so_far" in case:
        return "insert"
    return "rewrite" if "method" in case else "judge"


def _written(said: Said) -> bytes:
    usage = {"prompt_tokens": said.prompt_tokens, "completion_tokens": said.tokens}
    if said.text is not None:
        return says(said.text, usage=usage)
    if said.why.startswith("refused"):
        return says(None, message={"refusal": "no"}, usage=usage)
    assert said.why.startswith("cut"), said.why
    return says("and then", finish_reason="length", usage=usage)


def _digest(image: Any) -> str:
    return hashlib.sha256(image).hexdigest()
