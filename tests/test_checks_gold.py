"""Checks at the start: gold answers and the rewards that read them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checking import BACK, Rows, answering, found, small_distiller, sound_rl, states
from reflectvlm.data.rows import BadRow
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.back import BackReward, look_back_rubric
from reflectvlm.rewards.layout import TagFormat
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.reflection import brpo_rubric
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.tags import Block, Layout, grpo, look_back, parse
from reflectvlm.train.checks_gold import _hopeless, _Marks
from reflectvlm.train.checks_parts import Part, answer_text
from reflectvlm.train.checks_subject import Subject
from reflectvlm.types import Rollout, Sample
from training import small_rl, small_sft

# -- gold answers ---------------------------------------------------------------------------------


def test_a_reward_that_reads_elsewhere_is_told(tmp_path: Path) -> None:
    """Bug: the layout has the answer in a box, accuracy looks for it in a block. That is told and no more:
    of the texts that a layout allows one of ours is tried."""
    judged = Rubric(
        rewards={"accuracy": Accuracy(answer_from="CONCLUSION"), "format": TagFormat(layout=grpo())},
        weights={"accuracy": 1.0, "format": 1.0},
    )
    result = found(sound_rl(tmp_path, rubric=judged))["gold answers"]
    assert result.status == "warning"
    assert "reward 'format' gives 0, not 1, on 8 of 8 gold answers" in result.found


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("{1, 2", "reward 'accuracy' gives 0, not 1, on 8 of 8 gold answers, first row 'digits-train-4'"),
        (" ", "reward 'accuracy' fails on 8 of 8 gold answers, first on row 'digits-train-4': ValueError"),
    ],
)
def test_gold_answers_that_their_grader_cannot_read_fail(answer: str, says: str, tmp_path: Path) -> None:
    """Bug: a brace that is never closed ends no box: RL with reward 0 whatever is answered."""
    trainer = sound_rl(tmp_path, data=answering(answer))
    result = found(trainer)["gold answers"]
    assert result.status == "failed"
    assert says in result.found
    assert (
        trainer.rubric.state() == look_back_rubric(look_back()).state()
    )  # no failure of the run's is counted


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ("three", "number", "is no number, which Accuracy.kind says it is"),
        ("We add them up.\n#### 7", "auto", "has 22 characters: only the same words are right"),
    ],
)
def test_gold_answers_that_must_be_repeated_word_for_word_are_told(
    answer: str, kind: Any, says: str, tmp_path: Path
) -> None:
    """Bug: whole solutions in the answer's column: nobody ever writes the same."""
    judged = look_back_rubric(look_back(), accuracy=Accuracy(kind=kind))
    result = found(sound_rl(tmp_path, rubric=judged, data=answering(answer)))["gold answers"]
    assert result.status == "warning"
    assert says in result.found


def test_gold_answers_written_out_are_scored_as_they_are(tmp_path: Path) -> None:
    """Bug: a cold start on traces that its own evaluation gives no point, without a word; or one that is
    stopped for it, though training does not use the rubric."""

    def spoilt(number: int, sample: Sample) -> Sample:
        if number not in wrong:
            return sample
        return dataclasses.replace(sample, columns={**sample.columns, "trace": "It is \\boxed{none}"})

    wrong: Sequence[int] = range(12)
    result = found(small_sft(tmp_path, rubric=BACK, data=Rows(spoilt)))["gold answers"]
    assert result.status == "warning"
    assert "reward 'accuracy' gives 0, not 1, on 8 of 8 gold answers" in result.found
    wrong = range(6)
    assert found(small_sft(tmp_path, rubric=BACK, data=Rows(spoilt)))["gold answers"].status == "warning"
    repaired = small_distiller(tmp_path, data=Rows(spoilt), wrong="repair")
    assert found(repaired)["gold answers"].status == "warning"
    assert states(small_distiller(tmp_path, data=Rows(spoilt)))["gold answers"] == "ok"
    unused = small_sft(tmp_path, rubric=BACK, data=Rows(spoilt), evaluation=None, test=None)
    assert found(unused)["gold answers"].status == "not applicable"


def test_rewards_of_ones_own_are_not_judged_but_must_not_fail(tmp_path: Path) -> None:
    """Bug: a guess at what an unknown reward should give stops a sound run; or a reward that raises on every
    answer is found out after hours of rollouts."""

    def broken(rollout: Rollout) -> float:
        return float(rollout.prompt.sample.columns["level"])

    assert states(small_rl(tmp_path))["gold answers"] == "not applicable"
    both = Rubric(
        rewards={"own": per_rollout(lambda _: 0.3), "accuracy": Accuracy()},
        weights={"own": 1.0, "accuracy": 1.0},
    )
    result = found(sound_rl(tmp_path, rubric=both))["gold answers"]
    assert result.status == "ok"
    assert "what earns full marks from own is not known" in result.found
    for weight, status in ((1.0, "warning"), (0.0, "ok")):
        failing = Rubric(
            rewards={"own": per_rollout(broken), "accuracy": Accuracy()},
            weights={"own": weight, "accuracy": 1.0},
        )
        result = found(sound_rl(tmp_path, rubric=failing))["gold answers"]
        assert result.status == status
    assert states(sound_rl(tmp_path, rubric=lambda group: group))["gold answers"] == "not applicable"


def test_a_reward_that_compares_its_group_is_asked_about_one(tmp_path: Path) -> None:
    """Bug: a reward that normalises over its group is asked about one answer alone, fails, and the run is
    stopped. It gets a group as large as the run's, but of at most 8."""
    sizes: list[int] = []

    def own(group: Sequence[Rollout]) -> list[float]:
        sizes.append(len(group))
        spread = statistics.stdev(len(rollout.text) for rollout in group)
        return [1 / (1 + spread) for _ in group]

    judged = Rubric(rewards={"own": own, "accuracy": Accuracy()}, weights={"own": 1.0, "accuracy": 1.0})
    for make, name in ((sound_rl, "group_size"), (small_distiller, "samples_per_row")):
        for size in (3, 20):
            given = {"rubric": judged, name: size} | (
                {"accept": {"accuracy": 1.0}} if make is small_distiller else {}
            )
            assert states(make(tmp_path, **given))["gold answers"] == "ok"
    assert sizes == [3, 3, 8, 8] * 2
    result = found(small_sft(tmp_path, rubric=judged))["gold answers"]  # its evaluations have groups of one
    assert result.status == "warning"
    assert "StatisticsError" in result.found


def test_a_class_made_from_one_of_ours_is_the_users(tmp_path: Path) -> None:
    """Bug: a subclass that gives half a point is held to full marks."""

    class Half(Accuracy):
        def __call__(self, group: Sequence[Rollout], /) -> list[float]:
            return [0.5 for _ in group]

        def many(self, groups: Sequence[Sequence[Rollout]], /) -> list[Any]:
            return [self(group) for group in groups]

    judged = Rubric(rewards={"half": Half()}, weights={"half": 1.0})
    assert states(sound_rl(tmp_path, rubric=judged))["gold answers"] == "not applicable"


def test_sft_on_plain_gold_answers_goes_on(tmp_path: Path) -> None:
    """Bug: answers without a box are refused though training does not use the rubric; or rows of SFT that
    state no answer apart from the one written out are."""
    judged = Rubric(rewards={"accuracy": Accuracy()}, weights={"accuracy": 1.0})

    def plain(_: int, sample: Sample) -> Sample:
        return dataclasses.replace(
            sample, columns={**sample.columns, "trace": f"The answer is {sample.answer}."}
        )

    result = found(small_sft(tmp_path, rubric=judged, data=Rows(plain)))["gold answers"]
    assert result.status == "warning"
    assert "reward 'accuracy' gives 0, not 1, on 8 of 8 gold answers" in result.found
    assert states(small_sft(tmp_path, rubric=judged, data=answering("")))["gold answers"] == "not applicable"


@pytest.mark.parametrize("odd", ["", "}"])
def test_one_odd_row_is_told(odd: str, tmp_path: Path) -> None:
    """Bug: one row of eight without an answer, or with one that its grader cannot read, stops the run. Seven
    such rows do not prove either that no answer can be right; eight do."""

    def change(number: int, sample: Sample) -> Sample:
        return dataclasses.replace(sample, answer=odd) if number in rows else sample

    rows: Sequence[int] = (4,)  # the first that is read
    result = found(sound_rl(tmp_path, data=Rows(change)))["gold answers"]
    assert result.status == "warning"
    assert "on 1 of 8 gold answers" in result.found
    assert "digits-train-4" in result.found
    rows = [number for number in range(12) if number != 4]
    assert states(sound_rl(tmp_path, data=Rows(change)))["gold answers"] == "warning"
    rows = range(12)
    assert states(sound_rl(tmp_path, data=Rows(change)))["gold answers"] == "failed"


def test_a_few_rows_of_many_prove_nothing(tmp_path: Path) -> None:
    """Bug: data of which most is left out is judged by the one row that is not; or a run is stopped because
    graders were killed on a busy machine."""

    def change(number: int, sample: Sample) -> Sample:
        if number != 4:
            raise BadRow(f"rows.jsonl:{number}", "images", "image missing", "Put it back.")
        return dataclasses.replace(sample, answer="{1, 2")

    result = found(sound_rl(tmp_path, data=Rows(change)))["gold answers"]
    assert result.status == "warning"
    assert "on 1 of 1 gold answers" in result.found
    subject, part = Subject.of(sound_rl(tmp_path)), Part(name="a", weight=1.0, reward=Accuracy())
    for killed, hopeless in ((8, False), (5, False), (4, True)):
        marks = _Marks(part, (), [math.nan] * killed + [0.0] * (8 - killed), {}, killed, 1)
        assert _hopeless(subject, marks) == hopeless


def test_a_box_in_a_layout_without_any_required_block(tmp_path: Path) -> None:
    """Bug: the text of ours stands beside the blocks, where nothing may stand, and the reward is blamed."""
    layout = Layout(name="free", blocks=(Block("think", min=0),))
    assert answer_text("7", layout, ("boxed",)) == "<think>\\boxed{7}</think>"
    assert states(sound_rl(tmp_path, rubric=look_back_rubric(layout)))["gold answers"] == "ok"


def test_every_rubric_of_the_library_is_known(tmp_path: Path) -> None:
    """Bug: a rubric whose gold answers nobody checks."""
    one = Rubric(rewards={"r": BackReward(layout=look_back())}, weights={"r": 1.0})
    for judged in (one, brpo_rubric(), look_back_rubric(grpo()), brpo_rubric(balance_weight=0.0)):
        assert found(sound_rl(tmp_path, rubric=judged))["gold answers"].status == "ok"


TAGS = st.sampled_from(["a", "think", "END"])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    def block(tag: str) -> Block:
        least = draw(st.integers(0, 2))
        return Block(tag, min=least, max=draw(st.sampled_from([None, max(least, 1)])), allow_empty=tag == "a")

    fixed = draw(st.lists(TAGS, min_size=1, max_size=3, unique=True))
    floating = draw(st.lists(st.sampled_from(["see", "look"]), max_size=2, unique=True))
    where = draw(st.sampled_from(["box", "tag", "none"]))
    blocks = tuple(map(block, fixed))
    if where == "tag":
        blocks = (*blocks, Block("answer"))
    return Layout(
        name="any",
        blocks=blocks,
        floating=tuple(map(block, floating)),
        boxed=where == "box",
        answer_tag="answer" if where == "tag" else None,
        free_text=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=150)
@given(layout=layouts(), boxed=st.booleans())
def test_the_text_made_for_a_layout_is_valid_in_it(layout: Layout, boxed: bool) -> None:
    """Bug: a text of ours that is not in the layout blames a sound run."""
    where = ("boxed",) if boxed and not layout.answer_tag else (layout.answer_tag,) * bool(layout.answer_tag)
    text = answer_text("7", layout, where)
    parsed = parse(layout, text)
    assert parsed.valid, (text, parsed.problem)
    if where:
        accuracy = Accuracy(answer_from=where[0])
        assert accuracy.is_right(text, "7")
