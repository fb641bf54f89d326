"""The environment that bitwise results depend on."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["no", "fp16", "bf16", "fp8"]  # Accelerate's names
VARIABLES = (  # that bits may depend on
    "PYTHONHASHSEED", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
)  # fmt: skip
ALL_BUT_RESULTS = (":(top,exclude)benchmarks/results", ":(top,exclude)docs")  # in Git's notation


def has_gpu() -> bool:
    """Whether there is a GPU that Accelerate's configuration does not leave unused."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "on")
    return torch.cuda.is_available() and not use_cpu


@dataclass(frozen=True)
class Environment:
    """Versions, hardware and how it was used."""

    python: str
    packages: dict[str, str]
    """Versions of the packages that compute."""

    commit: str | None
    """The checkout's commit, with `-dirty` if files that a run may depend on differ from it; None for an
    installed package."""

    device: str
    """Name of the GPU, or of the processor and its vector instructions."""

    cuda: str | None
    """Versions of CUDA and cuDNN; None on a CPU."""

    threads: int
    processes: int
    precision: Precision
    compiled: str | None
    """The backend of torch.compile; None if the models are not compiled."""

    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables that bits may depend on, as far as they are set."""


def environment(
    processes: int = 1, precision: Precision = "no", compiled: str | None = None, *, commit: bool = True
) -> Environment:
    """The environment of this process; `commit`: with the checkout's, which takes a while."""
    packages = ("cs324dist", "torch", "accelerate", "safetensors", "numpy")
    gpu = has_gpu()
    return Environment(
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in packages},
        commit=_commit() if commit else None,
        device=torch.cuda.get_device_name() if gpu else processor(),
        cuda=f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if gpu else None,
        threads=torch.get_num_threads(),
        processes=processes,
        precision=precision,
        compiled=compiled,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _commit() -> str | None:
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):  # another project's checkout
        return None
    commit = _git("rev-parse", "HEAD")
    changed = _git("diff", "--name-only", "HEAD", "--", *ALL_BUT_RESULTS)
    return f"{commit}-dirty" if commit and changed else commit


def _git(*arguments: str) -> str | None:
    """Git's answer about the folder of this file; None if it has none."""
    command = ["git", *arguments]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def processor() -> str:
    """The name of the processor, and the vector instructions it offers: a virtual machine hides some."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    instructions = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        instructions += ", AMX"
    return f"{next(names, platform.processor() or platform.machine())} ({instructions})"
