"""Tags as special tokens: their rows, their ids, and where they survive."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.models.loading import load_tokenizer
from reflectvlm.models.new_tags import add_tags
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import tiny_model
from reflectvlm.tags import layout_tags, look_back, qwen_la
from reflectvlm.types import Instruction, Sample, Text

TAGS = ("<REFLECTION>", "</REFLECTION>")
FIRST, ROWS = 2318, 2432  # ids of the tiny tokenizer, rows of the tiny embedding


def parts(untied: bool = False) -> tuple[Any, Any]:
    """A fresh model and tokenizer: `add_tags` changes both."""
    tokenizer = load_tokenizer("tiny")
    model = tiny_model(tokenizer)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(ROWS, 128))
    return model, tokenizer


def test_tags_of_a_layout() -> None:
    """A closing tag forgotten, or a tag that stands twice in a layout given twice."""
    assert layout_tags(look_back()) == ("<think>", "</think>", "<back>", "</back>")
    assert layout_tags(qwen_la())[-2:] == TAGS
    assert len(layout_tags(qwen_la())) == 10


@pytest.mark.parametrize("untied", [False, True])
def test_new_rows_are_the_mean_of_the_pieces(untied: bool) -> None:
    """A row left as the random spare one, in the head above all, where it decides what is sampled."""
    model, tokenizer = parts(untied)
    pieces = [tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS]
    assert all(len(ids) > 2 for ids in pieces)
    before = copy.deepcopy(model.state_dict())
    assert add_tags(model, tokenizer, TAGS) == (FIRST, FIRST + 1)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        old, new = before[name], model.state_dict()[name]
        assert new.shape == (ROWS, 128)
        for i, ids in enumerate(pieces):
            torch.testing.assert_close(new[FIRST + i], old[ids].mean(0))
        assert torch.equal(new[:FIRST], old[:FIRST])
        assert torch.equal(new[FIRST + 2 :], old[FIRST + 2 :])
        assert not torch.equal(new[FIRST], new[FIRST + 1])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) != untied


def test_no_tag_is_likely_before_it_is_trained() -> None:
    """Rows that win the softmax here and there: an untrained tag in every tenth answer. The means give
    6e-6 per token for all ten tags together, the spare rows as they came 4e-4."""
    policy = load_policy("tiny", new_tags=layout_tags(qwen_la()))
    rows = DigitTraces(data=Digits(size=4))
    batch = policy.batch(
        [(policy.prompt(row, Instruction()), policy.answer(row.columns["trace"])) for row in rows]
    )
    with torch.no_grad():
        embedded = policy.embed(batch.ids, batch.visual, policy.features(batch.images))
        hidden = policy.hidden(embedded, batch.positions, batch.attention.long())
        probabilities = policy.logits(hidden[batch.trained]).softmax(-1)
    assert probabilities[:, FIRST : FIRST + 10].sum(-1).mean() < 5e-5


def test_tags_are_sampled_spelled_and_trained_as_one_token() -> None:
    """A tag among the reserved ids can never be sampled; one that decodes to nothing is unseen by
    rewards; one in pieces is no trigger."""
    policy = load_policy("tiny", new_tags=TAGS)
    assert not {FIRST, FIRST + 1} & {*policy.reserved_ids}
    assert FIRST + 2 in policy.reserved_ids
    assert len(policy.reserved_ids) == 5 + ROWS - FIRST - 2
    (answer,) = policy.answer("So 7<REFLECTION>look</REFLECTION>")
    assert [i for i in answer.ids if i >= FIRST] == [FIRST, FIRST + 1]
    assert policy.decode(answer.ids) == "So 7<REFLECTION>look</REFLECTION><|im_end|>"
    assert policy.tokenizer.decode([FIRST, 20], skip_special_tokens=True) == policy.decode([20])


def test_a_question_that_spells_a_tag_stays_text() -> None:
    """A user who writes <REFLECTION> must not be able to trigger anything."""
    policy = load_policy("tiny", new_tags=TAGS)
    question = "What does <REFLECTION> mean?"
    prompt = policy.prompt(
        Sample(id="a", question=question, answer=""), Instruction(text="No </REFLECTION>.")
    )
    ids = [i for span in prompt.spans if isinstance(span, Text) for i in span.ids]
    assert not {FIRST, FIRST + 1} & {*ids}
    assert question in policy.decode(ids)


def same_tags(policy: QwenVL) -> None:
    ids = policy.tokenizer.convert_tokens_to_ids(list(TAGS))
    assert ids == [FIRST, FIRST + 1]
    assert not {*ids} & {*policy.reserved_ids}
    assert FIRST in policy.answer("<REFLECTION>")[0].ids


def test_tags_survive_saving(tmp_path: Path) -> None:
    """Stock classes and ours find the same ids and rows; asking for the tags again moves no row, which
    may have been trained; others come behind them."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    policy = load_policy("tiny", new_tags=TAGS)
    with torch.no_grad():
        policy.model.lm_head.weight[FIRST] = 0.25
    rows = policy.model.lm_head.weight[: FIRST + 2].clone()
    policy.save(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("a<REFLECTION>", add_special_tokens=False)[1:] == [FIRST]
    assert tokenizer.decode([FIRST, FIRST + 1]) == "".join(TAGS)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(stock.lm_head.weight[: FIRST + 2], rows)

    same_tags(load_policy(str(tmp_path)))
    again = load_policy(str(tmp_path), new_tags=("<CAPTION>", *TAGS))
    same_tags(again)
    assert again.tokenizer.convert_tokens_to_ids("<CAPTION>") == FIRST + 2
    assert torch.equal(again.model.lm_head.weight[: FIRST + 2], rows)


def test_a_tag_given_twice_is_one() -> None:
    """Two rows for one token would shift all later ids."""
    model, tokenizer = parts()
    assert add_tags(model, tokenizer, ("<A>", "</A>", "<A>")) == (FIRST, FIRST + 1, FIRST)
    assert add_tags(model, tokenizer, ()) == ()
    assert len(tokenizer) == FIRST + 2


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("<A>", r"new_tags is '<A>'\. It is a list of tags: \['<A>'\]"),
        (("<A>", ""), "New tag '' is empty or has white space"),
        (("<A>", "<look again>"), "New tag '<look again>' is empty or has white space"),
        (("<A>", "back"), "New tag 'back' is an ordinary token .* e.g. '<BACK>'"),
        # A byte letter of the vocabulary, and one token of three bytes whose letters differ from it.
        (("<A>", "é"), "New tag 'é' is an ordinary token"),
        (("<A>", "—"), "New tag '—' is an ordinary token"),
        (tuple(f"<T{i}>" for i in range(115)), "115 new tags need .* 2432 rows 114 are spare"),
    ],
)
def test_tags_that_are_refused(tags: Any, message: str) -> None:
    """And then nothing has changed, not even for the tags before the wrong one."""
    model, tokenizer = parts()
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=message):
        add_tags(model, tokenizer, tags)
    assert len(tokenizer) == FIRST
    assert torch.equal(model.lm_head.weight, before)


def test_an_added_token_that_is_not_special_is_refused() -> None:
    """Made special, it would be cut out of every question that spells it; left, it is no tag."""
    model, tokenizer = parts()
    tokenizer.add_tokens(["<A>"])
    with pytest.raises(ValueError, match="New tag '<A>' is an ordinary token"):
        add_tags(model, tokenizer, ("<A>",))


def test_all_spare_rows_can_be_used() -> None:
    """Off by one at the end of the matrix."""
    model, tokenizer = parts()
    ids = add_tags(model, tokenizer, tuple(f"<T{i}>" for i in range(114)))
    assert ids[-1] == ROWS - 1
