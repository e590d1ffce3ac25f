"""The small tokenizer is the beginning of Qwen's own: same ids, same splits, exact round trips."""

from __future__ import annotations

import base64
import importlib.util
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fixtures import tokenizer
from reflectvlm.models.tokenizer import SPECIAL_TOKENS, qwen_tokenizer

KEPT = 256 + 2048
# Qwen2.5's splitting rule, as its model card's tokenizer.json states it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
texts = st.text(
    st.one_of(st.sampled_from("abcABC ’'sS 12.,?!\n\r\t<>|_\\{}äß中文😀"), st.characters(codec="utf-8"))
)


def ranks_file() -> Path:
    """Qwen's own ranks; the package that ships them is optional."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.skip("dashscope, which ships Qwen's ranks, is not installed")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def oracle() -> Any:
    """An independent byte-pair encoder on Qwen's own ranks, cut at the same place."""
    tiktoken = pytest.importorskip("tiktoken")
    lines = (line.split() for line in ranks_file().read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    first = {token: rank for token, rank in ranks.items() if rank < KEPT}
    return tiktoken.Encoding("qwen-first", pat_str=PATTERN, mergeable_ranks=first, special_tokens={})


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def test_the_first_ids_are_qwens_own(oracle: Any) -> None:
    """One wrong merge shifts every later id."""
    for i in range(KEPT):
        token = oracle.decode_single_token_bytes(i)
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue  # a part of a character: the encoding test below covers it
        assert tokenizer().decode([i]) == text, i
    assert len(tokenizer()) == KEPT + len(SPECIAL_TOKENS) == 2318
    assert sorted(tokenizer().convert_tokens_to_ids(list(SPECIAL_TOKENS))) == list(range(KEPT, 2318))


@given(text=texts)
@settings(max_examples=200, deadline=None)
@example("What's the upper-left digit?\n\n  12345 I'LL")
def test_ids_are_those_of_an_independent_encoder(oracle: Any, text: str) -> None:
    """Splitting rules and merge order, against another implementation. Qwen normalises to NFC."""
    if any(token in text for token in SPECIAL_TOKENS):
        return
    normal = unicodedata.normalize("NFC", text)
    assert encode(text) == oracle.encode(normal, disallowed_special=())


@given(text=texts)
@settings(max_examples=200, deadline=None)
@example("  <think> a .</think>  \\boxed{ 7 } , n't .")
def test_round_trips(text: str) -> None:
    """A decoder that tidies spaces up changes what rewards read."""
    normal = unicodedata.normalize("NFC", text)
    back = tokenizer().decode(encode(text), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert back == normal


@pytest.mark.parametrize("tag", ["<back>", "</back>", "<think>", "</think>", "<REFLECTION>"])
def test_tags_are_plain_text(tag: str) -> None:
    """As in Qwen2.5: a tag that were one special token would hide the multi-token case in all tests."""
    ids = encode(tag)
    assert len(ids) > 1
    assert max(ids) < KEPT


def test_special_tokens_are_single_ids() -> None:
    for token in SPECIAL_TOKENS:
        (single,) = encode(token)
        assert single >= KEPT


def test_the_shipped_files_are_what_the_builder_makes() -> None:
    """`models/tiny_base/` must be reproducible from Qwen's ranks."""
    built = qwen_tokenizer(ranks_file())
    assert built.get_vocab() == tokenizer().get_vocab()
    text = "<think>It's 3 + 8 = 11.</think> <back>Again: 中文 😀</back>\n\\boxed{11}<|im_end|>"
    assert built.encode(text) == tokenizer().encode(text)
    assert built.chat_template == tokenizer().chat_template
