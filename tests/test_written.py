"""What of a run's rollouts is written down: enough to read them token by token, and no more than is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from reflectvlm.train.run import Output
from reflectvlm.train.trackers import JsonLines
from reflectvlm.train.written import (
    MOST_TOKENS,
    SMALL,
    Pictures,
    image_digest,
    sample_rows,
    small_copy,
    token_rows,
)
from reflectvlm.types import Grid, Patches, Prompt, Rollout, Sample, ScoredGroup, Text, Visual


def rollout(*spans: Text | Visual, offsets: tuple[int, ...] = (0, 1), color: str = "red") -> Rollout:

    sample = Sample(id="s", question="q?", answer="1", images=(Image.new("RGB", (400, 100), color),))
    prompt = Prompt(sample=sample, spans=(), patches=(Patches(pixels=torch.zeros(0, 1), grid=Grid(1, 1, 4)),))
    return Rollout(prompt=prompt, spans=spans, text="ab", stop="eos", offsets=offsets)


def sampled(*ids: int) -> Text:
    return Text(ids=ids, trained=True, logprobs=tuple(-i / 7 for i in ids))


def group(*rewards: float, color: str = "red") -> ScoredGroup:
    answers = tuple(rollout(sampled(1, 2), color=color) for _ in rewards)
    return ScoredGroup(rollouts=answers, rewards=rewards, parts={}, scored=(True,) * len(rewards))


def test_tokens_and_blocks_are_told_in_their_places() -> None:
    """Bug: log-probs that belong to other tokens, because a block or forced text stood between."""
    row = token_rows(
        rollout(
            sampled(1, 2), Visual(image=0, keep=(3,), before_sampled=True), Text(ids=(9,)), sampled(7),
            offsets=(0, 1, 2),
        )
    )  # fmt: skip
    # -1/7 and -2/7 to three digits; 9 was forced; -7/7 = -1.
    assert row["ids"] == [1, 2, 9, 7]
    assert row["logprobs"] == [-0.143, -0.286, None, -1.0]
    assert row["offsets"] == [0, 1, 2]
    assert row["blocks"] == [{"after": 2, "image": 0, "keep": [3], "before_sampled": True}]
    assert row["grids"] == [[1, 1, 4]]


def test_a_certain_token_has_no_minus_zero() -> None:
    """Bug: `-0.0`, which is longer and reads as if something were below zero."""
    assert json.dumps(token_rows(rollout(Text(ids=(1,), logprobs=(-1e-9,))))["logprobs"]) == "[0.0]"


def test_tokens_of_a_very_long_answer_are_left_out() -> None:
    """Bug: one runaway answer per step that fills the disk with its log-probs."""
    row = token_rows(rollout(Text(ids=(1,) * (MOST_TOKENS + 1))))
    assert {"ids", "logprobs", "offsets"}.isdisjoint(row)
    assert "ids" in token_rows(rollout(Text(ids=(1,) * MOST_TOKENS)))


def test_evaluations_and_steps_have_limits_of_their_own() -> None:
    """Bug: a report that can show four held-out answers of four hundred, or a log of all training."""
    step, held_out = [group(1.0, 0.0)] * 9, [group(1.0)] * 9
    assert len(list(sample_rows(step, 4, 7))) == 4
    assert len(list(sample_rows(held_out, 4, 7))) == 7
    assert len(list(sample_rows(held_out, 4))) == 4
    assert [row["group"] for row in sample_rows([group(1.0, 0.0), group(1.0)], 3)] == [2, 2, 1]


def test_pictures_are_kept_small_once_and_up_to_a_number(tmp_path: Path) -> None:
    """Bug: a folder that grows with every step, or full-size photographs in it."""
    pictures = Pictures(tmp_path / "p", side=64, most=2)
    tracker = JsonLines(tmp_path, samples_per_step=8, pictures=pictures)
    for step in (1, 2):
        tracker.rollouts(step, [group(1.0, 0.0, color=color) for color in ("red", "blue", "green")])
    tracker.close()
    files = sorted((tmp_path / "p").iterdir())
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(files) == 2
    assert {file.stem for file in files} < {digest for row in rows for digest in row["images"]}
    for file in files:
        with Image.open(file) as small:
            assert small.size == (64, 16)


def test_a_resumed_run_counts_the_pictures_that_are_there(tmp_path: Path) -> None:
    """Bug: the limit applies to each process, so that a run resumed a hundred times has no limit."""
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    Pictures(tmp_path, most=1).add(red)
    written = next(tmp_path.iterdir()).stat().st_ino
    again = Pictures(tmp_path, most=1)
    again.add(red)
    again.add(blue)
    assert next(tmp_path.iterdir()).stat().st_ino == written  # nor is it written a second time
    assert [file.stem for file in tmp_path.iterdir()] == [image_digest(red)]


def test_a_photograph_is_kept_as_jpeg() -> None:
    """Bug: lossless copies of photographs, ten times the size."""
    noise = Image.effect_noise((300, 300), 90).convert("RGB")
    data, suffix = small_copy(noise, 256)
    assert suffix == ".jpg"
    assert small_copy(Image.new("RGB", (300, 300)), 256)[1] == ".png"
    assert len(data) < 4 * SMALL


@pytest.mark.parametrize("name", ["samples_per_step", "held_out_answers", "sample_images"])
def test_limits_below_zero_are_refused(name: str) -> None:
    """Bug: a negative limit that means everything, as a slice would have it."""
    with pytest.raises(ValueError, match=rf"output\.{name} is -1. It must"):
        Output(**{name: -1})
    if name == "held_out_answers":
        with pytest.raises(ValueError, match="held_out_answers is -1"):
            JsonLines(Path(), held_out_answers=-1)
    with pytest.raises(ValueError, match=r"Pictures\.side is 0"):
        Pictures(Path(), side=0)
