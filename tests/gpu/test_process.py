"""What a process settles before it uses a GPU, looked at where there is none."""

import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from launched import refusal

from cs324dist.distributed import gradients, parts, process
from cs324dist.distributed.failures import translate_errors
from cs324dist.errors import RunFailed, UserError

SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class Reached(Exception):
    """What follows needs a GPU."""


@pytest.fixture
def one_gpu(monkeypatch):
    """Start up to where Accelerate takes the GPU."""

    def reached(**_):
        raise Reached

    monkeypatch.setattr(process, "has_gpu", lambda: True)
    monkeypatch.setattr(process, "Accelerator", reached)
    monkeypatch.setattr(process, "prepare_process", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    return monkeypatch


@pytest.fixture
def determinism(monkeypatch):
    """Leaves the process as it was."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "unset")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_gpu_is_not_seen_by_tests_of_the_cpu(launch):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert launch("-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))").stdout == "''\n"


def test_more_processes_than_gpus_are_refused_in_one_line(one_gpu):
    with pytest.raises(Reached):
        process.start_accelerator()
    one_gpu.setenv("LOCAL_WORLD_SIZE", "2")
    one_gpu.setenv("TORCHELASTIC_RUN_ID", "none")
    line = refusal(process.start_accelerator)
    assert line.startswith("2 processes on a machine with 1 GPUs: give --num_processes 1")


def test_each_task_may_be_shown_one_gpu_of_its_own(one_gpu):
    """Accelerate takes the local rank modulo the devices (1.15, state.py:843)."""
    one_gpu.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(Reached):
        process.start_accelerator()
    one_gpu.setattr(torch.cuda, "device_count", lambda: 2)
    one_gpu.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError):
        process.start_accelerator()


@pytest.mark.parametrize(
    ("batch_size", "processes", "cores", "lines"),
    [
        (256, 8, 16, []),
        (None, 8, 16, []),
        (64, 1, 2, []),
        (64, 8, 16, ["each GPU gets 8 samples a step: give a larger --batch-size, or start fewer processes"]),
        (256, 8, 15, ["warning: 15 cores for 8 GPUs, which wait for Python: give 2 for each"]),
    ],
)
def test_what_keeps_gpus_idle_is_said_at_the_start(one_gpu, capsys, batch_size, processes, cores, lines):
    made = Mock(spec=Accelerator, mixed_precision="no", is_main_process=True, num_processes=processes)
    one_gpu.setattr(process, "Accelerator", lambda **_: made)
    one_gpu.setattr(process, "_cores", lambda: cores)
    one_gpu.setattr(torch.cuda, "device_count", lambda: processes)
    one_gpu.setenv("LOCAL_WORLD_SIZE", str(processes))
    one_gpu.setenv("WORLD_SIZE", str(processes))
    one_gpu.setenv("TORCHELASTIC_RUN_ID", "none")
    process.start_accelerator(batch_size)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True))


def test_a_group_over_gloo_may_share_a_gpu(one_gpu):
    one_gpu.setenv("LOCAL_WORLD_SIZE", "2")
    one_gpu.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(Reached):
        process.start_accelerator()


def test_two_ranks_on_one_gpu_are_wrapped_for_the_gpu_that_they_have(monkeypatch):
    """Accelerate puts local rank 1 on cuda:0 there."""
    places = []
    monkeypatch.setattr(gradients, "_wrapped", lambda losses, place: places.append(place))
    device = torch.device("cuda", 0)
    rank = Mock(spec=Accelerator, scaler=None, num_processes=2, local_process_index=1, device=device)
    monkeypatch.setattr(parts, "rank_and_processes", lambda: (1, 2))
    gradients.DDPGradients(0, rank).wrap([(torch.nn.Linear(1, 1),)])
    assert places == [[device]]


@pytest.mark.parametrize("micro_batches", [None, 2])
def test_micro_batches_make_a_gpu_deterministic(one_gpu, determinism, micro_batches):
    with pytest.raises(Reached):
        process.start_accelerator(micro_batches=micro_batches)
    asked = micro_batches is not None
    assert ({name: os.environ[name] for name in SETTINGS} == SETTINGS) == asked
    assert torch.are_deterministic_algorithms_enabled() == asked
    assert torch.utils.deterministic.fill_uninitialized_memory != asked


def test_no_collective_of_ours_adds_numbers_up_over_nccl():
    """So NCCL_ALGO and NVLS decide no bit; DDP's own sums promise none."""
    package = Path(process.__file__).parents[1]
    adds = re.compile(r"\ball_reduce\(|\breduce\(|\breduce_scatter|\.SUM\b")
    found = {path.name for path in package.rglob("*.py") if adds.search(path.read_text())}
    assert found == {"stop.py"}  # a maximum, over gloo


@pytest.mark.parametrize(("emulated", "precision", "warned"), [
    (True, "bf16", True), (True, "fp16", False), (False, "bf16", False),
])  # fmt: skip
def test_emulated_bf16_is_warned_about(one_gpu, capsys, emulated, precision, warned):
    made = Mock(spec=Accelerator, mixed_precision=precision, is_main_process=True, num_processes=1)
    one_gpu.setattr(process, "Accelerator", lambda **_: made)
    one_gpu.setenv("ACCELERATE_MIXED_PRECISION", precision)
    one_gpu.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    process.start_accelerator()
    assert ("warning: this GPU emulates bf16" in capsys.readouterr().err) == warned


def test_an_operation_without_a_deterministic_kernel_is_one_line():
    said = "kthvalue CUDA does not have a deterministic implementation, but you set 'torch.use_determin…"
    with pytest.raises(RunFailed) as failed, translate_errors(peer_timeout=1):
        raise RuntimeError(said)  # as torch's alertNotDeterministic does
    (line,) = failed.value.lines
    assert line.startswith("kthvalue CUDA does not have a deterministic implementation on this device, and")


MEMORY, ENDED = "out of memory: lower the batch size", "another process of the run has ended"
ABORTED = "NCCL communicator was aborted on rank 1. "
TIMEOUT = f"{ABORTED} Original reason for failure was: Watchdog caught collective operation timeout: Work"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        # torch 2.13: aten/src/ATen/cuda/CUDABlas.cpp, _cublasGetErrorEnum, and cudnn/Exceptions.h
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", MEMORY),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", MEMORY),
        # NCCL: src/init.cc, ncclGetErrorString; torch: c10d/NCCLUtils.cpp, NCCLComm::getNcclComm
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2", ENDED),
        (ABORTED, ENDED),
        (TIMEOUT, "another process did not answer within 1 s (--peer-timeout)"),
    ],
)
def test_what_the_libraries_of_a_gpu_say_is_one_line(monkeypatch, said, line):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(RunFailed) as failed, translate_errors(peer_timeout=1):
        raise RuntimeError(said)
    assert failed.value.lines[0].startswith(line)
