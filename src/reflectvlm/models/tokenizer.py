"""A small tokenizer in Qwen's format, cut from Qwen's own byte-pair ranks.

Merges are learned in rank order, so the first K of them are themselves a valid byte-level BPE with
Qwen's splitting rules, special tokens and exact round trips. A small K keeps the embedding of the
tiny policy small; a text takes more tokens at K = 2,048 than with all 151,387.

The ranks ship with `dashscope` (Apache-2.0, `dashscope/resources/qwen.tiktoken`); see NOTICE. The
result ships in `models/tiny_base/`, so nobody needs that package to train.
"""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

from reflectvlm.models.offsets import byte_of_letter

# The added tokens of Qwen2.5, in the order of their ids. `<think>` and `<back>` are not among them:
# they are plain text there, and here.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# What Qwen2.5-VL's chat format is, written as a template: a system turn unless one is given, each
# turn between im_start and im_end, an image as vision_start, image_pad, vision_end.
CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def qwen_tokenizer(ranks_file: Path, merges: int = 2048) -> Any:
    """A `Qwen2Tokenizer` with the 256 bytes, the first `merges` merges and the special tokens.

    `ranks_file` holds lines of "base64-token rank".
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    ranks = _read_ranks(ranks_file, 256 + merges)
    spell = {byte: letter for letter, byte in byte_of_letter().items()}
    vocabulary = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    pairs: Any = [
        tuple("".join(spell[b] for b in part) for part in _halves(token, ranks))
        for token in ranks
        if len(token) > 1
    ]
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=pairs, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _read_ranks(file: Path, keep: int) -> dict[bytes, int]:
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return dict(sorted(ranks.items(), key=lambda item: item[1])[:keep])


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """The two parts whose merge made `token`: apply all merges older than the token itself."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        older = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = min(range(len(older)), key=older.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)
