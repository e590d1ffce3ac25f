"""The model of memory: shares of processes by hand, passes and cache against the code that makes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.batch import Layout
from reflectvlm.planning import Adapter, Compute, Job, Load, ModelShape, Training, peak, predict
from reflectvlm.planning.cards import CARDS, GIB, card
from reflectvlm.planning.known import KNOWN
from reflectvlm.planning.passes import largest_pass, number_of_passes
from reflectvlm.planning.rollout_memory import cache, per_column
from reflectvlm.planning.seconds import seconds
from reflectvlm.planning.states import counts, held, moments, reference, weights
from reflectvlm.planning.verdict import CHANGES, fullest, remedy
from reflectvlm.rollout.cache import SlotCache
from reflectvlm.train.budget import passes

SEVEN = KNOWN["qwen2.5-vl-7b"]
N = 8_292_166_656


def job(shape: ModelShape = SEVEN, **changes: Any) -> Job:
    """7B, all of it training in bfloat16 on one GPU, a group of 8 answers to 1,024 visual tokens."""
    load = {"prompt": 1100, "visual": 1024, "answer": 512, "group": 8, "prompts": 8}
    training: dict[str, Any] = {"weights": "bfloat16"}
    for name, value in changes.items():
        if name in {field.name for field in dataclasses.fields(Load)}:
            load[name] = value
        elif name in {field.name for field in dataclasses.fields(Training)}:
            training[name] = value
    return Job(
        shape=shape,
        training=Training(**training),
        load=Load(**load),  # type: ignore[arg-type]
        compute=changes.get("compute", Compute()),
    )


def gb(value: float) -> float:
    return round(value / N, 4)


# -- what is held -------------------------------------------------------------------------------------


def test_bytes_of_a_parameter() -> None:
    """Bug: moments in float32 beside bfloat16 weights, which AdamW keeps in the weights' dtype; or none of
    the division. Bytes of one parameter, N = 8.3e9 of them, on 4 GPUs:

        single, float32     4 + 4 + 8
        single, bfloat16    2 + 2 + 4
        zero1, bfloat16     2 + 4 (added up in float32) + 12 / 4
        zero2               2 + 4 / 4 + 12 / 4
        zero3               2 / 4 + 4 / 4 + 12 / 4
    """

    def three(**changes: Any) -> tuple[float, float, float]:
        found = held(job(**changes))
        return gb(found.weights), gb(found.gradients), gb(found.optimiser)

    def spread(kind: Any, **more: Any) -> Compute:
        return Compute(kind=kind, world=4, **more)

    assert three(weights="float32") == (4, 4, 8)
    assert three() == (2, 2, 4)
    assert three(compute=spread("ddp")) == (2, 2, 4)
    assert three(compute=spread("zero1")) == (2, 4, 3)
    assert three(compute=spread("zero2")) == (2, 1, 3)
    assert three(compute=spread("zero3")) == (0.5, 1, 3)
    assert three(compute=spread("zero2", offload_optimizer=True)) == (2, 1, 0)
    all_away = job(compute=spread("zero3", offload_optimizer=True, offload_parameters=True))
    assert gb(held(all_away).weights) == 0
    assert gb(held(all_away).offloaded) == 3.5


def test_eight_bits() -> None:
    """Bug: the setting changes nothing. Two moments of 1 byte, and 4 bytes a block of 256: 2.03 bytes."""
    assert gb(moments(job(moments=8))) == 2.0312


def test_what_is_frozen_has_no_gradient() -> None:
    """Bug: frozen parts are counted as training, or with `embeddings=new_tags` the whole matrix is not."""
    found = counts(job(frozen=frozenset({"vision", "projector"}), rows_only=True))
    assert found.trained["vision"] == found.trained["projector"] == 0
    assert found.trains == N - SEVEN.vision.tower - SEVEN.vision.merger
    rows = counts(job(frozen=frozenset({"vision", "projector", "language"}), rows_only=True))
    assert rows.trains == 2 * SEVEN.text.embedding


def test_adapters() -> None:
    """Bug: LoRA's size from the width alone. 7B, rank 16, by hand: q and o 2 x (3584 + 3584), k and v
    2 x (3584 + 512), the MLP 3 x (3584 + 18944): 90,112 numbers a rank and layer; x 16 x 28 = 40,370,176.
    A base in 4 bits has 0.52 bytes for each of the 6.5e9 numbers in its layers' matrices."""
    found = job(adapter=Adapter(rank=16))
    assert counts(found).adapter == counts(found).trains == 40_370_176
    assert (
        reference(dataclasses.replace(found, training=dataclasses.replace(found.training, reference=True)))
        == 0
    )
    quantised = job(adapter=Adapter(rank=16, bits=4))
    saved = weights(found) - weights(quantised)
    assert saved == pytest.approx(SEVEN.text.linear * (2 - 0.52))


def test_wrong_settings() -> None:
    """Bug: settings that cannot be are planned for."""
    with pytest.raises(ValueError, match="compute is single, and gpus is 2"):
        Compute(world=2)
    with pytest.raises(ValueError, match="Take zero1, zero2 or zero3"):
        Compute(kind="ddp", world=2, offload_optimizer=True)
    with pytest.raises(ValueError, match=r"optimizer and compute\.offload_parameters: .* Take zero3, or"):
        Compute(kind="ddp", world=2, offload_optimizer=True, offload_parameters=True)  # one error, not two
    with pytest.raises(ValueError, match="Take zero3"):
        Compute(kind="zero2", world=2, offload_parameters=True)
    with pytest.raises(ValueError, match=r"compute\.kind is 'zero4'"):
        Compute(kind="zero4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot hold 5 visual ones"):
        Load(prompt=4, answer=1, visual=5)
    with pytest.raises(ValueError, match="micro_tokens is 0"):
        Load(prompt=4, answer=1, micro_tokens=0)
    with pytest.raises(ValueError, match="rank is 0"):
        Adapter(rank=0)
    with pytest.raises(ValueError, match="3 bits"):
        Adapter(bits=3)


# -- passes and cache ---------------------------------------------------------------------------------


@given(
    prompt=st.integers(1, 40),
    answer=st.integers(1, 20),
    group=st.integers(1, 6),
    prompts=st.integers(1, 6),
    tokens=st.integers(1, 400),
)
def test_passes_are_the_updates(prompt: int, answer: int, group: int, prompts: int, tokens: int) -> None:
    """Bug: the planner packs rows otherwise than the updater does, and the activations are those of a pass
    that never runs."""
    rows = prompts * group
    layout = Layout(
        start=np.zeros(rows, dtype=np.int64),
        length=np.full(rows, prompt + answer),
        prompt=np.repeat(np.arange(prompts), group),
        prompt_tokens=np.full(rows, prompt),
    )
    real = passes(layout, tokens, share_prefix=True)
    planned = job(prompt=prompt, visual=0, answer=answer, group=group, prompts=prompts, micro_tokens=tokens)
    one = largest_pass(planned)

    def size(which: torch.Tensor) -> int:
        shared = len(set(layout.prompt[which.numpy()].tolist()))
        return shared * prompt + len(which) * answer

    largest = max(map(size, real))
    if group % one.answers == 0:
        assert one.tokens == largest
        assert number_of_passes(planned) == len(real)
    else:  # the last parts of groups are smaller, and may fill a pass of theirs better
        assert largest <= max(one.tokens, tokens)


def test_cache_is_the_engines() -> None:
    """Bug: the cache's bytes by a formula that forgets a head or a layer. A real one, of the tiny policy."""
    shape = job().shape.text
    planned = job(prompt=100, visual=0, answer=20, group=1, prompts=4, weights="float32", gpu=False)
    store = SlotCache(torch.device("cpu"))
    rows = store.add_rows(4)
    for count in (100, *[1] * 20):
        store.extend(None, torch.full((4,), count))
        new = torch.zeros(4, shape.kv_heads, count, shape.head)
        store.update(new, new, 0)
        store.commit(None, torch.full((4,), count))
    assert len(rows) == 4
    layer = sum(one.nbytes for one in store._layers[0])
    grown = cache(planned) - 4 * 100 / shape.layers * per_column(planned)  # the old one of a layer that grows
    assert grown == shape.layers * layer


def test_zero3_gathers_for_the_rollout() -> None:
    """Bug: the weights that a rollout needs whole are forgotten, and zero3 seems to fit any model."""
    spread = job(compute=Compute(kind="zero3", world=64), bare=True)
    rollout, update = (
        max(sum(m.parts.get(p, 0) for p in ("weights", "gathered weights")) for m in found)
        for found in (
            [m for m in predict(spread) if m.phase == "rollout"],
            [m for m in predict(spread) if m.phase == "update"],
        )
    )
    assert gb(rollout) == pytest.approx(2 + 2 / 64, abs=1e-3)
    assert update < rollout / 4  # a billion parameters at most


# -- cards, seconds, verdict ----------------------------------------------------------------------------


def test_cards() -> None:
    """Bug: a card that nobody knows is planned as another; gigabytes taken for gibibytes."""
    assert card("80GB").memory == 80e9
    assert card("24GiB").memory == 24 * GIB
    assert card("a100-80gb") is card("A100 80GB") is CARDS["a100-80gb"]
    assert card("80GB").assumed
    with pytest.raises(ValueError, match=r"gpu is 'h2000'.*Did you mean H200"):
        card("h2000")
    with pytest.raises(ValueError, match="gpu is '0GB'"):
        card("0GB")


def test_a_decoding_step_reads_weights_and_caches() -> None:
    """Bug: decoding timed by operations. Two rows on an H200 read 7.07e9 weights of 2 bytes at 0.6 of
    4.8 TB/s: 4.9 ms a token, 512 of them 2.5 s; their cache, 2 x 1,356 tokens of 57 KB, is 1 % of that."""
    one = job(group=2, prompts=1, max_rows=2)
    found = seconds(one, CARDS["h200"]).rollout
    alone = (SEVEN.text.linear + SEVEN.text.embedding) * 2 / (0.6 * 4.8e12) * 512
    assert alone < found < 1.1 * alone


def test_checkpointing_trades_memory_for_time() -> None:
    """Bug: the setting is not looked at."""
    plain, again = job(), job(checkpointing=True)
    assert fullest(again).total < fullest(plain).total
    assert seconds(again, CARDS["h100"]).update > 1.2 * seconds(plain, CARDS["h100"]).update


def test_every_remedy_fits() -> None:
    """Bug: a setting is advised under which it still does not fit, or which makes it larger."""
    needs = peak(predict(job())).total
    for memory in (0.95 * needs, 0.6 * needs, 0.35 * needs):
        found = remedy(job(), memory)
        assert found is not None
        assert found.peak.total == fullest(found.job).total <= memory
    assert remedy(job(), 1e9) is None


def test_the_mildest_remedy_comes_first() -> None:
    """Bug: more GPUs are advised where checkpointing would do."""
    plain = job()
    target = fullest(job(checkpointing=True)).total
    found = remedy(plain, target * 1.001)
    assert found is not None
    assert found.settings == ("policy.gradient_checkpointing=true",)


@pytest.mark.parametrize("world", [1, 8])
def test_no_change_repeats_a_setting(world: int) -> None:
    """Bug: a change to what the job has already, which is advised and helps nothing."""
    kind = "ddp" if world > 1 else "single"
    plain = job(weights="float32", products="bfloat16", compute=Compute(kind=kind, world=world))  # type: ignore[arg-type]
    for change in CHANGES:
        for settings, changed in change(plain):
            assert settings
            assert changed != plain
