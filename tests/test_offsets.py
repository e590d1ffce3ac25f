"""Where tokens begin in the decoded text, held against what the tokenizer itself decodes."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from fixtures import make_policy, tokenizer
from reflectvlm.models.offsets import token_bytes, token_offsets
from reflectvlm.models.qwen_vl import QwenVL

TAGS = ("<REFLECTION>", "</REFLECTION>", "<é>", "<two words>", "<π>")
"""Added tokens: plain ones, a letter that stands for a byte, a space, a letter that stands for none."""


@pytest.fixture(scope="module")
def policy(tiny_policy: QwenVL) -> QwenVL:
    """The tiny policy with tags of its own; its tokenizer is a copy, because other tests share theirs."""
    tags: Any = copy.deepcopy(tokenizer())
    tags.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
    return QwenVL(model=tiny_policy.model, tokenizer=tags, image_processor=tiny_policy.image_processor)


def begins(policy: QwenVL, ids: list[int]) -> tuple[int, ...]:
    """The same from single bytes: a byte's character is the one that decoding up to it ends with, once
    the following bytes have said whether that character went on."""
    data, first = b"", []
    for token in policy.tokenizer.convert_ids_to_tokens(ids):
        first.append(len(data))
        data += b"" if token is None else token_bytes(token)
    starts: list[int] = []  # per byte, the character it belongs to
    text, at = data.decode(errors="replace"), 0
    for number, character in enumerate(text):
        size = len(character.encode())
        if character == "\N{REPLACEMENT CHARACTER}" and data[at : at + size] != character.encode():
            # Broken off: as many bytes as leave the rest decoding to the rest.
            size = next(n for n in (1, 2, 3) if data[at + n :].decode(errors="replace") == text[number + 1 :])
        starts += [number] * size
        at += size
    assert len(starts) == len(data)
    return tuple((*starts, len(text))[place] for place in first)


IDS = st.lists(
    st.one_of(
        st.integers(0, 255),  # single bytes: mostly broken UTF-8
        st.integers(128, 255),
        st.integers(0, 2327 + len(TAGS)),
        st.integers(2322, 2340),  # tags, and ids behind the last token
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(ids=IDS)
def test_offsets_are_those_of_what_decode_gives(policy: QwenVL, ids: list[int]) -> None:
    """Bug: offsets that drift from the text behind an emoji cut in two, a broken byte or a tag, so that a
    reward counts the wrong tokens."""
    offsets = policy.offsets(ids)
    text = policy.decode(ids)
    assert offsets == begins(policy, ids)
    assert list(offsets) == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    joined = b"".join(token_bytes(token) for token in policy.tokenizer.convert_ids_to_tokens(ids) if token)
    assert joined.decode(errors="replace") == text, "the bytes are not those that decode joins"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_a_token_that_begins_a_character_begins_its_rest(policy: QwenVL, text: str) -> None:
    """Bug: off by one: `decode(ids)[offset:]` must be what the tokens from there on decode to."""
    ids = policy.tokenizer.encode(f"π{text}<REFLECTION>é{text}", add_special_tokens=False)
    whole, offsets = policy.decode(ids), policy.offsets(ids)
    for place, offset in enumerate(offsets):
        if place == 0 or offset > offsets[place - 1]:
            rest = policy.decode(ids[place:])
            assert whole[offset:] == rest or rest.startswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # "€" is E2 82 AC, written "â", "Ĥ", "¬" by byte-level BPE.
        (["â", "Ĥ", "¬", "!"], (0, 0, 0, 1)),
        (["aâ", "Ĥ¬b", "c"], (0, 1, 3)),
        # Broken off after two bytes: one U+FFFD, and the next token begins behind it.
        (["âĤ", "!"], (0, 1)),
        (["â", "â", "Ĥ¬"], (0, 1, 1)),
        # Never finished: the last U+FFFD stands for both bytes.
        (["a", "â", "Ĥ"], (0, 1, 1)),
        # No token owns the id: it begins where the next does.
        (["a", None, "b", None], (0, 1, 1, 2)),
        (["â", None, "Ĥ¬", "b"], (0, 0, 0, 1)),
        ([], ()),
    ],
)
def test_offsets_by_hand(tokens: list[str | None], expected: tuple[int, ...]) -> None:
    """Bug: a character's second token counted as a new character."""
    assert token_offsets(tokens) == expected


def test_every_byte_is_the_tokenizers_own() -> None:
    """Bug: two letters swapped in the table; the first 256 ids are the 256 bytes in some order."""
    letters = tokenizer().convert_ids_to_tokens(list(range(256)))
    assert sorted(token_bytes(letter) for letter in letters) == [bytes([byte]) for byte in range(256)]
    for text in ("a b\n", "é", "€", "\t\x7f\xa0\xad"):
        pieces = tokenizer().convert_ids_to_tokens(tokenizer().encode(text))
        assert b"".join(map(token_bytes, pieces)) == text.encode()


def test_a_long_answer_takes_linear_time() -> None:
    """Bug: decoding every beginning anew, which takes minutes for a long answer of broken bytes."""
    started = time.thread_time()
    assert token_offsets(["â", "Ĥ"] * 50_000)[-1] == 49_999
    assert time.thread_time() - started < 5


def test_offsets_of_nothing() -> None:
    """Bug: a tokenizer asked for no tokens at all."""
    assert make_policy().offsets([]) == ()
