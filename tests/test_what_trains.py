"""The table at the start of a run: what trains, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapting import TAGS, lora_tiny
from reflectvlm.models.lora import LoRA
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.train.optim import AdamW
from reflectvlm.train.what_trains import Memory, memory_by_part, what_trains
from training import small_sft

PARTS: Any = ("vision", "projector")
EMBEDDING = 2432 * 128
"""Numbers of the tiny model's one matrix with a row per token."""


def table(policy: QwenVL, **settings: Any) -> dict[str, Memory]:
    return memory_by_part(policy.model, AdamW(**settings))


def test_plain() -> None:
    """Bug: moments forgotten, or tied matrices counted twice. Four bytes a number; two moments."""
    policy = load_policy("tiny")
    found = table(policy)
    assert list(found) == ["vision", "projector", "language"]
    numbers = sum(p.numel() for p in policy.module.parameters())
    assert sum(row.parameters for row in found.values()) == numbers
    for row in found.values():
        assert row.trained == row.parameters
        assert (row.weights, row.gradients, row.optimizer) == tuple(k * row.parameters for k in (4, 4, 8))


def test_frozen_parts() -> None:
    """Bug: a frozen tower is said to take gradients and moments."""
    found = table(load_policy("tiny", freeze_parts=PARTS))
    for part in PARTS:
        assert found[part].weights == 4 * found[part].parameters > 0
        assert found[part].trained == found[part].gradients == found[part].optimizer == 0
    assert found["language"].gradients == 4 * found["language"].parameters


def test_new_tags() -> None:
    """Bug: two rows are said to take 2 kB, while gradient and moments of the whole matrix are held."""
    policy = load_policy("tiny", new_tags=TAGS, embeddings="new_tags", freeze_parts=PARTS)
    row = table(policy)["language"]
    assert row.trained == row.parameters - EMBEDDING + 2 * 128
    assert (row.gradients, row.optimizer) == (4 * row.parameters, 8 * row.parameters)


def test_lora() -> None:
    """Bug: adapters drown among the base's numbers, or count as frozen."""
    policy = lora_tiny(LoRA(rank=4, vision="all"), dtype="bfloat16", compute="bfloat16")
    found = table(policy)
    assert list(found) == ["vision", "projector", "language", "vision adapters", "language adapters"]
    # Per layer: q and o 128 to 128, k and v to 64, gate and up to 384, down back; rank times both ends.
    by_hand = 4 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))
    row = found["language adapters"]
    assert row == Memory(
        parameters=by_hand,
        trained=by_hand,
        dtypes=("float32",),
        weights=4 * by_hand,
        gradients=4 * by_hand,
        optimizer=8 * by_hand,
    )
    assert found["language"].trained == found["language"].gradients == 0
    assert found["language"].weights == 2 * found["language"].parameters
    assert found["language"].dtypes == ("bfloat16",)


def test_moments_in_8_bits() -> None:
    """Bug: small tensors, whose moments stay in 32 bits, and scales of blocks left out."""
    adamw = AdamW(bits=8)
    # 5120 numbers are 20 blocks of 256, each with a scale of 4 bytes, for each of two moments.
    assert adamw.state_bytes(torch.zeros(5120)) == 2 * (5120 + 20 * 4)
    assert adamw.state_bytes(torch.zeros(4095)) == 2 * 4 * 4095
    assert AdamW().state_bytes(torch.zeros(10, dtype=torch.bfloat16)) == 2 * 2 * 10


def test_a_quantised_base() -> None:
    """Bug: packed numbers counted as numbers, or their scales left out. nf4 takes half a byte a number, a
    byte for each block of 64, and four bytes for 256 of those."""
    pytest.importorskip("bitsandbytes", reason="quantised bases come with the extra bitsandbytes")
    layer = lora_tiny(quantize="nf4").model.model.language_model.layers[0].mlp.up_proj.base_layer
    from reflectvlm.models.quantized import stored_bytes

    blocks = 384 * 128 // 64
    assert stored_bytes(layer.weight) == 384 * 128 // 2 + blocks + 4 * blocks // 256
    found = table(lora_tiny(quantize="nf4"))["language"]
    assert found.dtypes == ("4-bit", "float32")
    assert found.parameters == table(load_policy("tiny"))["language"].parameters


def test_it_reads_as_a_table() -> None:
    """Bug: a row that does not say what it counts."""
    text = what_trains(lora_tiny(LoRA(rank=4)).model, AdamW()).markdown
    lines = text.splitlines()
    assert lines[0] == "### what trains, AdamW with moments in 32 bits (MiB)"
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[4:]}
    assert cells["language adapters"] == ["38,912", "38,912", "float32", "0.1", "0.1", "0.3"]
    assert cells["language"][1:3] == ["0", "float32"]
    assert list(cells)[-1] == "all"
    assert len({len(line) for line in lines[2:]}) == 1  # aligned


def test_a_run_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a freeze switch that does nothing is seen by nobody."""
    small_sft(
        tmp_path, policy=load_policy("tiny", freeze_parts=PARTS), steps=1, output={"checks": False}
    ).run()
    printed = capsys.readouterr().out
    assert "what trains, AdamW with moments in 32 bits" in printed
    assert "| projector" in printed
