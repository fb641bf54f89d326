"""The LSTM with a fault in its run, which the environment's FAULT names, started through launch/train.py.

FAULT="hangs in a step" python launch/train.py tests/faulty.py:LSTM --preset smoke
"""

import ctypes
import errno
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.base import Updater
from cs324dist.tasks.lstm.task import LSTMTask

FAULT, _, VALUE = os.environ["FAULT"].partition(": ")
RANK = os.environ.get("RANK", "0")


class LSTM(LSTMTask):
    def step(self, step: int, trainer: Updater) -> None:
        if fault := BEFORE_A_STEP.get(FAULT):
            fault(step)
        super().step(step, trainer)
        if FAULT == "diverges" and step >= 9:
            with torch.no_grad():
                self.model.output.weight.mul_(float("inf"))


def hangs(step: int) -> None:
    """For about a minute, in one call, in which no signal handler runs."""
    if step == 2:
        print("in the long step", file=sys.stderr, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 50_000_000)


def dies_beside_a_busy_one(step: int) -> None:
    """Rank 1 dies while rank 0 is busy: the launcher sees it, and sends TERM, every tenth of a second."""
    if step == 2:
        if RANK == "1":
            os._exit(9)
        time.sleep(5)


def waits(step: int) -> None:
    """Before every tenth step, until the folder VALUE has a file of its number, or a signal asks to stop."""
    asked = threading.Event()
    if step and step % 10 == 0:
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        while not (Path(VALUE) / str(step)).exists() and not asked.wait(0.05):
            pass


def waits_in_c(step: int) -> None:
    """Rank 0 waits in C for what never comes, as for NCCL; rank 1 gets the signal VALUE, or waits too."""
    if step == 2:
        if RANK == "1" and VALUE != "waits":
            os.kill(os.getpid(), getattr(signal, VALUE))
        begun = RANK == "0" and dist.all_reduce(torch.zeros(1), async_op=True)
        print("waits in C", file=sys.stderr, flush=True)
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        for _ in range(2):  # which no signal interrupts
            libc.pthread_mutex_lock(mutex)
        assert not begun


BEFORE_A_STEP = {
    "hangs": hangs,
    "dies beside a busy one": dies_beside_a_busy_one,
    "waits": waits,
    "waits in C": waits_in_c,
}


def replaced(owner: Any, name: str, fault: Callable[..., None]) -> None:
    """Call `fault` before a function of the package, with its arguments."""
    honest = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        fault(*arguments)
        return honest(*arguments, **named)

    setattr(owner, name, wrapped)


def read_only_disk(path: object, flags: int = 0, *_: object) -> None:
    """That of the folder VALUE."""
    if str(path).startswith(VALUE) and flags & (os.O_CREAT | os.O_RDWR):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


match FAULT:
    case "another was faster":  # and made the run VALUE, of other options
        replaced(RunDir, "_claim", lambda run: shutil.copytree(VALUE, run.path))
    case "read-only disk":
        replaced(os, "open", read_only_disk)
    case _:
        assert FAULT in (*BEFORE_A_STEP, "diverges"), FAULT
