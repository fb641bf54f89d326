"""Starts of a training command, each a fork of a process that has imported torch and trained before."""

import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import IO

from accelerate.state import AcceleratorState

import cs324dist
from cs324dist import base_run
from cs324dist.runs import lease
from cs324dist.tasks.lstm import palindromes

LIMIT = 120  # seconds for one start; on a quiet machine it takes a tenth of one
PR_SET_PDEATHSIG = 1
HANGS, STOPPED = "hangs", "stopped"
Action = IntEnum(
    "Action",
    "WATCH STOP STOP_AT_CHANGES TERMINATE FAIL_ONCE FAIL_FROM NO_SPACE_FROM LOSE_FSYNC KILL",
    start=0,
)
library = ctypes.CDLL(os.environ["LD_PRELOAD"])
library.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]


@dataclass(frozen=True)
class Operation:
    """One operation of a start on the run folder."""

    number: int
    kind: str
    name: str
    path: str

    @staticmethod
    def read(line: str) -> "Operation":
        number, *words = line.rstrip("\n").split(" ", 3)
        return Operation(int(number), *words)

    def __str__(self) -> str:
        return f"k={self.number} {self.name} {self.path}"


@dataclass(frozen=True)
class Command:
    """What is started."""

    task: str
    options: Sequence[str]

    def run(self, folder: Path) -> int:
        """Train in this process; returns the exit code."""
        sys.argv = ["train.py", *self.options, "--run-dir", str(folder)]
        try:
            cs324dist.main(self.task, None)
        except SystemExit as end:
            return end.code or 0
        return 0


class Start:
    """A start; at operation `at` of it, `action` happens."""

    def __init__(
        self,
        command: Command,
        folder: Path,
        action: Action = Action.WATCH,
        at: int = 0,
        error: int = 0,
        *,
        prepare: Callable[[], None] = lambda: None,
        restart: int | None = None,
    ) -> None:
        self._said, self._report = (os.fdopen(os.memfd_create(name), "rb", 0) for name in ("said", "report"))
        self.code: int | str
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # frozen, it would live for ever
            code = 1
            try:
                for stream in (1, 2):
                    os.dup2(self._said.fileno(), stream)
                if restart is not None:
                    os.environ.update(SLURM_JOB_ID="42", SLURM_RESTART_COUNT=str(restart))
                prepare()
                library.arm(str(folder).encode(), at, action, error, self._report.fileno())
                code = command.run(folder)
            except BaseException:
                traceback.print_exc()
            finally:
                library.disarm()
                sys.stdout.flush()
                os._exit(code)

    def wait(self) -> "Start":
        """Until it ends or stops: `code` is its exit code, minus the signal that killed it, or a word."""
        signal.alarm(LIMIT)
        try:
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            self.code = STOPPED if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        except TimeoutError:
            self.kill()
            self.code = HANGS
        finally:
            signal.alarm(0)
        return self

    def go_on(self) -> "Start":
        """Wake it if it has stopped, and wait as before."""
        if self.code != STOPPED:
            return self
        os.kill(self.pid, signal.SIGCONT)
        return self.wait()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    @property
    def said(self) -> list[str]:
        return _read(self._said).splitlines()

    @property
    def operations(self) -> list[Operation]:
        return [Operation.read(line) for line in _read(self._report).splitlines()]


def _read(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _too_late(*_: object) -> None:
    raise TimeoutError


def prepare_to_fork(commands: Sequence[Command], folder: Path) -> None:
    """Do once what would take each start most of its time, and make it wait for nothing."""
    signal.signal(signal.SIGALRM, _too_late)
    lease.HEARTBEAT, lease.SILENCE, lease.PATIENCE = 1, 0.5, 0.5
    palindromes.DIGITS_AT_ONCE = 2000  # an evaluation of two parts, which can be interrupted
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.001))
    known = base_run.environment()  # asks git three times
    base_run.environment = lambda processes, precision, compiled, commit=True: replace(
        known, processes=processes, precision=precision, compiled=compiled
    )
    for command in commands:
        with tempfile.TemporaryFile("w+b") as said:
            silent = os.dup(2)
            os.dup2(said.fileno(), 2)
            try:
                code = command.run(folder / "first")
            finally:
                os.dup2(silent, 2)
            if code != 0:
                said.seek(0)
                sys.exit(f"{command.task}: ended with {code}: {said.read().decode()}")
        shutil.rmtree(folder / "first")
        AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    gc.freeze()
