"""The SLURM example, run to its last line with programs that only say how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sbatch"
# What each stands in for: srun runs the command once per node; a launcher prints its arguments, one a line.
STUBS = {
    "scontrol": '[ "$1 $2 $3" = "show hostnames $SLURM_JOB_NODELIST" ] && printf "node-a\\nnode-b\\n"',
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
    'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    **dict.fromkeys(
        ("reflectvlm", "torchrun", "accelerate", "deepspeed"), 'echo "== ${0##*/}"; printf "%s\\n" "$@"'
    ),
}
MEETING = {"address": "node-a", "port": str(20_000 + 4_212_345 % 10_000)}


def run(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "4212345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command, here = ["bash", str(SCRIPT), *words], {**given, **environment}
    return subprocess.run(
        command, env=here, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )


def calls(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The launcher and its arguments, for each node."""
    assert done.returncode == 0, done.stderr
    return [part.strip().split("\n") for part in done.stdout.split("== ") if part]


def test_it_is_a_script() -> None:
    """Bug: an example that no shell can read."""
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    settings = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"} <= set(settings)


def test_one_launcher_per_node(tmp_path: Path) -> None:
    """Bug: both nodes call themselves the first one and wait for each other; or a text with a blank in
    it, as in a path, becomes two words."""
    found = calls(run(tmp_path, "recipe=grpo", "data.path=/shared/my rows.jsonl"))
    common = ["reflectvlm", "train", "recipe=grpo", "data.path=/shared/my rows.jsonl", "resume=auto"]
    meeting = [f"main_address={MEETING['address']}", f"main_port={MEETING['port']}"]
    assert found == [[*common, "gpus=4", "nodes=2", f"node_rank={node}", *meeting] for node in (0, 1)]


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        (
            "torchrun",
            "--nnodes=2 --nproc-per-node=4 --node-rank={node} --master-addr={address} --master-port={port} "
            "-m",
        ),
        (
            "accelerate",
            "launch --multi_gpu --num_machines=2 --num_processes=8 --machine_rank={node} "
            "--main_process_ip={address} --main_process_port={port} -m",
        ),
        (
            "deepspeed",
            "--no_ssh --hostfile={here}/hostfile-4212345 --node_rank={node} --master_addr={address} "
            "--master_port={port} --no_local_rank --module",
        ),
    ],
)
def test_other_launchers_start_processes_that_join(tmp_path: Path, launcher: str, settings: str) -> None:
    """Bug: nodes, processes and ranks differ from one launcher to the next; or `gpus=` starts processes
    under those that were started already."""
    found = calls(run(tmp_path, "recipe=grpo", LAUNCHER=launcher))
    for node, call in enumerate(found):
        words = settings.format(node=node, here=tmp_path, **MEETING).split()
        assert call == [launcher, *words, "reflectvlm", "train", "recipe=grpo", "resume=auto"]
    assert len(found) == 2
    if launcher == "deepspeed":
        assert (tmp_path / "hostfile-4212345").read_text() == "node-a slots=4\nnode-b slots=4\n"


def test_launchers_have_these_settings() -> None:
    """Bug: a launcher renames an option, and only a cluster finds out."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    torchrun = [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--node-rank=1",
        "--master-addr=a",
        "--master-port=7",
        "-m",
    ]
    made = get_args_parser().parse_args([*torchrun, "reflectvlm", "train", "recipe=grpo"])
    assert (made.node_rank, made.master_addr, made.module) == (1, "a", True)
    assert made.training_script_args == ["train", "recipe=grpo"]
    machines = [
        "--multi_gpu",
        "--num_machines=2",
        "--num_processes=8",
        "--machine_rank=1",
        "--main_process_ip=a",
        "-m",
    ]
    made = launch_command_parser().parse_args(
        [*machines, "--main_process_port=7", "reflectvlm", "train", "recipe=grpo"]
    )
    assert (made.machine_rank, made.main_process_ip, made.main_process_port) == (1, "a", 7)
    assert made.training_script_args == ["train", "recipe=grpo"]


def test_deepspeed_has_these_settings() -> None:
    pytest.importorskip("deepspeed", reason="an extra")
    from deepspeed.launcher.runner import parse_args

    meeting = ["--no_ssh", "--hostfile=h", "--node_rank=1", "--master_addr=a", "--master_port=7"]
    made = parse_args([*meeting, "--no_local_rank", "--module", "reflectvlm", "train", "recipe=grpo"])
    assert (made.no_ssh, made.node_rank, made.master_addr, made.module) == (True, 1, "a", True)
    assert made.user_args == ["train", "recipe=grpo"]


def test_an_unknown_launcher_is_named(tmp_path: Path) -> None:
    """Bug: a misspelt launcher does nothing, and the job ends as if it had trained."""
    done = run(tmp_path, "recipe=grpo", LAUNCHER="torchrum")
    assert done.returncode != 0
    assert "LAUNCHER is torchrum. It must be reflectvlm, torchrun, accelerate or deepspeed." in done.stderr
