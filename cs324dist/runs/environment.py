"""What the bits of a result may depend on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def has_gpu() -> bool:
    """Whether there is a GPU, and Accelerate's configuration does not say to leave it alone."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "on")
    return torch.cuda.is_available() and not use_cpu


def environment() -> dict[str, Any]:
    """Versions, commit, device and threads of this process."""
    packages = ("cs324dist", "torch", "accelerate", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if has_gpu() else _processor(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The checkout's commit, `-dirty` if files differ from it; None for an installed package."""
    # which may lie inside a checkout of something else
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """What it answers about the folder of this file; None where it does not."""
    command = ["git", *arguments]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
