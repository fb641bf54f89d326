"""What a training process sets up once: the processor, the process group, Accelerate."""

import atexit
import contextlib
import ctypes
import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from cs324dist import PARENT
from cs324dist.distributed.checks import differences, gather_objects
from cs324dist.distributed.launcher import (
    asked_precision,
    check_environment,
    check_gpus,
    check_launcher,
    choose_interface,
    nodes_used,
)
from cs324dist.errors import (
    RANK,
    WORLD_SIZE,
    ReportedError,
    RunFailed,
    UserError,
    say,
    show_errors_as_lines,
    warn,
)
from cs324dist.runs.environment import Environment, Precision, has_gpu, processor

Answer = TypeVar("Answer")
FEW_SAMPLES = 32  # samples for which launching kernels takes longer than computing (believed, not measured)


def start_accelerator(
    batch_size: int | None = None,
    micro_batches: int | None = None,
    peer_timeout: int = 600,
    precision: Precision | None = None,
    preferred: Precision = "no",
) -> Accelerator:
    """Join the process group that the launcher described, or run alone.

    Args:
        batch_size: of the global batch, which the processes share; None if there is none.
        micro_batches: its equal parts; None for one per process.
        peer_timeout: seconds after which a collective fails.
        precision: that of the run; None: the one that the launcher was asked for, or else `preferred`.
        preferred: taken if this device has it.

    Raises:
        UserError: fp16 on a CPU, more processes than GPUs or fewer than the launcher or Slurm was asked for,
            a batch that they cannot share equally, or something asked of the launcher that would be ignored.
    """
    on_gpu = has_gpu()
    check_environment()
    if on_gpu and not dist.is_initialized():  # over NCCL; another group may share a GPU
        check_gpus(torch.cuda.device_count())
    if on_gpu and micro_batches:
        make_deterministic()
    prepare_process(on_cpu=not on_gpu, one_core=micro_batches is not None)
    asked = precision or asked_precision()
    if not on_gpu and asked == "fp16":
        raise UserError("fp16 would silently run as float32 on a CPU: give --precision bf16, or no")
    # The vote to stop, over gloo, must time out first: NCCL's watchdog would abort without a word.
    timeout = timedelta(seconds=peer_timeout + (60 if on_gpu else 0))
    choose_interface()
    rejoin_after_restart("nccl" if on_gpu else "gloo", timeout)
    possible = ("bf16", "fp16") if on_gpu else ("bf16",)
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision=asked or (preferred if preferred in possible else "no"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    if asked == "bf16" and accelerator.is_main_process and not _has_bf16(on_gpu):
        what, other = ("GPU", "fp16") if on_gpu else ("processor", "no")
        warn(f"this {what} emulates bf16, which is slow: give --precision {other}")
    world_size = accelerator.num_processes
    if on_gpu and accelerator.is_main_process:
        _say_what_keeps_gpus_idle(batch_size, world_size)
    check_launcher(world_size, accelerator.is_main_process)
    check_batch(batch_size, micro_batches, world_size)
    if micro_batches and accelerator.mixed_precision == "fp16":
        raise UserError("--micro-batches would depend on fp16's loss scaling: give --precision bf16")
    return accelerator


def compare_environments(made_in: Environment, *, exact: bool) -> None:
    """Compare what bits depend on between the processes: with `exact`, they may not differ.

    Raises:
        UserError: they do.
    """
    lines = differences(gather_objects(vars(made_in), "at the start"))
    if lines and exact:
        raise UserError(*(f"{line}: with --micro-batches, give all processes the same" for line in lines))
    for line in lines if RANK == "0" else ():
        warn(f"{line}: a step then depends on which process computes what")


def compiled_by(accelerator: Accelerator) -> str | None:
    """The backend of torch.compile that the launcher was asked for."""
    backend: str = accelerator.state.dynamo_plugin.backend.value
    return None if backend == "NO" else backend.lower()


def check_batch(batch_size: int | None, micro_batches: int | None, processes: int) -> None:
    """Refuse a batch that the processes cannot share equally."""
    parts = micro_batches or processes
    title = "--micro-batches" if micro_batches else "the number of processes"
    if batch_size is not None and batch_size % parts:
        raise UserError(
            f"--batch-size {batch_size} is not divisible by {title}, {parts}: "
            f"give a multiple, such as {-(-batch_size // parts) * parts}, or another number of parts"
        )
    if parts < processes:
        raise UserError(f"--micro-batches {parts} is less than {processes} processes: give at least as many")


def _has_bf16(on_gpu: bool) -> bool:
    """Whether there are instructions for bf16."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def is_faster_in_bf16() -> bool:
    """Whether bf16 is faster than float32 here; see docs/performance.md. Several CPU machines may differ."""
    if has_gpu():
        return _has_bf16(on_gpu=True)
    fast = torch.cpu._is_amx_tile_supported() or "AMD" in processor()
    return nodes_used() == 1 and _has_bf16(on_gpu=False) and fast


def rejoin_after_restart(backend: str, timeout: timedelta) -> None:
    """Form the process group under a name of its own, if `--max_restarts` has restarted the workers.

    The launcher's store still has the addresses of the dead processes, and half of the restarts fail (pytorch
    #135712). A new store needs no new name, and launchers may have counted different restarts.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, world_size = next(rendezvous("env://"))
        store = dist.PrefixStore(f"restart {restarts}", store)
        dist.init_process_group(backend, timeout=timeout, world_size=world_size, rank=rank, store=store)


def prepare_process(
    on_cpu: bool, *, one_core: bool = False, flush_denormal: bool = True, keep_memory: bool = True
) -> None:
    """Settings that must precede the first tensor operation; see docs/performance.md."""
    # A long backward pass makes denormal numbers, ten times slower; threads started earlier would keep them.
    torch.set_flush_denormal(flush_denormal)
    if on_cpu:
        torch.set_num_threads(threads := 1 if one_core else _threads())
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or Accelerate sets a number of its own
    else:
        torch.set_float32_matmul_precision("high")  # TF32, as torch's convolutions have it anyway
        # It would have the LSTM's weights copied once, and not in every call: they are small.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
    if keep_memory:
        keep_large_memory()
    end_with_the_launcher()


def end_with_the_launcher() -> None:
    """Have this process asked to stop when its launcher is killed, which would leave it running."""
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform == "linux" and launched:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if _launcher_has_died():  # before this was set
            os.kill(os.getpid(), signal.SIGTERM)


def accelerator_of_script(
    given: Accelerator | None, micro_batches: int | None = None, peer_timeout: int = 600
) -> Accelerator:
    """The accelerator of a script with a loop of its own: the one given, the one there is, or a new one.

    Its errors for the user become lines and exit codes. At its end it leaves the process group: gloo's
    threads abort a process that does not (pytorch #179291).

    Raises:
        UserError: the launcher started several processes, and it is one's alone.
    """
    show_errors_as_lines()
    end_with_the_launcher()
    atexit.register(_leave_groups)
    if given is None and not AcceleratorState._shared_state:
        accelerator = start_accelerator(None, micro_batches, peer_timeout)
        show_errors_as_lines()  # around the hook that torch sets with the process group
        return accelerator
    accelerator = given or Accelerator()
    if accelerator.num_processes < WORLD_SIZE:
        raise UserError(
            f"{WORLD_SIZE} processes were started, and the Accelerator lets each train alone: without GPUs, "
            f"write Accelerator(cpu=True)"
        )
    return accelerator


def _leave_groups() -> None:
    """At the end of Python, destroy the process groups, and what holds them."""
    for held in gc.get_objects():
        if type(held) is DistributedDataParallel:
            vars(held).clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def make_deterministic() -> None:
    """Have GPUs compute the same bits every time, by other kernels; NCCL moves numbers only, and adds none.

    Call it before CUDA starts. An operation for which torch has no such kernel raises: with `warn_only`, the
    backward pass of attention would stay as it is (torch 2.13, attention_backward.cu).
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which picks kernels by their speed
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # none is read


def keep_large_memory() -> None:
    """Keep large tensors' memory in the process, instead of giving it back to the kernel at every step."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no mallopt
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc = ctypes.CDLL(None)
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, 1 << 30)


def _launcher_has_died() -> bool:
    if os.getppid() != PARENT:
        return True
    try:
        parent = psutil.Process(PARENT)
        # The launcher may have died before Python started, and an init process adopted this one. In a
        # container the launcher itself can be process 1.
        adopted_by_first = PARENT == 1 and parent.exe() != psutil.Process().exe()
        return adopted_by_first or parent.name() == "systemd"
    except psutil.Error:  # of another user
        return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say_idle_cores(parts: int) -> None:
    """Say how many processes would use the cores of this machine, if there are fewer."""
    most, processes = min(parts, _cores()), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes < most and "CS324DIST_THREADS" not in os.environ and not has_gpu():
        say(
            f"with micro-batches, a process uses one core: {processes} of {_cores()} are used. "
            f"For the same result sooner: torchrun --nproc_per_node {most} …"
        )


def _say_what_keeps_gpus_idle(batch_size: int | None, processes: int) -> None:
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if _cores() < 2 * shared:
        warn(f"{_cores()} cores for {shared} GPUs, which wait for Python: give 2 for each (--cpus-per-gpu 2)")
    if batch_size and processes > 1 and (samples := batch_size // processes) < FEW_SAMPLES:
        say(f"each GPU gets {samples} samples a step: give a larger --batch-size, or start fewer processes")


def _threads() -> int:
    """CS324DIST_THREADS, or this process's share of the cores.

    OMP_NUM_THREADS cannot be asked: a launcher sets it to 1 where the user said nothing.
    """
    cores = _cores()
    if asked := os.environ.get("CS324DIST_THREADS"):
        if not re.fullmatch("0*[1-9][0-9]{0,3}", asked, re.ASCII):
            raise UserError(f"CS324DIST_THREADS={asked} is not allowed: give a whole number from 1 to 9999")
        if int(asked) > cores and RANK == "0":
            warn(f"CS324DIST_THREADS={asked} is more than the {cores} cores: steps take many times longer")
        return int(asked)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def on_main_process(accelerator: Accelerator, work: Callable[[], Answer]) -> Answer:
    """Have the main process do `work`; every process gets its answer, or the error that it raised."""
    answer: Answer | None = None
    error: ReportedError | None = None
    if accelerator.is_main_process:
        try:
            answer = work()
        except ReportedError as raised:
            error = raised
        except OSError as raised:
            error = RunFailed(f"{raised.filename or 'a file'}: {raised.strerror}")
    if accelerator.num_processes > 1:
        answer, error = broadcast_object_list([answer, error])
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]
