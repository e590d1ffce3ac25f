"""Rows on their way into training: which are used, which are not, and that it is said, counted and kept."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fixtures import ShowAgain, make_policy, make_sample
from reflectvlm.building import draft_of
from reflectvlm.config import compose
from reflectvlm.data.digits import Digits
from reflectvlm.data.rows import BadRow, Columns
from reflectvlm.data.sources import dataset
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import random_tiny
from reflectvlm.train.cursor import place_at
from reflectvlm.train.distill import Distiller
from reflectvlm.train.feed import Feed
from reflectvlm.train.row_rules import RowRules
from reflectvlm.types import Instruction, Sample, Visual
from training import rubric, small_rl, small_sft

LIMIT = 120
"""Tokens; a plain prompt below has 79 at most, one with LONG has far more."""
LONG = "why " * 200
SKIP = RowRules()
TOLD = RowRules(on_bad="error", on_long="error")


class Rows(Sequence[Sample]):
    """`size` rows, some of which cannot be read and some of which are too long."""

    def __init__(self, size: int, bad: Sequence[int] = (), long: Sequence[int] = ()) -> None:
        self.size, self.bad, self.long = size, bad, long

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if index >= self.size:
            raise IndexError(index)
        if index in self.bad:
            raise BadRow(f"rows.jsonl:{index + 1}", "images", "missing image", "Copy it.")
        sample = make_sample(0, LONG if index in self.long else "Which?")
        return dataclasses.replace(sample, id=f"row-{index}", columns={"trace": f"It is {index}."})


def feed(policy: QwenVL, data: Sequence[Sample], rules: RowRules = SKIP, **changes: Any) -> Feed:
    settings: dict[str, Any] = {
        "data": data,
        "policy": policy,
        "seed": 0,
        "rules": rules,
        "limit": LIMIT,
        "limit_name": "max_prompt_tokens",
        "instruction": lambda _: Instruction(),
    }
    return Feed(**settings | changes)


def ids(items: Sequence[Any]) -> list[str]:
    return [prompt.sample.id for prompt, _ in items]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bad=st.sets(st.integers(0, 6), max_size=3),
    long=st.sets(st.integers(0, 6), max_size=2),
    portions=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_rows_depend_on_the_position_alone(
    tiny_policy: QwenVL, bad: set[int], long: set[int], portions: list[int]
) -> None:
    """Bug: what a step takes depends on how steps were cut before, so a resumed run takes other rows."""
    data = Rows(7, sorted(bad), sorted(long))
    whole, end = feed(tiny_policy, data).take(sum(portions), 0)
    one, taken, position = feed(tiny_policy, data), [], 0
    for count in portions:
        fresh = feed(tiny_policy, data)  # a resumed process: the position and the counts, nothing else
        fresh.load_state(json.loads(json.dumps(one.state())))
        items, position = fresh.take(count, position)
        taken += items
        one = fresh
    assert (ids(taken), position) == (ids(whole), end)
    order = [place_at(7, place, 0) for place in range(end)]
    assert ids(whole) == [f"row-{i}" for i in order if i not in bad | long]
    counts = one.counts
    assert counts.tried == end
    assert counts.unreadable == sum(i in bad for i in order)
    assert counts.too_long == sum(i in long - bad for i in order)


def test_a_row_that_cannot_be_used_is_an_error_where_that_is_asked(tiny_policy: QwenVL) -> None:
    """Bug: one trainer skips what another refuses, and no setting says which."""
    with pytest.raises(BadRow, match=r"^rows.jsonl:1: missing image"):
        feed(tiny_policy, Rows(1, bad=[0]), TOLD).take(1, 0)
    with pytest.raises(
        ValueError, match=r"Row 'row-0' has \d+ tokens, more than max_prompt_tokens=120 \(16 "
    ):
        feed(tiny_policy, Rows(1, long=[0]), TOLD).take(1, 0)
    # Each rule has its own kind of row.
    mixed = Rows(3, bad=[0], long=[1])
    with pytest.raises(BadRow):
        feed(tiny_policy, mixed, RowRules(on_bad="error", on_long="skip")).take(3, 0)
    with pytest.raises(ValueError, match="row-1"):
        feed(tiny_policy, mixed, RowRules(on_bad="skip", on_long="error")).take(3, 0)
    assert ids(feed(tiny_policy, mixed).take(2, 0)[0]) == ["row-2", "row-2"]


def test_each_row_is_named_once_with_its_reason(tiny_policy: QwenVL, caplog: Any) -> None:
    """Bug: a warning per epoch buries the log, or a row vanishes without a word."""
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        one = feed(tiny_policy, Rows(4, bad=[1], long=[2]))
        one.take(8, 0)
    gone, long = sorted(caplog.messages)
    assert gone == "row left out: rows.jsonl:2: missing image in column 'images'. Copy it."
    assert re.fullmatch(
        r"row row-2 left out: its prompt has \d+ tokens \(16 of them of images\), max_prompt_tokens is 120",
        long,
    )
    assert one.counts.left_out == 8  # four epochs, two of each
    assert str(one.counts) == "16 rows tried, 8 left out (4 unreadable, 4 too long), 0 shortened"


def test_shortening_cuts_the_question_and_nothing_else(tiny_policy: QwenVL, caplog: Any) -> None:
    """Bug: a prompt is cut inside its image, or loses the instruction that stands behind the question."""
    says = Instruction(text="Put the answer in a box.")
    rules = RowRules(on_long="truncate_text")
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        one = feed(tiny_policy, Rows(1, long=[0]), rules, instruction=lambda _: says)
        ((prompt, _),), _ = one.take(1, 0)
    length = tiny_policy.prompt_length(prompt)
    assert LIMIT - 2 <= length <= LIMIT  # as much as fits: a token or two for the last word
    kept = prompt.sample.question
    assert LONG.startswith(kept)
    assert len(kept) > 50
    longer = dataclasses.replace(prompt.sample, question=LONG[: len(kept) + 8])
    assert tiny_policy.prompt_length(tiny_policy.prompt(longer, says)) > LIMIT
    # It is the prompt of a row that had been so short from the start.
    again = tiny_policy.prompt(prompt.sample, says)
    assert prompt.spans == again.spans
    assert [span for span in prompt.spans if isinstance(span, Visual)] == [Visual(image=0)]
    assert prompt.sample.id == "row-0"
    assert f"row row-0 shortened: its question keeps {len(kept)} of 800 characters" in caplog.text
    assert (one.counts.shortened, one.counts.left_out) == (1, 0)


def test_an_image_alone_over_the_limit_is_never_cut(tiny_policy: QwenVL) -> None:
    """Bug: text is cut to nothing for an image that cannot fit, and rows train without questions."""
    picture = [make_sample(0, LONG, ((256, 256),))]  # 256 visual tokens
    rules = RowRules(on_bad="error", on_long="truncate_text")
    with pytest.raises(
        ValueError, match=r"more than max_prompt_tokens=120 \(256 of them .* however its text"
    ):
        feed(tiny_policy, picture, rules).take(1, 0)
    data = [*picture, *Digits(size=2)]
    skipping = feed(tiny_policy, data, RowRules(on_long="truncate_text"))
    assert "sample-0" not in ids(skipping.take(4, 0)[0])
    assert skipping.counts.too_long == 1


def test_too_many_bad_rows_end_the_run(tiny_policy: QwenVL) -> None:
    """Bug: a disk that is no longer mounted costs a third of the rows for days.

    Of 100 rows with max_bad=0.05, 5 are allowed and 3 * sqrt(100 * 0.05 * 0.95) = 6.54 are chance."""
    rules = RowRules(max_bad=0.05)
    assert not rules.too_many(11, 100)
    assert rules.too_many(12, 100)
    assert not rules.too_many(99, 99)  # too few to judge
    assert not rules.too_many(52, 1000)
    assert rules.too_many(71, 1000)  # 50 + 3 * sqrt(47.5) = 70.7
    assert not RowRules(max_bad=1.0).too_many(10**6, 10**6)
    assert RowRules(max_bad=0.0).too_many(1, 100)
    third = Rows(3, bad=[0])
    with pytest.raises(
        ValueError,
        match=r"Too many rows cannot be used: 1\d\d rows tried, .* left out \(.* unreadable, 0 too long\).*"
        r"row_rules.max_bad=0.05. The last: rows.jsonl:1: .*Repair the data",
    ):
        feed(tiny_policy, third, rules).take(300, 0)
    assert len(feed(tiny_policy, third, RowRules(max_bad=0.4)).take(300, 0)[0]) == 300


def test_the_judgement_survives_a_resume(tiny_policy: QwenVL) -> None:
    """Bug: after each restart the run forgives a hundred rows anew, and never stops."""

    def end_of(portion: int) -> int:
        one, position = feed(tiny_policy, Rows(3, bad=[0]), RowRules(max_bad=0.05)), 0
        while True:
            fresh = feed(tiny_policy, one.data, one.rules)
            fresh.load_state(one.state())
            try:
                _, position = fresh.take(portion, position)
            except ValueError:
                return position
            one = fresh

    assert 100 <= end_of(1) < 103  # a third of 100 rows is far above 12
    assert 94 <= end_of(4) < 103  # the end of the last portion before


def test_no_usable_row_is_told_and_some_are_not(tiny_policy: QwenVL) -> None:
    """Bug: a data set without a usable row is gone through for ever; or one bad row of four, met five
    times while a step takes sixteen rows, ends the run as if there were no others."""
    with pytest.raises(
        ValueError, match=r"4 rows in a row could not be used.*max_prompt_tokens=120, raise it"
    ):
        feed(tiny_policy, Rows(3, bad=[0], long=[1, 2])).take(1, 0)
    assert len(feed(tiny_policy, Rows(4, bad=[2])).take(16, 0)[0]) == 16


def test_a_row_the_policy_cannot_show_is_a_bad_row(tiny_policy: QwenVL) -> None:
    """Bug: rows that never went through `dataset` fail in the image processor or the tokenizer, with a
    message that names no row."""
    strip = make_sample(1, "Which?", ((1, 300),))  # the processor refuses an aspect above 200
    with pytest.raises(BadRow, match=r"^sample-1: It cannot be shown to the policy: .*aspect ratio"):
        feed(tiny_policy, [strip], TOLD).take(1, 0)
    half = dataclasses.replace(make_sample(2), question="half a \ud83d pair")
    with pytest.raises(BadRow, match=r"^sample-2: It cannot be shown"):
        feed(tiny_policy, [half], TOLD).take(1, 0)
    data = [strip, half, make_sample(3)]
    assert ids(feed(tiny_policy, data).take(2, 0)[0]) == ["sample-3"] * 2


def test_a_row_that_a_user_s_code_cannot_read_is_a_bad_row(tiny_policy: QwenVL, caplog: Any) -> None:
    """Bug: a file that has gone from a user's own data ends the run in spite of on_bad=skip, with a message
    that names no row."""

    class Gone(Rows):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise FileNotFoundError(2, "No such file or directory", "b.png\n")
            return super().__getitem__(index)

    told = r"^row 1 of the data: It cannot be read: FileNotFoundError: .*No such file.*b.png.*\. Repair"
    with pytest.raises(BadRow, match=told) as caught:
        feed(tiny_policy, Gone(3), TOLD).take(3, 0)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    one = feed(tiny_policy, Gone(6, bad=[2]))
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        assert sorted(ids(one.take(8, 0)[0])) == sorted(["row-0", "row-3", "row-4", "row-5"] * 2)
    assert 2 <= one.counts.unreadable <= 4  # of two epochs
    assert len(caplog.messages) == 2
    assert any("rows.jsonl:3: missing image" in line for line in caplog.messages)  # BadRow as it is


def test_a_cut_image_in_memory_is_a_bad_row(tiny_policy: QwenVL) -> None:
    """Bug: an image that was opened and not yet decoded ends the run with OSError, and no row is named."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(file, format="JPEG")
    half = io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2])
    data = [dataclasses.replace(make_sample(1), images=(Image.open(half),)), make_sample(2)]
    with pytest.raises(
        BadRow, match=r"^sample-1: It cannot be shown to the policy: OSError: image file is tr"
    ):
        feed(tiny_policy, data, TOLD).take(2, 0)
    assert ids(feed(tiny_policy, data).take(2, 0)[0]) == ["sample-2"] * 2


def test_a_file_that_changed_is_no_bad_row(tiny_policy: QwenVL, tmp_path: Path) -> None:
    """Bug: rows of a file that was written anew are left out one by one, as if each of them were broken."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 2)
    data = dataset(path, columns=Columns(images=None))
    path.write_text('{"question": "a", "answer": "b"}\n' * 3)
    with pytest.raises(ValueError, match="has changed since it was opened"):
        feed(tiny_policy, data).take(1, 0)


def test_a_portion_given_up_counts_nothing(tiny_policy: QwenVL) -> None:
    """Bug: rows of a step that a signal cut off are counted twice after the resume."""
    one = feed(tiny_policy, Rows(3, bad=[0]))
    one.take(2, 0)
    before = one.counts
    asked = iter([False, False, False, True])
    with pytest.raises(Abandoned), abandonable(lambda: next(asked)):
        one.take(9, before.tried)
    assert one.counts == before


def test_first_rows_for_a_look(tiny_policy: QwenVL, caplog: Any) -> None:
    """Bug: the check at the start fails on a row that the run would pass over, or counts it."""
    one = feed(tiny_policy, Rows(5, bad=[0], long=[1]))
    order = [place_at(5, place, 0) for place in range(5)]
    assert [prompt.sample.id for prompt in one.first(2)] == [f"row-{i}" for i in order if i > 1][:2]
    assert (one.counts.tried, caplog.messages) == (0, [])
    with pytest.raises(ValueError, match=r"missing image|row-1"):
        feed(tiny_policy, Rows(5, bad=[0], long=[1]), TOLD).first(5)


def test_rules_are_checked() -> None:
    """Bug: `on_long=truncate` is taken for something."""
    with pytest.raises(ValueError, match=r"row_rules.on_bad is 'warn'. It must be 'error' or 'skip'"):
        RowRules(on_bad="warn")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"row_rules.on_long is 'truncate'. It must be 'error', 'skip' or 't"
    ):
        RowRules(on_long="truncate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"row_rules.max_bad is 5. It is a share"):
        RowRules(max_bad=5)


# -- in the trainers --------------------------------------------------------------------------------


def test_sft_keeps_its_strict_default(tmp_path: Path) -> None:
    """Bug: a gold answer that is missing is passed over although nobody asked for that."""
    data = [make_sample(0), *Rows(2)]
    trainer = small_sft(tmp_path, data=data)
    with pytest.raises(ValueError, match=r"'sample-0' has no text in its column 'trace'. SFT trains on one"):
        trainer.next_sequences()
    assert (trainer.position, trainer.feed.counts.tried) == (0, 0)


def test_sft_passes_over_rows_when_told_to(tmp_path: Path) -> None:
    """Bug: a step with a row left out trains on fewer rows, or the next step takes one of them again."""
    odd = dataclasses.replace(make_sample(7), columns={"trace": "half a \ud83d pair"})
    pixels = dataclasses.replace(make_sample(8), columns={"trace": "see <|image_pad|>"})
    data = [make_sample(0), *Rows(3, long=[1]), odd, pixels]
    trainer = small_sft(tmp_path, data=data, max_tokens=LIMIT, row_rules=SKIP)
    seen = [ids(trainer.next_sequences()) for _ in range(4)]
    assert [len(step) for step in seen] == [3] * 4
    assert {one for step in seen for one in step} == {"row-0", "row-2"}
    counts = trainer.feed.counts
    assert counts.tried == trainer.position
    assert counts.tried == 12 + counts.left_out


def test_sft_shortens_questions_for_long_answers(tmp_path: Path) -> None:
    """Bug: the budget is that of the prompt alone, and the gold answer is cut or goes over it."""
    trainer = small_sft(
        tmp_path, data=Rows(2, long=[0]), max_tokens=LIMIT, row_rules=RowRules(on_long="truncate_text")
    )
    whole = {p.sample.id: (p, s) for p, s in small_sft(tmp_path, data=Rows(2, long=[0])).sequences(range(2))}
    for prompt, answer in trainer.next_sequences():
        assert int(trainer.policy.batch([(prompt, answer)]).attention.sum()) <= LIMIT
        assert answer == whole[prompt.sample.id][1]
    assert trainer.feed.counts.shortened >= 1


def test_sft_leaves_out_what_only_its_blocks_make_too_long(tmp_path: Path) -> None:
    """Bug: a row that fits without its blocks ends a run that was told to pass such rows over."""
    plain, shown = (
        dataclasses.replace(make_sample(i), columns={"trace": text})
        for i, text in enumerate(("It is 7.", "It <back> is 7."))
    )
    again = ShowAgain("<back>")
    long = small_sft(tmp_path, data=[plain, shown], reattention=again)
    fits = max(int(long.policy.batch([one]).attention.sum()) for one in long.sequences(range(2))) - 1
    settings: dict[str, Any] = {"data": [plain, shown], "reattention": again, "max_tokens": fits}
    skipping = small_sft(tmp_path, **settings, row_rules=SKIP)
    assert set(ids(skipping.next_sequences())) == {"sample-0"}
    assert skipping.feed.counts.too_long >= 1
    cutting = small_sft(tmp_path, **settings, row_rules=RowRules(on_bad="error", on_long="truncate_text"))
    with pytest.raises(ValueError, match=r"'sample-1' has .*Only the blocks put into its answer"):
        cutting.sequences(range(2))
    none = small_sft(tmp_path, **settings | {"data": [shown]}, row_rules=SKIP)
    with pytest.raises(ValueError, match="rows in a row could not be used"):
        none.next_sequences()


def test_sft_names_a_row_with_unusable_choices(tmp_path: Path) -> None:
    """Bug: one row whose recorded blocks fit nothing ends a run that was told to pass bad rows over."""
    good, wrong = (
        dataclasses.replace(make_sample(i), columns={"trace": "It <back> is 7.", "keep": keep})
        for i, keep in enumerate(([[[0, [1]]]], "nonsense"))
    )
    settings: dict[str, Any] = {
        "data": [good, wrong],
        "reattention": ShowAgain("<back>", keep=(1,)),
        "choices": "keep",
    }
    with pytest.raises(BadRow, match="sample-1"):
        small_sft(tmp_path, **settings).sequences(range(2))
    assert set(ids(small_sft(tmp_path, **settings, row_rules=SKIP).next_sequences())) == {"sample-0"}


@pytest.mark.parametrize("make", [small_rl, small_sft])
def test_counts_are_part_of_the_state(make: Any, tmp_path: Path) -> None:
    """Bug: a resumed run forgets how many rows it has left out."""
    settings = {"data": Rows(5, bad=[1, 3]), "row_rules": SKIP}
    trainer = make(tmp_path, **settings)
    take = trainer.next_sequences if make is small_sft else lambda: trainer.next_prompts(3)
    for _ in range(3):
        take()
    state = json.loads(json.dumps(trainer.state()))
    assert state["rows"] == trainer.feed.counts._asdict()
    assert state["rows"]["unreadable"] >= 1
    fresh = make(tmp_path, **settings)
    fresh.load_state(state)
    assert (fresh.feed.counts, fresh.position) == (trainer.feed.counts, trainer.position)


def test_a_batch_asked_for_twice_is_counted_once(tiny_policy: QwenVL) -> None:
    """Bug: the look at the first rows before a distillation doubles their count."""
    distiller = Distiller(
        policy=tiny_policy,
        data=Rows(6, bad=[1, 2]),
        rubric=rubric(),
        accept={"remainder": 0.5},
        rows_per_batch=3,
        max_prompt_tokens=LIMIT,
    )
    for batch in (0, 0, 1):
        distiller.prompts(batch)
    counts = distiller.feed.counts
    assert (counts.tried, counts.unreadable) == (6, 2)


def test_one_row_fills_a_step(tmp_path: Path) -> None:
    """Bug: fewer rows than a step takes hang the run, or shrink its batch without a word."""
    trainer = small_rl(tmp_path, data=Digits(size=1), prompts_per_step=4)
    assert [prompt.sample.id for prompt in trainer.next_prompts(4)] == ["digits-train-0"] * 4


@pytest.mark.parametrize("recipe", ["lookback_rl", "lookback_sft", "qwen_la_distill"])
def test_rules_are_keys_of_a_recipe(recipe: str) -> None:
    """Bug: a rule that can only be set in Python."""
    overrides = ["row_rules.on_long=truncate_text", "row_rules.max_bad=0.2", "start_from=null"]
    draft = draft_of(compose(recipe, overrides).values, slow=False)
    strict = recipe == "lookback_sft"
    assert draft.row_rules == RowRules(
        on_bad="error" if strict else "skip", on_long="truncate_text", max_bad=0.2
    )
    plain = draft_of(compose(recipe, ["start_from=null"]).values, slow=False)
    assert (
        plain.row_rules == type(draft)(**_needed(type(draft))).row_rules
    )  # Python's default is the recipe's


def _needed(kind: type) -> dict[str, Any]:
    given: dict[str, Any] = {"policy": None, "data": Digits(size=2), "rubric": rubric()}
    return given | ({"accept": {"remainder": 1}} if kind is Distiller else {"steps": 1})


def test_make_policy_and_random_tiny_agree_on_prompts() -> None:
    """Bug: the limit above is that of another tokenizer than the trainers' policy has."""
    sample = make_sample(0, "Which?")
    lengths = [p.prompt_length(p.prompt(sample, Instruction())) for p in (make_policy(), random_tiny())]
    assert lengths[0] == lengths[1] < 80
