"""Where each token begins in the decoded text, for byte-level BPE (the tokenizers of Qwen).

Such a tokenizer joins its tokens' bytes first and decodes them as UTF-8 afterwards, so a character may
span tokens, and bytes that are no UTF-8 become U+FFFD, one for each longest beginning of a character
that was broken off. Time is linear. Left out: tokenizers that clean up spaces after decoding.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache, lru_cache

_decoder = codecs.getincrementaldecoder("utf-8")


def token_offsets(tokens: Sequence[str | None]) -> tuple[int, ...]:
    """The character at which each token begins, `tokens` as the vocabulary spells them ("Ġleft").

    A token that begins within a character begins at that character. None, an id that no token owns,
    decodes to nothing and begins where the next token does.

    Example: the three bytes of "€" as one token each, then "!", begin at (0, 0, 0, 1).
    """
    decoder = _decoder("replace")
    offsets: list[int] = []
    complete = 0  # characters decoded so far; bytes kept back by the decoder belong to the next one
    empty = 0  # tokens without bytes since the last one with some
    for token in tokens:
        data = b"" if token is None else token_bytes(token)
        if not data:
            empty += 1
            continue
        first = complete
        if decoder.getstate()[0]:
            # The first byte goes on with the character, or breaks it off and begins another.
            complete += len(decoder.decode(data[:1]))
            first = complete if decoder.getstate()[0] else complete - 1
            data = data[1:]
        offsets += [first] * (empty + 1)
        empty = 0
        complete += len(decoder.decode(data))
    complete += len(decoder.decode(b"", True))
    return (*offsets, *[complete] * empty)


@lru_cache(maxsize=2**18)
def token_bytes(token: str) -> bytes:
    """The bytes that a token stands for: one per letter, or the text's own if a letter stands for none
    (an added token may hold a space, which byte-level BPE writes as "Ġ")."""
    table = byte_of_letter()
    if all(letter in table for letter in token):
        return bytes(table[letter] for letter in token)
    return token.encode()


@cache
def byte_of_letter() -> dict[str, int]:
    """Letter -> byte: printable Latin-1 letters stand for their own byte, those from U+0100 on for the
    other 68 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
