"""AdamW with moments in 8 bits, on bitsandbytes' own kernels for a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reflectvlm.train.optim import AdamW
from reflectvlm.train.packing import optimizer_from_tensors, optimizer_to_tensors
from reflectvlm.train.rl import RLTrainer
from test_lora_runs import AUTO, rl
from training import crashed, same_runs, small_sft


def test_bitsandbytes_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: moments in 32 bits, without a word, where 8 were asked for."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"bits=8 needs bitsandbytes, .*\[bitsandbytes\]`, or set optimizer\.b"
    ):
        AdamW(bits=8).build([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"AdamW\.bits is 16\. It must be 32 or 8"):
        AdamW(bits=16)  # type: ignore[arg-type]


def test_a_device_that_has_no_such_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: found out after the first rollouts, by a message about a missing operator."""
    library = eight()

    def step(self: Any) -> None:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(library.optim.AdamW8bit, "step", step)
    with pytest.raises(
        ValueError, match=r"cannot take a step on 'cpu': no kernel for this device\. Set optim"
    ):
        AdamW(bits=8).build([nn.Parameter(torch.zeros(3))])


def eight() -> Any:
    return pytest.importorskip("bitsandbytes", reason="8-bit moments come with the extra bitsandbytes")


def steps(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], first: int, last: int
) -> list[Tensor]:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def fresh() -> list[nn.Parameter]:
    """One whose moments are in 8 bits, one too small for it."""
    return [nn.Parameter(torch.ones(64, 80)), nn.Parameter(torch.ones(7))]


def test_it_walks_with_adamw() -> None:
    """Bug: Adam's decay in the gradient, other betas, another rate: all are more than 8 bits' rounding."""
    eight()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": [0.8, 0.95], "weight_decay": 0.3}
    ends = []
    for bits in (32, 8):
        weights = fresh()
        ends.append(steps(AdamW(bits=bits, **settings).build(weights), weights, 0, 20))  # type: ignore[arg-type]
    assert torch.allclose(ends[0][1], ends[1][1], atol=1e-6)
    walked = (ends[0][0] - 1).abs().mean()
    assert 0 < (ends[0][0] - ends[1][0]).abs().mean() < 0.05 * walked


def test_its_state_survives_a_checkpoint_exactly() -> None:
    """Bug: moments that come back as numbers of another dtype, or steps that count from 0."""
    eight()
    adamw = AdamW(lr=1e-2, bits=8)
    whole = fresh()
    wanted = steps(adamw.build(whole), whole, 0, 6)
    weights = fresh()
    first = adamw.build(weights)
    steps(first, weights, 0, 3)
    packed = optimizer_to_tensors(first.state_dict())
    second = adamw.build(weights)
    second.load_state_dict(optimizer_from_tensors(packed.tensors, packed.json))
    found = steps(second, weights, 3, 6)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_its_memory_is_what_the_table_says() -> None:
    """Bug: a plan by rule of thumb."""
    eight()
    for bits in (32, 8):
        adamw, weights = AdamW(bits=bits), fresh()  # type: ignore[arg-type]
        optimizer = adamw.build(weights)
        steps(optimizer, weights, 0, 1)
        for weight in weights:
            held = [
                tensor for name, tensor in optimizer.state[weight].items() if isinstance(tensor, Tensor)
                and not name.startswith("qmap") and name != "step"
            ]  # fmt: skip
            assert adamw.state_bytes(weight) == sum(one.numel() * one.element_size() for one in held)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_a_resumed_run_is_the_unbroken_one(lora: bool, tmp_path: Path) -> None:
    """Bug: 8-bit moments are lost or rounded once more by a save."""
    eight()

    def make(root: Path, **output: Any) -> Any:
        if lora:
            return rl(root, optimizer=AdamW(lr=1e-3, bits=8), output=output)
        return small_sft(root, optimizer=AdamW(lr=1e-3, bits=8), output={"checks": False} | output)

    whole = make(tmp_path / "whole").run().folder
    trainer = make(tmp_path / "cut")
    crashed(trainer, type(trainer), "step", 4)
    same_runs(make(tmp_path / "cut", **AUTO).run().folder, whole)


def test_other_bits_than_the_checkpoint_s_are_refused(tmp_path: Path) -> None:
    """Bug: a resume that dies at its first step, or begins with moments of 0."""
    eight()
    crashed(rl(tmp_path, optimizer=AdamW(bits=8)), RLTrainer, "step", 4)
    with pytest.raises(
        ValueError, match=r"optimizer\.bits 8 → 32|moments have 8 bits, and optimizer\.bits is 32"
    ):
        rl(tmp_path, optimizer=AdamW(), output=AUTO).run()
