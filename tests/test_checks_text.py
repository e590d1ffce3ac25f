"""Checks at the start: tags, and the end of answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.normalizers import Lowercase

from checking import ASKED, BACK, HOT, found, small_distiller, sound_rl, states
from reflectvlm.reattention import VisualCopy
from reflectvlm.rewards.back import look_back_rubric
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.reflection import brpo_rubric
from reflectvlm.tags import look_back
from reflectvlm.types import Instruction, SamplingParams
from training import small_sft

# -- tags -----------------------------------------------------------------------------------------


def test_a_tag_that_the_tokenizer_changes(tmp_path: Path) -> None:
    """Bug: an added token that eats the white space around it is not told, or stops the run though rewards
    see it; a tokenizer that writes all in small letters, in which no tag comes back, does not stop it. SFT
    goes on all the same: its evaluations alone read the tag."""
    trainer = sound_rl(tmp_path)
    trainer.policy.tokenizer.add_tokens([AddedToken("<back>", rstrip=True, special=True)])
    result = found(trainer)["tags"]
    assert result.status == "warning"
    assert "'<back> ' comes back from the tokenizer as '<back>'" in result.found
    for make, status in ((sound_rl, "failed"), (small_sft, "warning")):
        trainer = make(tmp_path, rubric=brpo_rubric())
        trainer.policy.tokenizer.backend_tokenizer.normalizer = Lowercase()
        result = found(trainer)["tags"]
        assert result.status == status
        assert "'<SUMMARY>' comes back from the tokenizer as '<summary>'" in result.found


def test_a_stop_that_is_never_sampled_is_told(tmp_path: Path) -> None:
    """Bug: a text that would end an answer, and never comes, stops the run, which it does not harm."""
    sampling = dataclasses.replace(HOT, stop=("<|image_pad|>",))
    result = found(sound_rl(tmp_path, sampling=sampling))["tags"]
    assert result.status == "warning"
    assert "stands for pixels" in result.found


@pytest.mark.parametrize(
    ("trigger", "says"),
    [("<|image_pad|>", "stands for pixels"), ("<|im_end|>", "ends the answer, so nothing can follow")],
)
def test_a_trigger_that_can_never_work_fails(trigger: str, says: str, tmp_path: Path) -> None:
    """Bug: a run with re-attention that never inserts anything, and does not say so."""
    result = found(sound_rl(tmp_path, reattention=VisualCopy(trigger=trigger)))["tags"]
    assert result.status == "failed"
    assert says in result.found


@pytest.mark.parametrize("make", [sound_rl, small_sft, small_distiller])
def test_a_trigger_that_nothing_asks_for_is_told(make: Any, tmp_path: Path) -> None:
    """Bug: `<REFLECTION>` is waited for by a policy that was only ever told of `<back>`."""
    result = found(make(tmp_path, reattention=VisualCopy(trigger="<look>")))["tags"]
    assert result.status == "warning"
    assert "the trigger '<look>' of reattention" in result.found
    assert found(make(tmp_path, reattention=VisualCopy(trigger="<back>")))["tags"].status == "ok"


def test_a_layout_that_nothing_asks_for_is_told(tmp_path: Path) -> None:
    """Bug: a reward for tags that the policy has never heard of is 0 for ever."""
    result = found(sound_rl(tmp_path, instruction=Instruction(text="Think in <think>.")))["tags"]
    assert result.status == "warning"
    assert "does not name <back>, \\boxed, which the rewards demand" in result.found


def test_tags_say_how_they_are_spelled(tmp_path: Path) -> None:
    """Bug: a tag meant to be one special token is three pieces, and nobody sees it."""
    special = VisualCopy(trigger="<|box_start|>")
    asked = Instruction(text=f"{ASKED.text} <|box_start|>")
    result = found(sound_rl(tmp_path, reattention=special, instruction=asked))["tags"]
    assert "one special token each: <|box_start|>; in pieces: <think> 4" in result.found


# -- the end of answers ---------------------------------------------------------------------------


def test_a_budget_that_no_right_answer_fits_in_fails(tmp_path: Path) -> None:
    """Bug: every answer is cut off, every reward 0, and the run looks as if it trained."""
    result = found(sound_rl(tmp_path, sampling=SamplingParams(max_tokens=5)))["answer end"]
    assert result.status == "failed"
    assert "8 of 8 short right answers are longer than sampling.max_tokens=5" in result.found


def test_an_end_that_cannot_be_sampled_fails(tmp_path: Path) -> None:
    """Bug: tokenizer and model of two families: no answer ever ends."""
    trainer = sound_rl(tmp_path)
    trainer.policy.__dict__["end_ids"] = (trainer.policy.vision.pad,)
    assert "can never be sampled" in found(trainer)["answer end"].found


def test_a_budget_that_a_bare_answer_fits_in_is_told(tmp_path: Path) -> None:
    r"""Bug: a budget for the box, not for the layout, stops the run, though accuracy can be earned; or a run
    that learns from a reward of its own too. `\boxed{7}` has 6 tokens, and one more is the end."""
    own = look_back_rubric(look_back(), extra={"own": per_rollout(lambda _: 0.3)}, extra_weights={"own": 1.0})
    for budget, judged, status in ((6, BACK, "warning"), (5, BACK, "failed"), (5, own, "warning")):
        trainer = sound_rl(tmp_path, sampling=SamplingParams(max_tokens=budget), rubric=judged)
        assert states(trainer)["answer end"] == status
