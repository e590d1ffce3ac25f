"""Sample + instruction -> spans, through the tokenizer's own chat template.

The template is rendered with stand-ins for the user's texts. Special tokens count as such only where
the template itself wrote them, so a question that spells `<|im_end|>` or `<|image_pad|>` stays a
question. What stands between two of them is encoded in one piece, user's text and template's
together: stock processing merges a full stop with the line break behind it, and so must we.
"""

from __future__ import annotations

import re
from typing import Any

from reflectvlm.spans import VisionIds
from reflectvlm.types import Instruction, Sample, Span, Spans, Text, Visual

IMAGE_MARKER = "<image>"
# Private-use characters: no template holds them, and they survive a template's trimming.
_STAND_IN = "\ue000{}\ue001"
_STAND_INS = re.compile("\ue000(\\d+)\ue001")


def chat_spans(tokenizer: Any, vision: VisionIds, sample: Sample, instruction: Instruction) -> Spans:
    """The prompt's spans, up to and including the header of the assistant's turn."""
    texts: list[str] = []

    def stand_in(text: str) -> str:
        texts.append(text)
        return _STAND_IN.format(len(texts) - 1)

    messages = _messages(sample, instruction, stand_in)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _with_images(_encode(tokenizer, _STAND_INS.split(rendered), texts), vision, sample)


def _encode(tokenizer: Any, pieces: list[str], texts: list[str]) -> list[int]:
    """Ids of template pieces (even places) and numbers of user texts (odd places)."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    borders = re.compile("(" + "|".join(map(re.escape, special)) + ")")
    ids: list[int] = []
    run = ""

    def plain(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    for i, piece in enumerate(pieces):
        if i % 2:
            run += texts[int(piece)]
            continue
        for j, part in enumerate(borders.split(piece)):
            if j % 2:
                ids += [*plain(run), tokenizer.convert_tokens_to_ids(part)]
                run = ""
            else:
                run += part
    return ids + plain(run)


def _messages(sample: Sample, instruction: Instruction, stand_in: Any) -> list[dict[str, Any]]:
    if sample.question.count(IMAGE_MARKER) == len(sample.images):
        parts = sample.question.split(IMAGE_MARKER)
        content: list[dict[str, Any]] = []
        for i, part in enumerate(parts):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": stand_in(part)}] if part.strip() else []
    else:
        content = [{"type": "image"} for _ in sample.images]
        content.append({"type": "text", "text": stand_in(sample.question)})
    system = instruction.system
    if instruction.place == "system" and instruction.text:
        system = instruction.text
    elif instruction.text:
        content.append({"type": "text", "text": stand_in("\n" + instruction.text)})
    turn = {"role": "user", "content": content}
    return [turn] if system is None else [{"role": "system", "content": stand_in(system)}, turn]


def _with_images(ids: list[int], vision: VisionIds, sample: Sample) -> Spans:
    """Replaces each (vision_start, image_pad, vision_end) of the template by a `Visual`."""
    spans: list[Span] = []
    block = list(vision)
    start = image = i = 0
    while i < len(ids):
        if ids[i : i + 3] == block:
            spans += [Text(ids=tuple(ids[start:i])), Visual(image=image)]
            image, i = image + 1, i + 3
            start = i
        else:
            i += 1
    spans.append(Text(ids=tuple(ids[start:])))
    if image != len(sample.images):
        raise ValueError(
            f"Sample {sample.id!r} has {len(sample.images)} images but its rendered chat shows {image}. "
            "The model's chat template must write one vision_start, image_pad, vision_end per image part."
        )
    return tuple(span for span in spans if not isinstance(span, Text) or span.ids)
