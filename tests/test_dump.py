"""A dumped batch gives the broken step again, says what is wrong with it, and can be read by nothing else."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures import make_policy, make_prompt, score_batch
from reflectvlm.batch import Batch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.train.dump import ABOUT, TENSORS, dump_batch, load_dump, nonfinite, texts
from reflectvlm.types import Text, Visual

IDS = ("row-a", "row-a", "row-b")


def a_batch(policy: QwenVL) -> Batch:
    """Three rows of two prompts; one answer has a block."""
    one, two = make_prompt(policy, 0), make_prompt(policy, 1, "One and one?", ())
    answer = (Text(ids=(100, 101), trained=True), Visual(image=0), Text(ids=(102,), trained=True))
    short = (Text(ids=(103, 104), trained=True),)
    batch = policy.batch([(one, answer), (one, short), (two, short)])
    advantages = torch.tensor([1.0, -1.0, 0.5])
    reference = batch.old_logprobs - 0.5
    return dataclasses.replace(batch, advantages=advantages, ref_logprobs=reference, row_ids=IDS)


def test_a_dump_is_the_batch_again(tmp_path: Path) -> None:
    """Bug: a dump from which the step cannot be taken again, because positions, images or counts lack."""
    policy = make_policy()
    batch = a_batch(policy)
    scores = score_batch(policy, batch).logprobs.detach()
    dump_batch(tmp_path / "d", batch, "why", step=3, more={"logprobs": scores})
    dump = load_dump(tmp_path / "d")
    assert (dump.reason, dump.step, list(dump.row_ids)) == ("why", 3, list(IDS))
    for field in dataclasses.fields(Batch):
        before, after = getattr(batch, field.name), getattr(dump.batch, field.name)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        elif field.name != "images":
            assert before == after
    assert [image.grid for image in dump.batch.images] == [image.grid for image in batch.images]
    assert torch.equal(score_batch(policy, dump.batch).logprobs.detach(), scores)
    assert torch.equal(dump.more["logprobs"], scores)


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    """Bug: one NaN among a million numbers, and nobody says where."""
    batch = a_batch(make_policy())
    assert batch.ref_logprobs is not None
    reference = batch.ref_logprobs.clone()
    reference[1, 0], reference[1, 1], reference[2, 0] = float("nan"), float("inf"), float("-inf")
    image = batch.images[0]
    pixels = image.pixels.clone()
    pixels[3, 2] = float("nan")
    images = (dataclasses.replace(image, pixels=pixels),)
    dump_batch(tmp_path / "d", dataclasses.replace(batch, ref_logprobs=reference, images=images), "why")
    assert json.loads((tmp_path / "d" / ABOUT).read_text())["nonfinite"] == {
        "ref_logprobs": {"nan": 1, "infinite": 2, "rows": [1, 2]},
        "image.0": {"nan": 1, "infinite": 0},
    }
    assert nonfinite({"x": torch.tensor(float("nan")), "n": torch.arange(3)}, 3) == {
        "x": {"nan": 1, "infinite": 0}
    }


def test_images_that_are_too_large_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    """Bug: a run that ends because of one number fills the disk with all of a step's images."""
    batch = a_batch(make_policy())
    size = batch.images[0].pixels.nbytes
    dump_batch(tmp_path / "d", batch, "why", limit=size)
    dump = load_dump(tmp_path / "d")
    assert not dump.images_kept
    assert dump.image_bytes == size
    assert dump.batch.images[0].grid == batch.images[0].grid
    assert not [name for name in load_file(tmp_path / "d" / TENSORS) if name.startswith("image.")]
    assert (tmp_path / "d" / TENSORS).stat().st_size < size


def test_texts_show_tags_and_count_visual_tokens(tmp_path: Path) -> None:
    """Bug: tags that the tokenizer hides, or a thousand <|image_pad|> in front of every question."""
    policy = make_policy()
    batch = a_batch(policy)
    first, _, third = texts(batch, policy.decode)
    tokens = batch.images[0].grid.tokens
    assert f"<|vision_start|>[{tokens} visual tokens]<|vision_end|>" in first["prompt"]
    wanted = policy.decode([100, 101]) + "<|vision_start|>" + f"[{tokens} visual tokens]" + "<|vision_end|>"
    assert first["answer"] == wanted + policy.decode([102])
    assert "<|im_start|>user\nOne and one?" in third["prompt"]
    assert third["answer"] == policy.decode([103, 104])
    dump_batch(tmp_path / "d", batch, "why", decode=policy.decode)
    assert load_dump(tmp_path / "d").texts == texts(batch, policy.decode)


def test_names_of_a_whole_step_are_not_taken_for_those_of_rows(tmp_path: Path) -> None:
    """Bug: two prompts of a step, three rows of one update: row 1 gets the name of another sample."""
    unnamed = dataclasses.replace(a_batch(make_policy()), row_ids=())
    dump_batch(tmp_path / "d", unnamed, "why", row_ids=("row-a", "row-b"))
    dump = load_dump(tmp_path / "d")
    assert (list(dump.named), list(dump.row_ids)) == (["row-a", "row-b"], [])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda d: (d / ABOUT).unlink(), r"is no whole dump: batch.json is missing"),
        (lambda d: (d / TENSORS).unlink(), r"is no whole dump: batch.safetensors is missing"),
        (lambda d: (d / ABOUT).write_text("{"), r"is no dump that can be read: Expecting"),
        (lambda d: (d / ABOUT).write_text("[]"), r"is no dump that can be read"),
        (lambda d: (d / ABOUT).write_text("{}"), r"is no dump that can be read: 'images_kept'"),
        (lambda d: (d / ABOUT).write_text('{"format": 9}'), r"has format 9; this version .* reads up to 1"),
        (lambda d: (d / TENSORS).write_bytes(b"x"), r"is no dump that can be read"),
        (lambda d: (d / TENSORS).write_bytes(pickle.dumps({})), r"is no dump that can be read"),
        (lambda d: save_file({"ids": torch.zeros(2, 2)}, d / TENSORS), r"is no dump that can be read"),
        (
            lambda d: save_file(load_file(d / TENSORS) | {"advantages": torch.zeros(7)}, d / TENSORS),
            r"advantages has shape \[7\], and ids has \[3, \d+\]",
        ),
    ],
)
def test_what_is_no_dump_is_refused(tmp_path: Path, harm: object, says: str) -> None:
    """Bug: a cut-off dump ends in a KeyError, or a pickle is run."""
    folder = dump_batch(tmp_path / "d", a_batch(make_policy()), "why")
    assert callable(harm)
    harm(folder)
    with pytest.raises(ValueError, match=says):
        load_dump(folder)
