"""On which machine and which code a run was made. No environment variable and no remote address: both may
hold secrets."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "reflectvlm",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "flash-attn",
    "hydra-core",
    "math-verify",
    "numpy",
    "pillow",
    "qwen-vl-utils",
    "safetensors",
    "torchvision",
    "trl",
    "vllm",
)


def environment() -> dict[str, Any]:
    """Python, platform, processors, package versions and GPUs; no environment variables."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "devices": [{"name": one.name, "memory_bytes": one.total_memory} for one in properties],
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Revision of the repository around `folder` and whether it has changes; None where unknown."""
    revision = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    return {"revision": revision, "dirty": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
