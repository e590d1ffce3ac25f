"""Features that are kept for the whole run: the same bits, never the wrong ones, never more than allowed."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fixtures import make_policy, make_prompt
from reflectvlm.building import draft_of
from reflectvlm.config import compose
from reflectvlm.data.digits import Digits
from reflectvlm.models import feature_cache
from reflectvlm.models.feature_cache import FeatureCache, tower_digest, vision_of
from reflectvlm.models.feature_store import FolderStore, MemoryStore
from reflectvlm.models.freezing import freeze
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import random_tiny
from reflectvlm.objectives import KL, ClippedSurrogate
from reflectvlm.reattention import VisualCopy
from reflectvlm.train.optim import AdamW
from reflectvlm.train.reference_sync import ReferenceSync
from reflectvlm.types import Grid, Instruction, Patches, SamplingParams
from training import logged, reflecting_tiny, same_runs, small_brpo_copy, small_rl, small_sft

FROZEN = ["vision", "projector"]


def frozen(policy: QwenVL, cache: FeatureCache | None = None) -> QwenVL:
    freeze(policy.model, FROZEN)
    return dataclasses.replace(policy, feature_cache=cache)


def pictures(policy: QwenVL, count: int = 3) -> list[Patches]:
    return [make_prompt(policy, seed).patches[0] for seed in range(count)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each pass of the tower had."""
    made: list[int] = []
    real = QwenVL._encoded

    def counted(self: QwenVL, images: Any) -> Tensor:
        made.append(len(images))
        return real(self, images)

    monkeypatch.setattr(QwenVL, "_encoded", counted)
    return made


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower takes images one by one with and without a cache: a machine's matrix products may round a
    row differently in other company, which is not what is compared here."""
    real = QwenVL._encoded
    monkeypatch.setattr(QwenVL, "_encoded", lambda self, images: torch.cat([real(self, [i]) for i in images]))


# -- equal to the plain way -------------------------------------------------------------------------


def with_and_without(
    make: Callable[..., Any], policy: Callable[[], QwenVL], root: Path, **changes: Any
) -> None:
    plain = make(root / "plain", policy=frozen(policy()), **changes).run()
    kept = make(root / "kept", policy=frozen(policy(), FeatureCache()), **changes).run()
    same_runs(kept.folder, plain.folder)
    assert len(logged(kept.folder)) >= 3


@pytest.mark.usefixtures("one_by_one")
def test_sft_learns_the_same_bits(tmp_path: Path) -> None:
    """Bug: a kept feature is rounded, or another image's."""
    with_and_without(small_sft, random_tiny, tmp_path, steps=3)


@pytest.mark.usefixtures("one_by_one")
def test_rl_with_inserted_blocks_and_a_reference_learns_the_same_bits(tmp_path: Path) -> None:
    """Bug: rollouts, COPY blocks, reference, updates or evaluations see other features than without."""
    settings: dict[str, Any] = {"objective": ClippedSurrogate(kl=KL()), "epochs_per_step": 1, "steps": 3}
    with_and_without(small_brpo_copy, reflecting_tiny, tmp_path, **settings, data=Digits(size=4))


@pytest.mark.usefixtures("one_by_one")
def test_a_reference_that_follows_learns_the_same_bits(tmp_path: Path) -> None:
    """Bug: after a sync the reference's features are looked up under its old weights."""
    settings: dict[str, Any] = {"reference_sync": ReferenceSync(every=1, mix=0.5), "data": Digits(size=3)}
    with_and_without(small_rl, random_tiny, tmp_path, **settings, steps=3)


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    """Bug: features depend on which images were missing beside an image, and after a resume, with an empty
    memory, these are others."""
    first = small_sft(tmp_path / "cut", policy=frozen(random_tiny(), FeatureCache()), steps=3).run()
    (first.folder / "summary.json").unlink()
    output = {"resume": str(first.folder / "checkpoints" / "step-000002")}
    settings: dict[str, Any] = {"steps": 3, "output": output}
    again = small_sft(tmp_path / "cut", policy=frozen(random_tiny(), FeatureCache()), **settings).run()
    whole = small_sft(tmp_path / "whole", policy=frozen(random_tiny(), FeatureCache()), steps=3).run()
    same_runs(again.folder, whole.folder)


def test_an_image_runs_alone(calls: list[int]) -> None:
    """Bug: unknown images go through the tower together, and their last bits depend on their company."""
    policy = frozen(random_tiny(), FeatureCache())
    one, two, three = pictures(policy)
    policy.features([one, two])
    policy.features([three, one, two])
    assert calls == [1, 1, 1]


# -- the key ----------------------------------------------------------------------------------------


def agreement(policy: QwenVL) -> bool:
    """Whether a cache gives what the tower gives: for images that differ in their pixels alone, in their
    grid alone, and after the tower's weights were loaded anew, written to and replaced."""
    kept = frozen(policy, FeatureCache())
    plain = dataclasses.replace(kept, feature_cache=None)
    one, two, _ = pictures(policy)
    assert one.grid == Grid(1, 4, 4)
    images = [one, two, dataclasses.replace(one, grid=Grid(1, 2, 8))]
    agree = []

    def look() -> None:
        for _ in range(2):
            agree.append(all(torch.equal(kept.features([i]), plain.features([i])) for i in images))

    look()
    other = {name: 1.5 * value for name, value in vision_of(policy.model).state_dict().items()}
    vision_of(policy.model).load_state_dict(other)
    look()
    with torch.no_grad():
        next(vision_of(policy.model).parameters()).mul_(2)
    look()
    for parameter in vision_of(policy.model).parameters():
        parameter.data = 0.5 * parameter.data
    look()
    with torch.no_grad():
        one.pixels.mul_(0.5)  # one of an image that was hashed already
    look()
    return all(agree)


def test_the_same_key_means_the_same_features() -> None:
    """Bug: another image, size or checkpoint gets features that were made before."""
    assert agreement(random_tiny())


def no_grid(self: FeatureCache, image: Patches, tower: str) -> str:
    return REAL_KEY(self, dataclasses.replace(image, grid=Grid(1, 4, 4)), tower)


def no_pixels(self: FeatureCache, image: Patches, tower: str) -> str:
    return REAL_KEY(self, dataclasses.replace(image, pixels=torch.zeros_like(image.pixels)), tower)


def no_weights(self: FeatureCache, image: Patches, tower: str) -> str:  # noqa: ARG001
    return REAL_KEY(self, image, "")


REAL_KEY = FeatureCache._key
MISTAKES = [
    (FeatureCache, "_key", no_grid),
    (FeatureCache, "_key", no_pixels),
    (FeatureCache, "_key", no_weights),
    (feature_cache, "_stamp", lambda tensor: tensor.shape),  # hashed once and never again
    (feature_cache, "_stamp", lambda tensor: tensor.data_ptr()),  # only replaced weights are seen
    (feature_cache, "_stamp", lambda tensor: tensor._version),  # only weights written to are seen
]


@pytest.mark.parametrize(("owner", "name", "wrong"), MISTAKES)
def test_the_comparison_sees_mistakes(
    owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part that a key could lack must show, else the agreement above proves nothing."""
    monkeypatch.setattr(owner, name, wrong)
    assert not agreement(random_tiny())


def test_pixel_limits_are_part_of_the_key(calls: list[int]) -> None:
    """Bug: the same file at another resolution gets the features of the first one."""
    cache, sample = FeatureCache(), Digits(size=1)[0]
    for limit in (None, 32 * 32):
        policy = load_policy(freeze_parts=FROZEN, max_pixels=limit, feature_cache=cache)
        prompt = policy.prompt(sample, Instruction())
        assert len(policy.features(prompt.patches)) == sum(grid.tokens for grid in prompt.grids)
    assert calls == [1, 1]


def test_how_it_computes_is_part_of_the_key(calls: list[int]) -> None:
    """Bug: bfloat16's features are taken for float32's, or those of another attention implementation."""
    cache = FeatureCache()
    policy = frozen(random_tiny(), cache)
    half = dataclasses.replace(policy, compute="bfloat16")
    image = pictures(policy, 1)
    full, coarse = policy.features(image), half.features(image)
    assert full.dtype == coarse.dtype == torch.float32
    assert not torch.equal(full, coarse)
    assert torch.equal(half.features(image), coarse)
    assert torch.equal(coarse, dataclasses.replace(half, feature_cache=None).features(image))
    eager = copy.deepcopy(policy.model)
    vision_of(eager).config._attn_implementation = "eager"
    assert tower_digest(vision_of(eager)) != tower_digest(vision_of(policy.model))
    assert calls == [1, 1, 1]


def test_equal_images_and_equal_towers_share(calls: list[int]) -> None:
    """Bug: the reference, a copy of the frozen policy, or a later epoch, which reads an image anew, runs
    the tower again."""
    policy = frozen(random_tiny(), FeatureCache())
    twin = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    policy.features(pictures(policy))
    assert torch.equal(twin.features(pictures(policy)), policy.features(pictures(policy)))
    assert calls == [1, 1, 1]


# -- when it may be used ----------------------------------------------------------------------------


def test_a_tower_that_trains_is_refused() -> None:
    """Bug: a setting that cannot be honoured is passed over, or stale features are trained on."""
    says = r"feature_cache is set, but \d+ tensors of vision tower and projector train .*Freeze both with"
    for parts in ([], ["vision"], ["projector"], ["language"]):
        with pytest.raises(ValueError, match=says):
            load_policy(freeze_parts=parts, feature_cache=FeatureCache())
    policy = frozen(random_tiny(), FeatureCache())
    policy.features(pictures(policy, 1))
    next(vision_of(policy.model).parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match=says):
        policy.features(pictures(policy, 1))


def test_features_of_rollouts_serve_updates() -> None:
    """Bug: what was made in inference mode cannot be used where a backward pass follows."""
    policy = frozen(random_tiny(), FeatureCache())
    prompt = make_prompt(policy, 0)
    with torch.inference_mode():
        policy.features(prompt.patches)
    batch = policy.batch([(prompt, policy.answer("7"))])
    scores = policy.score(batch, policy.features(batch.images))
    scores.logprobs.sum().backward()
    assert policy.model.lm_head.weight.grad is not None


def test_what_is_given_out_is_a_copy() -> None:
    """Bug: whoever writes into the features he got changes everybody's."""
    policy = frozen(random_tiny(), FeatureCache())
    image = pictures(policy, 1)
    first = policy.features(image)
    first.zero_()
    assert policy.features(image).abs().sum() > 0


def test_settings_are_checked(tmp_path: Path) -> None:
    """Bug: a cache that keeps nothing, or a folder that cannot be written, is found out hours later."""
    with pytest.raises(ValueError, match=r"memory_mb=-1 and disk_mb=16384. Neither may be below 0"):
        FeatureCache(memory_mb=-1)
    with pytest.raises(ValueError, match=r"memory_mb=0 and no folder .* would keep nothing"):
        FeatureCache(memory_mb=0)
    with pytest.raises(ValueError, match=r"would keep nothing"):
        FeatureCache(memory_mb=0, folder=tmp_path, disk_mb=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/inside', which cannot be written: Not a directory. Give a"):
        FeatureCache(folder=tmp_path / "file" / "inside")


def test_it_is_a_key_of_a_recipe() -> None:
    """Bug: a setting that exists in Python only."""
    name = "{_target_: reflectvlm.models.feature_cache.FeatureCache, memory_mb: 8}"
    asked = compose("qwen_la_coldstart", (f"policy.feature_cache={name}",)).values
    draft_of(asked, slow=False)
    assert asked["policy"]["feature_cache"]["memory_mb"] == 8
    assert compose("qwen_la_coldstart").values["policy"]["feature_cache"] is None


# -- how often the tower runs -----------------------------------------------------------------------


def test_a_known_image_never_runs_again(calls: list[int], tmp_path: Path) -> None:
    """Bug: reference, second epoch, evaluation or inserted block runs a frozen tower again."""
    settings: dict[str, Any] = {
        "policy": frozen(reflecting_tiny(), FeatureCache()),
        "data": Digits(size=3),
        "objective": ClippedSurrogate(kl=KL()),
        "reattention": VisualCopy(limit=2, trigger="<REFLECTION>"),
        "evaluation": None,
        "test": None,
        "output": {"checks": False},
    }
    trainer = small_rl(tmp_path, **settings, prompts_per_step=3, updates_per_step=1, epochs_per_step=2)
    trainer.prepare()
    for step in range(3):
        trainer.step(step)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("reference", [False, True])
def test_a_tower_that_trains_runs_once_per_image(reference: bool, calls: list[int], tmp_path: Path) -> None:
    """Bug: the tower runs once for each rollout of a group, or again for every micro-batch.

    3 prompts, 2 updates of 2 and 1 groups gone through twice: one call of 3 images in the rollout, one of
    the reference for each batch, one for each update."""
    trainer = small_rl(
        tmp_path,
        prompts_per_step=3,
        updates_per_step=3,
        epochs_per_step=2,
        objective=ClippedSurrogate(kl=KL() if reference else None),
        optimizer=AdamW(lr=1e-4),
        sampling=SamplingParams(max_tokens=4),
        keep_equal_groups=True,
    )
    trainer.prepare()
    trainer.step(0)
    assert calls == [3, *([1] * 3 if reference else []), *[1] * 6]


# -- what it holds ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(0, 400),
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), max_size=40),
)
def test_memory_is_bounded_and_forgets_the_oldest(limit: int, asked: list[tuple[int, int]]) -> None:
    """Bug: bytes are counted wrongly, and a run of days ends without memory; or the newest leave first."""
    store = MemoryStore(limit)
    order: list[str] = []  # the least recently used first
    sizes: dict[str, int] = {}
    for number, length in asked:
        key = str(number)
        if store.get(key) is None:
            store.put(key, torch.zeros(length))
            if 4 * length > limit:
                assert store.get(key) is None
                continue
            sizes[key] = 4 * length
            order = [k for k in order if k != key] + [key]
            while sum(sizes[k] for k in order) > limit:
                order.pop(0)
        else:
            order = [k for k in order if k != key] + [key]
        assert store.used == sum(sizes[k] for k in order) <= limit
        assert list(store._kept) == order


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.integers(0, 3000),
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 200)), max_size=20),
)
def test_the_folder_is_bounded(limit: int, asked: list[tuple[int, int]], tmp_path_factory: Any) -> None:
    """Bug: files pile up until the disk is full."""
    folder = tmp_path_factory.mktemp("features")
    store = FolderStore(folder, limit)
    for number, length in asked:
        value = torch.arange(length, dtype=torch.float32)
        if (found := store.get(str(number))) is None:
            store.put(str(number), value)
        else:
            assert torch.equal(found, torch.arange(len(found), dtype=torch.float32))
        assert on_disk(folder) <= limit


def test_the_folder_forgets_the_least_recently_used(tmp_path: Path) -> None:
    """Bug: the files used in every epoch are the ones that are deleted."""
    clock = iter(range(1_000_000_000, 2_000_000_000, 1_000_000_000 // 20))
    store = FolderStore(tmp_path, 10**6)
    for key in "abc":
        store.put(key, torch.zeros(100))
        stamp(tmp_path / f"{key}.safetensors", next(clock))
    assert store.get("a") is not None  # its time of use is now
    tight = FolderStore(tmp_path, on_disk(tmp_path))
    tight.put("d", torch.zeros(100))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]


def stamp(path: Path, nanoseconds: int) -> None:
    import os

    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_a_folder_serves_the_next_run(calls: list[int], tmp_path: Path) -> None:
    """Bug: a second process computes all features again, or reads what an earlier tower wrote."""
    kept = [frozen(random_tiny(), FeatureCache(folder=tmp_path)) for _ in range(2)]
    first = kept[0].features(pictures(kept[0]))
    assert torch.equal(kept[1].features(pictures(kept[1])), first)
    assert calls == [1, 1, 1]
    other = frozen(random_tiny(seed=1), FeatureCache(folder=tmp_path))
    assert not torch.equal(other.features(pictures(other)), first)
    assert len(list(tmp_path.iterdir())) == 6


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[-5] ^= 1
    path.write_bytes(bytes(body))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_content(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"something": torch.zeros(3)}, path)


@pytest.mark.parametrize("breaks", [cut, flipped, emptied, other_content])
def test_broken_files_are_made_anew_and_told_once(breaks: Any, tmp_path: Path, caplog: Any) -> None:
    """Bug: half a file, or one of a bad disk, ends the run or is trained on."""
    policy = frozen(random_tiny(), FeatureCache(folder=tmp_path))
    wanted = policy.features(pictures(policy))
    for path in tmp_path.iterdir():
        breaks(path)
    again = frozen(random_tiny(), FeatureCache(folder=tmp_path))
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        assert torch.equal(again.features(pictures(again)), wanted)
    (told,) = caplog.messages
    assert "cannot be used and is made anew" in told
    third = frozen(random_tiny(), FeatureCache(folder=tmp_path, memory_mb=0))
    assert torch.equal(third.features(pictures(third)), wanted)
    assert len(caplog.messages) == 1  # the files are whole again


def test_a_folder_that_refuses_is_told_once(tmp_path: Path, caplog: Any) -> None:
    """Bug: a full disk ends a run that did not need it."""
    policy = frozen(random_tiny(), FeatureCache(folder=tmp_path / "gone"))
    (tmp_path / "gone").rmdir()
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        assert len(policy.features(pictures(policy))) == 48
    (told,) = caplog.messages
    assert "cannot be kept in" in told


def half_written(folder: Path) -> Iterator[Path]:
    return folder.glob(".*.tmp")


def test_a_killed_writer_leaves_no_file_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a process killed while it writes leaves half a file under a good name, or rubbish for ever."""
    store = FolderStore(tmp_path, 10**6)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.put("a", torch.zeros(3))
    (left,) = half_written(tmp_path)
    assert store.get("a") is None
    stamp(left, 0)
    FolderStore(tmp_path, 10**6).put("b", torch.zeros(3))
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_a_plain_value_is_refused() -> None:
    """Bug: `policy.feature_cache=true` ending in a TypeError at the first image."""
    with pytest.raises(ValueError, match=r"feature_cache is True\. It takes FeatureCache, in a recipe"):
        make_policy(feature_cache=True)
