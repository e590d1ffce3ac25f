"""The controls: text instead of an image, greyed regions, spliced readings, hallucination against length."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fixtures import favour, make_policy, make_prompt, make_sample, score
from reflectvlm import Digits, Generator
from reflectvlm.attention import splice
from reflectvlm.attention.boxes import Box
from reflectvlm.attention.hallucination import Caption, by_length, steps
from reflectvlm.attention.matched_text import MatchedText
from reflectvlm.attention.removing import greyed, logprobs, regions_to_grey, removal
from reflectvlm.attention.splice import Start, begin, digit_beginnings, repairs, starts
from reflectvlm.data.digit_mentions import mentions
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.spans import count_tokens
from reflectvlm.types import Instruction, Prompt, Rollout, SamplingParams, Text, Visual

SPECIAL = "<|box_start|>"
ANSWER = "<think>upper left 7.</think> <back>upper left 7.</back> \\boxed{7}"


@functools.cache
def policy() -> QwenVL:
    """Samples its special token often. Tests must not change it."""
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


def scripted(prompt: Prompt, reattention: Any = None, text: str = ANSWER) -> Rollout:
    engine = ScriptedEngine(policy=policy(), texts=(text,))
    sampling = SamplingParams(max_tokens=200)
    ((rollout,),) = engine.generate([prompt], 1, sampling, reattention or Implicit(), seed=0)
    return rollout


# -- text instead of an image ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "like", [VisualCopy(trigger=SPECIAL), VisualRoute(trigger=SPECIAL, m=40), VisualCopy(trigger="a")]
)
def test_text_has_the_blocks_length_and_place(like: Any) -> None:
    """Bug: a control that is longer than what it controls for, stands elsewhere, or shows the image after
    all."""
    engine, sampling = InProcessEngine(policy=policy()), SamplingParams(max_tokens=12)
    prompt = make_prompt(policy(), 1)
    groups = [
        engine.generate([prompt], 4, sampling, way, seed=1)[0] for way in (like, MatchedText(like=like))
    ]
    compared = 0
    for shown, told in zip(*groups, strict=True):
        assert told.insertions == ()
        if not shown.insertions:
            continue
        compared += 1
        # Up to the first insertion both are the same answer.
        at = next(n for n, span in enumerate(shown.spans) if isinstance(span, Visual))
        assert [span.ids for span in told.spans[:at]] == [span.ids for span in shown.spans[:at]]
        text = told.spans[at]
        assert isinstance(text, Text)
        assert not text.trained
        assert not text.logprobs
        assert len(text.ids) == count_tokens((shown.spans[at],), prompt.grids)
        assert len(set(text.ids)) == 1
    assert compared, "nothing was inserted: this proved nothing"


def test_matched_text_refuses_what_it_cannot_match() -> None:
    """Bug: a control that silently does nothing."""
    with pytest.raises(ValueError, match=r"MatchedText\.like is Implicit, which never inserts"):
        MatchedText(like=Implicit())
    with pytest.raises(ValueError, match=r"MatchedText\.text is empty"):
        MatchedText(like=VisualCopy(), text="")


# -- region removal -------------------------------------------------------------------------------


def test_log_probs_are_the_trainers() -> None:
    """Bug: an answer scored with other tokens, or a block in it that its own image is not shown in."""
    prompts = [make_prompt(policy(), seed) for seed in (1, 2)]
    rollout = scripted(prompts[0], VisualCopy(trigger="<back>"))
    found = logprobs(policy(), prompts, rollout.spans)
    for row, prompt in zip(found, prompts, strict=True):
        alone = score(policy(), [(prompt, rollout.spans)]).logprobs
        batch = policy().batch([(prompt, rollout.spans)])
        assert torch.allclose(row, alone[batch.trained].double(), atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    own = [x for span in rollout.spans if isinstance(span, Text) for x in span.logprobs]
    assert found[0].tolist() == pytest.approx(own, abs=1e-5)


def test_only_the_box_is_greyed() -> None:
    """Bug: a region that is off by a pixel, or an image that is changed in place."""
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    before = np.asarray(image).copy()
    made = np.asarray(greyed(image, [Box(0.5, 0.0, 1.0, 0.25)]))
    changed = (made != before).any(-1)
    assert changed[:16, 32:].mean() > 0.9
    changed[:16, 32:] = False
    assert not changed.any()
    assert np.array_equal(np.asarray(image), before)
    assert (made[:16, 32:] == before.reshape(-1, 3).mean(0).round()).all()


def test_the_other_region_is_as_large_and_apart() -> None:
    """Bug: a control region that covers part of what was asked about, or less of the image."""
    taken = 0
    for sample in Digits(split="test", size=80):
        try:
            pair = regions_to_grey(sample)
        except ValueError as error:
            assert "no other region of the same size" in str(error)  # noqa: PT017 - some rows have none
            assert len(sample.columns["looks"]) > 2
            continue
        taken += 1
        assert sum(box.area for box in pair.other) == pytest.approx(sum(box.area for box in pair.asked))
        assert not any(a.overlaps(b) for a in pair.asked for b in pair.other)
        assert len({*pair.other}) == len(pair.other)
        if len(pair.other) == 1:
            # A digit that nobody asked about is a fairer loss than an empty quarter.
            digits = sample.columns["digits"]
            filled = [p for p in range(4) if digits[p] is not None and p not in sample.columns["looks"]]
            from reflectvlm.data.digits import PLACES

            assert not filled or PLACES.index(pair.name) in filled
    assert taken > 40


def test_a_users_box_without_a_partner_gets_a_place_elsewhere() -> None:
    """Bug: rows with one box have no control at all."""
    sample = dataclasses.replace(make_sample(), columns={"boxes": {"cup": [0, 0, 16, 16]}})
    pair = regions_to_grey(sample)
    assert pair.name == "elsewhere"
    assert pair.other == (Box(0.75, 0.75, 1.0, 1.0),)
    with pytest.raises(ValueError, match="does not say where its objects are"):
        regions_to_grey(make_sample())


def test_removal_is_the_fall_of_the_log_prob() -> None:
    """Bug: a sign that is turned, parts that do not add up, or the control's fall in the place of the asked
    one's."""
    sample = Digits(split="test", size=30, kinds=["read"])[4]
    prompt = policy().prompt(sample, Instruction())
    rollout = scripted(prompt)
    (made,) = removal(policy(), [rollout], Instruction())
    pair = regions_to_grey(sample)
    own = sum(x for span in rollout.spans if isinstance(span, Text) for x in span.logprobs)
    for boxes, falls in ((pair.asked, made.asked), (pair.other, made.other)):
        grey = dataclasses.replace(sample, images=(greyed(sample.images[0], boxes),))
        changed = scripted(policy().prompt(grey, Instruction()))
        assert changed.sampled_ids == rollout.sampled_ids
        lost = own - sum(x for span in changed.spans if isinstance(span, Text) for x in span.logprobs)
        assert falls["answer"] == pytest.approx(lost, abs=1e-3)
        parts = [falls[name] for name in ("before", "inside", "after")]
        assert sum(parts) == pytest.approx(falls["answer"], abs=1e-9)
    assert made.asked["answer"] != pytest.approx(made.other["answer"], abs=1e-3)
    assert made.tokens["box"] == 1
    told: list[str] = []
    assert (
        list(
            removal(
                policy(),
                [scripted(make_prompt(policy()))],
                Instruction(),
                skipped=lambda _, w: told.append(w),
            )
        )
        == []
    )
    assert "does not say where" in told[0]


# -- spliced readings -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["back", "qwen_la", "think"])
def test_beginnings_of_digit_pages(form: Any) -> None:
    """Bug: a "wrong" beginning that is right, that still leads to the right answer, or that has the
    correction in it."""
    seen = 0
    kinds: set[str] = set()
    misread: set[int] = set()
    data = Digits(split="test", size=80)
    for one in starts((data[n] for n in range(80)), form):
        seen += 1
        kinds.add(one.sample.columns["kind"])
        digits = one.sample.columns["digits"]

        def wrong(text: str, digits: Sequence[int | None] = digits) -> list[int]:
            return [
                (int(m.digit) - int(digits[m.place] or 0)) % 10
                for m in mentions(text)
                if m.digit is not None and str(digits[m.place]) != m.digit
            ]

        assert len(wrong(one.wrong)) == 1
        assert not wrong(one.right)
        misread |= {*wrong(one.wrong)}
        end = {"back": "</think>", "qwen_la": "</REASONING>", "think": "."}[form]
        assert one.wrong.endswith(end)
        assert one.right.endswith(end)
        assert "<back>" not in one.wrong
        assert "<REFLECTION>" not in one.wrong
    assert seen > 50
    assert {"read", "add"} <= kinds
    assert len(misread) > 5, "every row is misread in the same way"
    with pytest.raises(ValueError, match="form is 'other'"):
        list(digit_beginnings(data[0], "other"))  # type: ignore[arg-type]


def test_a_beginning_is_the_models_own_words() -> None:
    """Bug: the spliced words end the turn, stand in front of the template, or are sampled again."""
    prompt = make_prompt(policy())
    generator = Generator(policy(), Implicit())
    begun = begin(generator, prompt, "<think>upper left 3.</think>")
    assert begun.spans[: len(prompt.spans)] == prompt.spans
    (added,) = begun.spans[len(prompt.spans) :]
    assert isinstance(added, Text)
    assert not added.trained
    assert policy().decode(added.ids) == "<think>upper left 3.</think>"


@dataclasses.dataclass(frozen=True)
class Corrects:
    """An engine that answers 7 where the prompt does not end with a wrong reading, and where it is told
    to."""

    policy: QwenVL
    repairs: frozenset[str]

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Any, reattention: Any, *, seed: int
    ) -> Any:
        assert n == 1
        del sampling, reattention, seed
        made = []
        for prompt in prompts:
            last = prompt.spans[-1]
            assert isinstance(last, Text)
            wrong = "3" in self.policy.decode(last.ids)
            right = not wrong or prompt.sample.id in self.repairs
            made.append((scripted(prompt, text=f" \\boxed{{{7 if right else 3}}}"),))
        return made


def test_repairs_are_counted_by_the_final_answer() -> None:
    """Bug: a repair counted from the spliced words, or rows that change places."""
    samples = [dataclasses.replace(make_sample(), id=name) for name in "abc"]
    rows = [Start(sample=one, wrong="<think>upper left 3.", right="<think>upper left 7.") for one in samples]
    generator = Generator(policy(), Implicit(), engine=lambda policy: Corrects(policy, frozenset("b")))
    found = repairs(generator, rows, batch=2)
    assert [(one.id, one.repaired, one.kept) for one in found] == [
        ("a", False, True),
        ("b", True, True),
        ("c", False, True),
    ]
    assert found[1].wrong_text == "<think>upper left 3. \\boxed{7}"


def test_rows_bring_their_own_beginnings() -> None:
    """Bug: only the built-in task can be spliced."""
    own = dataclasses.replace(make_sample(), columns={"wrong_start": "It is 3.", "right_start": "It is 7."})
    assert [(one.wrong, one.right) for one in splice.starts([own, make_sample()])] == [
        ("It is 3.", "It is 7.")
    ]


# -- hallucination against length -----------------------------------------------------------------


def animals(text: str) -> list[str]:
    return [word for word in text.replace(".", "").split() if word in ("cat", "dog", "cow")]


def test_hallucination_by_hand() -> None:
    """Bug: objects counted once in CHAIR-i or twice in recall; a caption that is over leaves the counts."""
    captions = [
        Caption(text="a cat and a cat and a dog", objects={"cat", "cow"}),
        Caption(text="dog.", objects={"dog"}),
    ]
    made = by_length(captions, animals, [1, 2, 5, 8, 99])
    assert [(row.mentioned, row.wrong) for row in made] == [(1, 0), (2, 0), (3, 0), (4, 1), (4, 1)]
    # Three objects are shown: cat, cow, dog.
    assert [row.recall for row in made] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert [row.chair_i for row in made] == [0, 0, 0, 0.25, 0.25]
    assert [row.captions for row in made] == [2, 1, 1, 1, 0]
    nothing = by_length([Caption(text="a view", objects=())], animals, [3])
    assert (nothing[0].chair_i, nothing[0].recall) == (None, None)
    with pytest.raises(ValueError, match="lengths has 0"):
        by_length(captions, animals, [0])
    assert steps(captions, every=3) == [3, 6, 9]
    assert steps([]) == []


def test_a_word_that_is_cut_in_two_is_not_read() -> None:
    """Bug: "cow" is found in "coward", because tokens end within words."""
    caption = Caption(text="a coward", objects=(), offsets=(0, 1, 5))
    assert caption.first(2) == "a "
    assert caption.first(3) == "a coward"
    assert by_length([caption], animals, [2])[0].mentioned == 0


@given(
    st.lists(st.sampled_from(["cat", "dog", "cow", "tree"]), max_size=12),
    st.sets(st.sampled_from(["cat", "dog"])),
)
def test_counts_only_grow(words: list[str], objects: set[str]) -> None:
    """Bug: a longer text that mentions less."""
    made = by_length([Caption(text=" ".join(words), objects=objects)], animals, range(1, 15))
    for shorter, longer in itertools.pairwise(made):
        assert shorter.mentioned <= longer.mentioned
        assert (shorter.recall or 0) <= (longer.recall or 0)
