"""Several processes equal one: weights, moments, metrics, checkpoints; the parts that make it so."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranks_run import main
from reflectvlm.models.qwen_vl import load_policy

HERE = Path(__file__).parent
TRAINERS = ("sft", "grpo", "brpo", "lora")
KINDS = ("ddp", "zero1", "zero2", "zero3") if find_spec("deepspeed") else ("ddp",)


def processes(count: int, *words: str, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """`python ranks_run.py WORDS` in several processes, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks_run.py"), *words],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(count),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "REFLECTVLM_CPU": "1",
                "REFLECTVLM_TIMEOUT": "4",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    told = [one.communicate(timeout=timeout)[0] for one in started]
    return [
        subprocess.CompletedProcess(one.args, one.returncode, text)
        for one, text in zip(started, told, strict=True)
    ]


def run_in(count: int, folder: Path, runs: Sequence[str]) -> None:
    for rank, done in enumerate(processes(count, str(folder), *runs)):
        assert done.returncode == 0, f"rank {rank}: {done.stdout[-3000:]}"


def checkpoint(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return max((run / "checkpoints").glob("step-*"))


def differences(one: Path, other: Path, part: str) -> float:
    mine, theirs = (load_file(checkpoint(folder) / f"{part}.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine)


def metrics(folder: Path) -> list[dict[str, float]]:
    (run,) = folder.iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of every trainer."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    try:
        assert main(str(folder), *(f"{trainer}:single" for trainer in TRAINERS)) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of it, under every setting."""
    folder = tmp_path_factory.mktemp("together")
    run_in(2, folder, [f"{trainer}:{kind}" for kind in KINDS for trainer in TRAINERS])
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_equal_one(trainer: str, kind: str, alone: Path, together: Path) -> None:
    """Bug: means of means, gradients averaged instead of added, rollouts drawn with other random numbers, a
    tower that only one process runs. One of the two has only rows without images, and fewer passes. Weights
    that are copied to cpu:0, where DeepSpeed does not know them."""
    mine, theirs = alone / f"{trainer}-single", together / f"{trainer}-{kind}"
    assert differences(mine, theirs, "model") < 1e-6
    assert differences(mine, theirs, "optimizer") < 1e-6
    for one, other in zip(metrics(mine), metrics(theirs), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


@pytest.mark.timeout(300)
def test_mistakes_are_seen(tmp_path: Path, alone: Path) -> None:
    """Bug: a comparison of two processes with one that would also find equal what is not."""
    runs = ["averaged:grpo:ddp", "own_counts:sft:ddp", "own_places:grpo:ddp"]
    runs += ["unopened:sft:zero3"] if len(KINDS) > 1 else []
    run_in(2, tmp_path, runs)
    for run in runs:
        mutation, trainer, kind = run.split(":")
        found = differences(alone / f"{trainer}-single", tmp_path / mutation / f"{trainer}-{kind}", "model")
        assert found > 1e-5, run


@pytest.mark.timeout(300)
def test_a_run_goes_on_with_another_setting_and_another_number(tmp_path: Path, alone: Path) -> None:
    """Bug: a checkpoint that fits only the setting and the number of processes that wrote it; weights that
    the number of processes does not divide, for whose last share DeepSpeed's own setter has no room."""
    chain = (
        [(2, "zero3"), (3, "zero3"), (3, "zero1")] if len(KINDS) > 1 else [(2, "ddp"), (3, "ddp"), (2, "ddp")]
    )
    resume = ""
    for steps, (count, kind) in enumerate(chain, start=1):
        run_in(count, tmp_path, [f"grpo:{kind}:steps={steps}:save_every=1{resume}"])
        (folder,) = tmp_path.glob(f"grpo-{chain[0][1]}/*")
        resume = f":resume={folder}"
    assert differences(alone / "grpo-single", folder.parent, "model") < 1e-6
    assert differences(alone / "grpo-single", folder.parent, "optimizer") < 1e-6


needs_deepspeed = pytest.mark.skipif(len(KINDS) == 1, reason="deepspeed is not installed (extra: deepspeed)")


@needs_deepspeed
@pytest.mark.timeout(300)
def test_moments_in_host_memory(tmp_path: Path, alone: Path) -> None:
    """Bug: gradients lost on the way to the host's memory, where only the last pass of an update arrived."""
    run_in(2, tmp_path, ["sft:zero2:offload=1"])
    assert differences(alone / "sft-single", tmp_path / "sft-zero2", "model") < 1e-6


@needs_deepspeed
@pytest.mark.timeout(300)
def test_one_process_that_nobody_launched(tmp_path: Path, alone: Path) -> None:
    """Bug: DeepSpeed asks MPI who it is, where one GPU with offload is all that is wanted."""
    words = [sys.executable, str(HERE / "ranks_run.py"), str(tmp_path), "sft:zero2:offload=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run(words, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(alone / "sft-single", tmp_path / "sft-zero2", "model") < 1e-6


@needs_deepspeed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["zero1", "zero2"])
def test_bfloat16_weights_have_float32_ones_beside_their_moments(tmp_path: Path, kind: str) -> None:
    """Bug: steps of 1e-6 on weights that are too coarse for them, so that nothing is ever learned; or weights
    of the checkpoint that are the coarse ones; or a stage that has another kind of optimiser for them."""
    run_in(2, tmp_path, [f"half:{kind}:steps=2"])
    kept = load_file(checkpoint(tmp_path / f"half-{kind}") / "model.safetensors")
    coarse = load_policy("tiny", dtype="bfloat16").model.state_dict()
    for name, parameter in coarse.items():
        moved = (kept[name].double() - parameter.double()).abs().max()
        assert kept[name].dtype == torch.float32
        assert 0 < moved < 3e-6, name
