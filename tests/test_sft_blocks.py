"""Blocks in gold answers: the same places, predictors and choices as in a rollout of the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fixtures import make_policy, make_sample, score
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.placing import answer_spans, place_insertions, place_recorded, recorded
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.train.sft import SFTTrainer
from reflectvlm.types import Instruction, Sample, SamplingParams, Text, Visual
from training import small_sft

SPECIAL = "<|box_start|>"
TEXT = f"seven {SPECIAL}again<|box_end|> and {SPECIAL}<|box_end|>so 7 <back>or</back> not"


def rows(text: str = TEXT) -> list[Sample]:
    return [
        dataclasses.replace(make_sample(i, sizes=sizes), columns={"trace": text})
        for i, sizes in enumerate((((64, 64),), ((64, 48), (32, 80)), ((48, 48),)))
    ]


def trainer(root: Path, policy: QwenVL, reattention: Reattention, data: Sequence[Sample]) -> SFTTrainer:
    return small_sft(root, policy=policy, data=data, reattention=reattention, evaluation=None, test=None)


REATTENTIONS = [
    Implicit(),
    VisualCopy(trigger=SPECIAL),
    VisualCopy(trigger=SPECIAL, limit=1),
    VisualCopy(trigger="<back>"),
    VisualCopy(trigger="<back>", place="before"),
    VisualRoute(trigger=SPECIAL, m=40),
    VisualRoute(trigger="<back>", m=40, place="before"),
]


@pytest.mark.parametrize("reattention", REATTENTIONS, ids=str)
def test_gold_answers_have_the_spans_of_a_rollout(tmp_path: Path, reattention: Reattention) -> None:
    """A model trained on blocks at other places than it will see them at when it answers."""
    policy = make_policy(dtype=torch.float64)
    made = trainer(tmp_path, policy, reattention, rows()).sequences(range(3))
    for prompt, spans in made:
        script = ScriptedEngine(policy=policy, texts=(TEXT,))
        ((rollout,),) = script.generate([prompt], 1, SamplingParams(), reattention, seed=0)
        bare = [dataclasses.replace(s, logprobs=()) if isinstance(s, Text) else s for s in rollout.spans]
        assert list(spans) == bare
        ours, theirs = score(policy, [(prompt, spans)]), score(policy, [(prompt, rollout.spans)])
        assert torch.equal(ours.logprobs, theirs.logprobs)
    blocks = [[span for span in spans if isinstance(span, Visual)] for _, spans in made]
    if reattention.trigger is None:
        assert not any(blocks)
    else:
        per_trigger = 1 if reattention.trigger == "<back>" or reattention.limit == 1 else 2  # type: ignore[attr-defined]
        if isinstance(reattention, VisualCopy):
            assert sorted(map(len, blocks)) == [per_trigger, per_trigger, 2 * per_trigger]


def test_nothing_inserted_is_trained(tmp_path: Path) -> None:
    """Blocks in the loss; a trigger learned from the block that it will only cause later."""
    policy = make_policy()
    plain = trainer(tmp_path, policy, Implicit(), rows()).sequences(range(3))
    blocks = trainer(tmp_path, policy, VisualCopy(trigger=SPECIAL), rows()).sequences(range(3))
    one, other = policy.batch(plain), policy.batch(blocks)
    assert one.num_tokens == other.num_tokens
    trigger = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    for b in range(3):
        assert torch.equal(one.ids[b][one.trained[b]], other.ids[b][other.trained[b]])
        for column in (other.ids[b] == trigger).nonzero().flatten().tolist():
            predictor = int(other.predictor[b, column])
            assert other.visual[b, predictor] == -1
            assert (other.visual[b, predictor + 1 : column] >= 0).any(), "no block in between"
            assert int(other.ids[b, predictor]) != policy.vision.end


@pytest.mark.parametrize(
    "reattention", [VisualRoute(trigger=SPECIAL, m=30), VisualRoute(trigger="<back>")], ids=str
)
def test_recorded_choices_are_taken_as_they_are(tmp_path: Path, reattention: VisualRoute) -> None:
    """Choices frozen on disk that are chosen anew after all, or in another order."""
    policy = make_policy()
    chosen = trainer(tmp_path, policy, reattention, rows()).sequences(range(3))
    records = {p.sample.id: recorded(policy, spans, reattention.trigger) for p, spans in chosen}
    written = [dataclasses.replace(row, columns={**row.columns, "keep": records[row.id]}) for row in rows()]
    other = make_policy(seed=1)  # would choose otherwise
    again = trainer(tmp_path, other, reattention, written)
    assert [s for _, s in again.sequences(range(3))] != [s for _, s in chosen]
    frozen = dataclasses.replace(again, choices="keep")
    assert [s for _, s in frozen.sequences(range(3))] == [s for _, s in chosen]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (None, r"has None for recorded insertions\. Per insertion a list of blocks"),
        ([[[0]]], r"has \[\[\[0\]\]\] for recorded insertions"),
        ([[[0, None]]] * 3, r"has 3 recorded insertions, but '.*' stands 2 times"),
        ([[[0, None]]], r"has 1 recorded insertions, but '.*' stands 2 times"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, keep: object, message: str) -> None:
    data = [dataclasses.replace(row, columns={**row.columns, "keep": keep}) for row in rows()]
    reattention = VisualCopy(trigger=SPECIAL)
    made = dataclasses.replace(trainer(tmp_path, make_policy(), reattention, data), choices="keep")
    with pytest.raises(ValueError, match=rf"Row 'sample-\d' {message}"):
        made.sequences(range(1))


def test_a_row_too_long_with_its_blocks_is_refused(tmp_path: Path) -> None:
    """Counted without the blocks it fits, and the step runs out of memory far from the reason."""
    policy = make_policy()
    plain = trainer(tmp_path, policy, Implicit(), rows())
    length = max(int(policy.batch([one]).attention.sum()) for one in plain.sequences(range(3)))
    assert dataclasses.replace(plain, max_tokens=length).sequences(range(3))
    blocks = dataclasses.replace(plain, reattention=VisualCopy(trigger=SPECIAL), max_tokens=length)
    with pytest.raises(ValueError, match=r"Row 'sample-\d' has \d+ tokens, more than max_tokens="):
        blocks.sequences(range(3))


def test_forcing_text_into_a_gold_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reattention.close is '</R>': it forces text while generating"):
        small_sft(tmp_path, reattention=VisualCopy(close="</R>"))


@pytest.mark.parametrize("reattention", [VisualCopy(trigger=SPECIAL), VisualRoute(trigger=SPECIAL)], ids=str)
def test_a_step_with_blocks_learns(tmp_path: Path, reattention: Reattention) -> None:
    """Features that get no gradient, or a loss over the wrong tokens, would not fall."""
    policy = make_policy(gain=1.0)
    made = trainer(tmp_path, policy, reattention, rows())
    losses = [made.step(step).metrics["loss"] for step in range(5)]
    assert losses[-1] < losses[0] - 0.1


def test_a_record_says_which_trigger_was_shown() -> None:
    """A budget that forbids the first block and allows the second: replayed at the first, silently."""
    policy = make_policy()
    route = VisualRoute(trigger=SPECIAL, m=40)
    prompt = policy.prompt(rows()[0], Instruction())
    ids = policy.answer(TEXT)[0].ids
    (both,) = place_insertions(policy, [(prompt, ids)], route)
    spans = answer_spans(ids, (), both[1:])
    record = recorded(policy, spans, SPECIAL)
    assert [len(blocks) for blocks in record] == [0, 1]
    assert answer_spans(ids, (), place_recorded(policy, prompt, ids, route, record)) == spans
    behind = VisualCopy(trigger="<back>")
    (one,) = place_insertions(policy, [(prompt, ids)], behind)
    assert recorded(policy, answer_spans(ids, (), one), "<back>") == [[[0, None]]]
    assert recorded(policy, answer_spans(ids, (), ()), "<back>") == [[]]
    assert recorded(policy, answer_spans(ids, (), ()), None) == []


@pytest.mark.parametrize("place", ["before", "after"])
def test_recorded_tags_may_share_a_token(place: str) -> None:
    """Bug: of `<back><back>`, where `><` is one token, the first tag has a block and the record counts both;
    placing it counted one and refused the row."""
    policy = make_policy()
    copied = VisualCopy(trigger="<back>", place=place)  # type: ignore[arg-type]
    prompt = policy.prompt(rows()[0], Instruction())
    ids = policy.answer("one<back><back>two")[0].ids
    (placed,) = place_insertions(policy, [(prompt, ids)], copied)
    spans = answer_spans(ids, (), placed)
    record = recorded(policy, spans, "<back>")
    assert record == [[[0, None]], []]
    assert answer_spans(ids, (), place_recorded(policy, prompt, ids, copied, record)) == spans
    (second,) = place_recorded(policy, prompt, ids, copied, [[], [[0, None]]])
    assert second.start == placed[0].stop - 1
    with pytest.raises(ValueError, match=r"at two '<back>' that share a token\. Record them again"):
        place_recorded(policy, prompt, ids, copied, [[[0, None]], [[0, None]]])


@pytest.mark.parametrize("micro_tokens", [1, 150])
def test_choices_do_not_depend_on_how_rows_are_split(tmp_path: Path, micro_tokens: int) -> None:
    """micro_tokens bounds the memory of ROUTE's pass as well, and changes no result."""
    made = trainer(tmp_path, make_policy(dtype=torch.float64), VisualRoute(trigger=SPECIAL, m=40), rows())
    whole = [spans for _, spans in made.sequences(range(3))]
    assert [s for _, s in dataclasses.replace(made, micro_tokens=micro_tokens).sequences(range(3))] == whole
