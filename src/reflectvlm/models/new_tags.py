"""Tags as special tokens of their own, in embedding rows that no token owns yet (Qwen-LA's tags).

A new row is the mean of the rows of the tag's pieces as plain text, in the input embedding and, where
it is a matrix of its own, in the head. Why the mean, as it is:

- in the head a tag's logit is then the mean of its pieces' logits, so at first no tag is likelier than
  its likeliest piece. A mean scaled up to the length of a usual row would stretch the part that all
  rows share, and with it every tag's logit;
- as an input its length hardly matters: a normalisation stands in front of every layer, and rows share
  so much that a mean of several is not much shorter than one;
- an opening and its closing tag begin close together, apart by one piece (`<` or `</`). They need no
  more: each has targets of its own and so from the first step a gradient of its own, even if two tags
  were made of the same pieces.

Left out: larger embeddings. Qwen2.5-VL has rows to spare, and a matrix that keeps its shape stays
loadable by everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def add_tags(model: Any, tokenizer: Any, tags: Sequence[str]) -> tuple[int, ...]:
    """Ids of `tags`, each a special token afterwards. Those that were already keep their rows.

    Example: `add_tags(model, tokenizer, ("<REFLECTION>", "</REFLECTION>"))`

    Raises ValueError, with nothing changed, for a tag that is no single word or an ordinary token
    already, and if there are fewer spare rows than new tags.
    """
    if isinstance(tags, str):
        raise ValueError(f"new_tags is {tags!r}. It is a list of tags: [{tags!r}].")  # noqa: TRY004
    new = [tag for tag in dict.fromkeys(tags) if not _is_special(tokenizer, tag)]
    pieces = [_pieces(tokenizer, tag) for tag in new]
    first, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if first + len(new) > rows:
        raise ValueError(
            f"{len(new)} new tags need as many spare embedding rows, but of the model's {rows} rows "
            f"{max(rows - first, 0)} are spare. Add fewer tags, or take a model with a larger vocabulary."
        )
    if new:
        _register(tokenizer, new, first)
    for weight in matrices(model):
        _fill(weight, range(first, first + len(new)), pieces)
    return tuple(int(tokenizer.convert_tokens_to_ids(tag)) for tag in tags)


def matrices(model: Any) -> list[Tensor]:
    """The weights with one row per token: the input embedding, and the head where it is not tied."""
    found = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return found[:1] if found[0] is found[1] else found


def _is_special(tokenizer: Any, tag: str) -> bool:
    return any(token.special and token.content == tag for token in tokenizer.added_tokens_decoder.values())


def _pieces(tokenizer: Any, tag: str) -> list[int]:
    """Ids of the tag as plain text."""
    if not isinstance(tag, str) or not tag or any(map(str.isspace, tag)):
        raise ValueError(
            f"New tag {tag!r} is empty or has white space. Write a tag in one word, e.g. '<REFLECTION>'."
        )
    if tag in tokenizer.get_vocab() or len(tokenizer.encode(tag, add_special_tokens=False)) == 1:
        raise ValueError(
            f"New tag {tag!r} is an ordinary token of this tokenizer already, which texts use as such. "
            f"Choose a spelling that is none, e.g. '<{tag.strip('<>').upper()}>'."
        )
    return list(tokenizer.encode(tag, add_special_tokens=False, split_special_tokens=True))


def _register(tokenizer: Any, new: Sequence[str], first: int) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in new])
    ids = tokenizer.convert_tokens_to_ids(list(new))
    assert ids == list(range(first, first + len(new))), f"new ids {ids} do not follow {first - 1}"


@torch.no_grad()
def _fill(weight: Tensor, rows: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
    for row, of_tag in zip(rows, pieces, strict=True):
        weight[row] = weight[list(of_tag)].mean(dim=0)
