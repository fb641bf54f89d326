"""A run that a test has started, reads line by line, and sends signals to."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Queue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from chaos import newest, processes_of
from torch.nn import Module

from cs324dist.errors import ReportedError, UserError

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "cs324dist"
LIMIT = 120  # seconds that anything may take; on a quiet machine it is one or two
LAUNCHERS = {
    "python": (),
    "torchrun with two": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate with one": (
        *("-m", "accelerate.commands.launch"),
        *("--config_file", "accelerate_configs/cpu.yaml"),
    ),
    "accelerate with two": (
        *("-m", "accelerate.commands.launch"),
        *("--config_file", "accelerate_configs/cpu_ddp.yaml"),
    ),
}


class Launched:
    """A started command with `--run-dir`; leaving the context ends what is left of it."""

    def __init__(
        self, command, run: Path, environment: dict[str, str], launcher: str = "python", **options: object
    ) -> None:
        self.run, self.said = run, ""
        self._lines: Queue[str | None] = Queue()
        self.process = subprocess.Popen(
            [sys.executable, *LAUNCHERS[launcher], *command, "--run-dir", str(run)],
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.send_signal = self.process.send_signal
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put(None)

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        for process in processes_of(self.run):
            process.kill()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    def lines(self) -> Iterator[str]:
        """What it says on stderr, as it says it."""
        while (line := self._lines.get(timeout=LIMIT)) is not None:
            self.said += line
            yield line
        self._lines.put(None)  # it has ended for whoever asks again, too

    def wait_for_line(self, beginning: str) -> None:
        for line in self.lines():
            if line.startswith(beginning):
                return
        raise AssertionError(f"it ended without the line {beginning!r}:\n{self.said}")

    def workers(self) -> list[psutil.Process]:
        """The processes that train, rank 0 first."""
        found = [process for process in processes_of(self.run) if "RANK" in process.environ()]
        return sorted(found, key=lambda process: int(process.environ()["RANK"]))

    def wait_until_importing(self, workers: int = 1) -> None:
        """Wait until the processes that will train load torch, seconds before they are ready."""
        wait_until(lambda: len(self._importing()) >= workers)

    def _importing(self) -> list[int]:
        launched = self.process.args[1:2] == ["-m"]
        found = [p.pid for p in processes_of(self.run) if not launched or p.pid != self.process.pid]
        return [pid for pid in found if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]

    def end(self) -> int:
        """Wait for the end of the command and of all its processes; returns the command's exit code."""
        code = self.process.wait(LIMIT)
        wait_until(lambda: not processes_of(self.run))
        for _ in self.lines():
            pass
        return code


def python(*words: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run Python in a process of its own, with options of `subprocess.run`."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def refusal(
    work: Callable[..., object], *arguments: object, kind: type[ReportedError] = UserError, **named: object
) -> str:
    """The one line in which a call is refused."""
    with pytest.raises(kind) as caught:
        work(*arguments, **named)
    (line,) = caught.value.lines
    return line


def wait_until(what: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < until, f"not within {LIMIT} s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def newest_checkpoint(run: Path) -> Path:
    return newest(run)


def trainer(run: Path) -> dict:
    return json.loads((newest_checkpoint(run) / "trainer.json").read_text())


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def mend(checkpoint: Path, **changes: object) -> None:
    """Make the digests right again after a change, as one who wants to hide it would."""
    path = checkpoint / "trainer.json"
    content = {**json.loads(path.read_text()), **changes}
    content.pop("own_sha256")
    for name in content["sha256"]:
        with suppress(OSError, ValueError):
            content["sha256"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "own_sha256": own}))


def holding(**networks: Module) -> SimpleNamespace:
    """What a checkpoint is written of: networks, and nothing else."""
    return SimpleNamespace(networks=networks, optimizers={}, state_dict=dict, load_state_dict=dict)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and os.access(path, os.R_OK)
    }
