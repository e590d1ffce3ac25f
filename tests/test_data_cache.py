"""`reflectvlm data cache`: prompts and images made once, equal to those of the original rows."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bad_rows import NOISE, encoded, written
from reflectvlm.data import cache_build, cache_command
from reflectvlm.data.cache_build import CacheBuild, as_ids
from reflectvlm.data.cache_files import CacheCard
from reflectvlm.data.cached import as_spans, cached
from reflectvlm.data.prompt_maker import PromptMaker
from reflectvlm.data.sources import dataset, pick
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.recipe_check import RecipeError
from reflectvlm.types import Instruction, Text, Visual

SAID = Instruction(text="Think first.")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Seven rows, two of them bad; images of odd sizes."""
    sizes = {"a.png": (60, 40), "b.jpg": (301, 77), "c.png": (33, 200)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(encoded(NOISE.resize(size), "JPEG" if name.endswith("jpg") else "PNG"))
    (tmp_path / "cut.png").write_bytes(encoded()[:3000])
    images: list[Any] = ["a.png", ["a.png", "b.jpg"], None, "gone.png", "cut.png", "c.png", "b.jpg"]
    rows = [
        {"id": f"r{i}", "question": f"How many {i}? <|im_end|>", "answer": i, "images": value, "level": [i]}
        for i, value in enumerate(images)
    ]
    rows[1]["question"] = "<image> or <image>?"
    return written(tmp_path / "rows.jsonl", *rows)


def made(path: Path, policy: QwenVL, **settings: Any) -> Path:
    folder = path.parent / "cache"
    build = CacheBuild(
        **{"maker": PromptMaker.of(policy, SAID), "shard_rows": 3, "max_bad": 0.3, **settings},
    )
    build(pick(path), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def test_rows_and_prompts_are_those_of_the_originals(path: Path, tiny_policy: QwenVL) -> None:
    """Bug: pixels are resized twice, a marker's place is lost, or a row is another's."""
    rows = cached(made(path, tiny_policy), policy=tiny_policy, instruction=SAID)
    original = dataset(path, max_bad=0.3)
    assert len(rows) == len(original) == 5
    assert [row.id for row in rows] == ["r0", "r1", "r2", "r5", "r6"]
    for index, sample in enumerate(original):
        row = rows[index]
        assert (row.question, row.answer, row.columns) == (sample.question, sample.answer, sample.columns)
        want = tiny_policy.prompt(sample, SAID)
        for prompt in (tiny_policy.prompt(row, SAID), rows.prompt(index, tiny_policy)):
            assert prompt.spans == want.spans
            assert prompt.grids == want.grids
            for patches, others in zip(prompt.patches, want.patches, strict=True):
                assert torch.equal(patches.pixels, others.pixels)
    assert rows[-1].id == "r6"
    assert [row.id for row in rows[1:3]] == ["r1", "r2"]
    with pytest.raises(IndexError):
        _ = rows[5]
    assert pickle.loads(pickle.dumps(rows))[3].id == "r5"
    assert rows.card.reasons == {"missing image": 1, "broken image": 1}


def test_spans_as_ids() -> None:
    """Bug: two images in a row, or one at an end, get lost."""
    spans = (Visual(image=0), Visual(image=1), Text(ids=(5, 0)), Visual(image=0))
    assert as_ids(spans) == [-1, -2, 5, 0, -1]
    assert as_spans(as_ids(spans)) == spans
    assert as_spans([3]) == (Text(ids=(3,)),)


class Killed(BaseException):
    """As good as a kill: nothing between here and the test catches it."""


def test_killed_anywhere_it_goes_on(path: Path, tiny_policy: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a shard that was cut off counts as whole, or rows come twice."""
    whole = contents(made(path, tiny_policy))
    steps = 0
    while True:
        folder = path.parent / "cache"
        for file in folder.iterdir():
            file.unlink()
        left = [steps]

        def counted(function: Any, left: list[int] = left) -> Any:
            def call(*values: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return function(*values, **more)

            return call

        with monkeypatch.context() as patched:
            patched.setattr("reflectvlm.data.cache_files.os.replace", counted(os.replace))
            patched.setattr("reflectvlm.data.cache_build.load_image", counted(cache_build.load_image))
            try:
                made(path, tiny_policy)
            except Killed:
                pass
            else:
                break
        with pytest.raises(ValueError, match=r"not finished|holds no cache"):
            cached(folder)
        assert contents(made(path, tiny_policy)) == whole
        steps += 1
    assert steps >= 10


def test_finished_shards_are_not_made_again(
    path: Path, tiny_policy: QwenVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: to go on costs as much as to begin."""
    before = contents(made(path, tiny_policy))
    monkeypatch.setattr(cache_build, "load_image", lambda *_: pytest.fail("an image was decoded"))
    assert contents(made(path, tiny_policy)) == before


def test_stale_caches_are_refused(path: Path, tiny_policy: QwenVL, tmp_path: Path) -> None:
    """Bug: rows that changed train as they were; or a cache for other pixels passes."""
    made(path, tiny_policy)
    text = path.read_text()
    path.write_text(text.replace("How many 5?", "How few 5?"))
    with pytest.raises(
        ValueError, match=r"cache is stale: rows 4 to 6 of .*rows.jsonl, or their images, have"
    ):
        made(path, tiny_policy)
    path.write_text(text)
    made(path, tiny_policy)
    (tmp_path / "b.jpg").write_bytes(encoded(NOISE.resize((300, 77)), "JPEG"))
    with pytest.raises(ValueError, match=r"cache is stale: rows 1 to 3"):
        made(path, tiny_policy)


def test_fewer_rows_are_noticed(path: Path, tiny_policy: QwenVL) -> None:
    """Bug: a source whose end was cut off at a shard's border leaves rows that it does not have."""
    made(path, tiny_policy)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    with pytest.raises(ValueError, match=r"has more shards than the source has rows for"):
        made(path, tiny_policy, max_bad=0.5)


def test_other_settings_are_refused(path: Path, tiny_policy: QwenVL) -> None:
    """Bug: a cache made for another instruction or pixel limit trains a run that has its own."""
    folder = made(path, tiny_policy)
    with pytest.raises(ValueError, match=r"was made with another instruction than the run has"):
        cached(folder, policy=tiny_policy, instruction=Instruction(text="Think last."))
    other = PromptMaker.load("tiny", instruction=SAID, max_pixels=64 * 64)
    with pytest.raises(ValueError, match=r"made with another image processor\. Give those words again"):
        made(path, tiny_policy, maker=other)
    with pytest.raises(ValueError, match=r"made with another shard_rows"):
        made(path, tiny_policy, shard_rows=4)
    # Tags of a method are special tokens that no question becomes: they make no other prompt.
    from reflectvlm.models.loading import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<back>"]})
    tagged = PromptMaker(
        tokenizer=tokenizer,
        image_processor=tiny_policy.image_processor,
        vision=tiny_policy.vision,
        instruction=SAID,
    )
    assert tagged.settings == PromptMaker.of(tiny_policy, SAID).settings


def test_broken_files_are_named(path: Path, tiny_policy: QwenVL) -> None:
    """Bug: a file that was cut off gives a traceback of Arrow, or other rows."""
    folder = made(path, tiny_policy)
    shard = folder / "shard-00001.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"shard-00001.arrow cannot be read .*Delete it and give"):
        _ = cached(folder)[3]
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.arrow is missing"):
        cached(folder)
    made(path, tiny_policy)
    assert shard.read_bytes() == data
    (folder / "cache.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"format 2, and this version reads 1"):
        cached(folder)


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the words do not reach the cache, or two processes write one."""
    folder = path.parent / "cache"
    words = [str(path), "model=tiny", f"out={folder}", "max_bad=0.5", "shard_rows=4", "max_pixels=16384"]
    assert cache_command.run(words) == 0
    said = capsys.readouterr().out
    assert f"5 rows in 2 shards of {folder}; 2 left out: missing image 1, broken image 1" in said
    assert all(image.width * image.height <= 16384 for row in cached(folder) for image in row.images)
    with pytest.raises(RecipeError, match=r"needs model="):
        cache_command.run([str(path), f"out={folder}"])
    with pytest.raises(RecipeError, match=r"needs out="):
        cache_command.run([str(path), "model=tiny"])
    with pytest.raises(ValueError, match=r"Too many bad rows, max_bad=0.1: 2 of 7 \(missing image 1"):
        cache_command.run([*words[:2], f"out={path.parent / 'new'}", "max_bad=0.1"])
    with pytest.raises(ValueError, match="holds other files"):
        cache_command.run([*words[:2], f"out={path.parent}"])


def test_a_trainer_takes_it(tmp_path: Path, tiny_policy: QwenVL) -> None:
    """Bug: rows of a cache train other numbers than the rows that it was made of."""
    from training import small_sft

    (tmp_path / "a.png").write_bytes(encoded(NOISE))
    rows = [
        {
            "id": f"r{i}",
            "question": f"{i}?",
            "answer": str(i),
            "images": "a.png",
            "trace": f"<think>{i}</think>",
        }
        for i in range(4)
    ]
    path = written(tmp_path / "rows.jsonl", *rows)
    made(path, tiny_policy)
    losses = [
        small_sft(tmp_path / name, data=data, rows_per_step=2).step(0).metrics["loss"]
        for name, data in (("one", dataset(path)), ("two", cached(tmp_path / "cache")))
    ]
    assert losses[0] == losses[1]


CHILD = """
import sys
from pathlib import Path
from reflectvlm.data.cache_build import CacheBuild
from reflectvlm.data.cached import cached
from reflectvlm.data.prompt_maker import PromptMaker
from reflectvlm.data.sources import pick
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) // 1024
build = CacheBuild(maker=PromptMaker.load("tiny"), shard_rows=100)
build(pick(sys.argv[1] + "/small.jsonl"), Path(sys.argv[1] + "/a"))
before = peak()
card = build(pick(sys.argv[1] + "/large.jsonl"), Path(sys.argv[1] + "/b"))
print(card.rows, peak() - before)
"""


def test_memory_is_flat(tmp_path: Path) -> None:
    """Bug: pixels of all rows are held until the end. 700 images of 128 x 128 are 34 MB."""
    (tmp_path / "a.png").write_bytes(encoded(NOISE.resize((128, 128)), "BMP"))
    for name, count in (("small", 64), ("large", 700)):
        rows = [{"question": f"q{i}", "answer": "1", "images": "a.png"} for i in range(count)]
        written(tmp_path / f"{name}.jsonl", *rows)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    rows_made, megabytes = map(int, done.stdout.split())
    assert rows_made == 700
    assert megabytes < 17


def test_the_card_tells_what_differs() -> None:
    """Bug: a part that only one of two caches knows is no difference."""
    card = CacheCard(settings={"a": "1", "b": "2"}, shard_rows=1, source="", columns="")
    assert card.differences({"a": "1", "c": "3"}) == ["b", "c"]
    assert card.differences({"a": "1", "b": "2"}) == []
