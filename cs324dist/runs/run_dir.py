"""A run is a folder, and the folder is the truth.

config.json       every setting, package versions, commit, threads, processor
status.json       running | stopped | finished | failed, the step, and why
metrics.jsonl     one JSON object a line
samples/          pictures, named by step
checkpoints/      see `checkpoints`
owners/           see `ownership`
"""

import errno
import itertools
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from cs324dist.errors import UserError, printable
from cs324dist.runs.checkpoints import (
    checkpoints_in,
    keep_newest,
    newest_generation,
    verify_checkpoint,
)
from cs324dist.runs.environment import environment
from cs324dist.runs.files import clear, is_number, parse_json, read_json, replaced, write_json
from cs324dist.runs.lease import Ownership

State = Literal["running", "stopped", "finished", "failed"]
FOLDERS = {"owners", "checkpoints", "samples"}
LARGEST_LINE = 1 << 16  # bytes of a line of metrics; ours are a few hundred


class RunDir:
    """The files of one run; only the process that owns it writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owner: Ownership | None = None
        self._metrics: FileIO | None = None
        self._metrics_lines = 0
        self._unwritten = b""
        self._damaged: dict[Path, UserError] = {}

    def __str__(self) -> str:
        return str(self.path)

    def check_fits(self, task: str, conflicts: Callable[[Mapping[str, Any]], list[str]]) -> None:
        """Find that the folder is new, empty, or a run of `task` whose settings have no `conflicts`.

        Raises:
            UserError: it is something else.
        """
        for name in (*FOLDERS, "wandb", "metrics.jsonl"):
            if name in FOLDERS and (self.path / name).exists() and not (self.path / name).is_dir():
                raise UserError(f"{self.path / name} is no folder: it is damaged, or not of this project")
            if (self.path / name).is_symlink():
                raise UserError(f"{self.path / name} is a link: a run writes nowhere but into its own folder")
        if not self.exists:
            found = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
            if self.path.is_file() or found - FOLDERS - {".config.json.tmp"}:
                raise UserError(
                    f"--run-dir {self} holds something that is no run: give an empty or a new folder"
                )
            return
        stored = self.read_config()
        if not isinstance(stored.get("settings"), dict):
            raise UserError(f"{self.path / 'config.json'} is damaged, or not a file of this project")
        if stored.get("task") != task:
            raise UserError(
                f"--run-dir {self} holds a run of {stored.get('task')!r:.99}: give another folder"
            )
        if lines := conflicts(stored["settings"]):
            raise UserError(*lines)

    def claim(self) -> None:
        """Own the folder, which is made if it is new.

        Raises:
            UserError: a live process owns it, or it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._owner = Ownership(self.path, after=newest_generation(self.checkpoints))
        except OSError as error:
            raise self._unwritable(error) from None

    def release(self, *, unused: bool = False) -> None:
        """Let another process own it; `unused` leaves no trace of this one."""
        if self._metrics is not None:
            self._metrics.close()
        if self._owner is not None:
            self._owner.withdraw() if unused else self._owner.release()
        self._owner = self._metrics = None

    def open(self, task: str, settings: Mapping[str, Any], precision: str = "no") -> None:
        """Own the folder, and write down what is run and by what; a difference to what ran before is said.

        Raises:
            UserError: see `claim`.
        """
        if self._owner is None:
            self.claim()
        stored = self.read_config() if self.exists else {}
        environment = self.environment(precision)
        tracker_id = stored.get("tracker_run_id")
        if not (isinstance(tracker_id, str) and re.fullmatch("[0-9a-f]{8}", tracker_id)):
            tracker_id = secrets.token_hex(4)
        try:
            for folder in FOLDERS:
                (self.path / folder).mkdir(exist_ok=True)
            write_json(
                self.path / "config.json",
                {
                    "task": task,
                    "settings": settings,
                    "tracker_run_id": tracker_id,
                    "environment": environment,
                },
            )
        except OSError as error:
            raise self._unwritable(error) from None

    def environment(self, precision: str) -> dict[str, Any]:
        """What a result's bits may depend on; what differs from what the run was made by so far is said."""
        here = {**environment(), "precision": precision}
        before = self.read_config().get("environment") if self.exists else None
        for name, value in here.items():
            if isinstance(before, dict) and value != before.get(name):
                print(
                    f"warning: {self} was made with {name} {printable(before.get(name))}, now {value}: "
                    f"bits may differ",
                    file=sys.stderr,
                )
        return here

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"--run-dir {self} cannot be written to ({error.strerror}): give a folder that can be"
        )

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "config.json").is_file()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def generation(self) -> int:
        """Which owner this is, counted from 1."""
        return self._owner.generation if self._owner else 1

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of one step."""
        return self.checkpoints / f"{step:09d}"

    def sample(self, step: int) -> Path:
        """The picture of one step."""
        return self.path / "samples" / f"{step:09d}.png"

    def read_config(self) -> dict[str, Any]:
        """Everything in `config.json`."""
        return read_json(self.path / "config.json")

    def check_owned(self) -> None:
        """Find that no other process has taken the folder over; called before anything is written.

        Raises:
            Superseded: one has.
        """
        if self._owner is not None:
            self._owner.check()

    def write_status(self, state: State, step: int, why: str = "") -> None:
        """Say where the run stands: what a batch script reads. If that cannot be written, it is said."""
        self.check_owned()
        try:
            write_json(self.path / "status.json", {"state": state, "step": step, "why": why})
        except OSError as error:
            print(f"warning: {self}/status.json cannot be written: {error.strerror}", file=sys.stderr)

    def finish(self, step: int, keep_last: int) -> None:
        """Say of a run at its last step that it is finished, which a process killed at the end could not."""
        if self._status().get("state") != "finished":
            self.keep_newest(keep_last)
            self.write_status("finished", step)

    def keep_newest(self, count: int) -> None:
        """Delete older checkpoints; one that cannot be deleted is named."""
        try:
            keep_newest(self.checkpoints, count, self.generation)
        except OSError as error:  # somebody reads it over a network file system, perhaps
            print(f"warning: an old checkpoint stays for now: {error}", file=sys.stderr)

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line; `step` is the number of completed steps. What is not finite is written as null.

        Raises:
            OSError: it cannot be written; it will be, together with the next.
        """
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self._unwritten += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._metrics_lines += 1
        self.write_metrics()

    def write_metrics(self, *, sync: bool = False) -> int:
        """Write the lines that are still to be written, to the disk itself with `sync`.

        Returns:
            How many lines there are.

        Raises:
            OSError: it cannot be done; no part of a line is left behind.
        """
        self.check_owned()
        if self._metrics is None:
            self._metrics = FileIO(self.path / "metrics.jsonl", "a")
        size = os.fstat(self._metrics.fileno()).st_size
        try:
            if self._metrics.write(self._unwritten) < len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / "metrics.jsonl"))
        except OSError:
            self._metrics.truncate(size)
            raise
        self._unwritten = b""
        if sync:
            os.fsync(self._metrics.fileno())
        return self._metrics_lines

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows so far; lines that are none, such as one that is just being written, are passed over."""
        return [row for line in self._lines_of_metrics() if (row := _row(line)) is not None]

    def check_metrics(self, lines: int) -> None:
        """Find that the first lines are whole, as far as they are there.

        Raises:
            UserError: one is damaged.
        """
        path = self.path / "metrics.jsonl"
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file")
        for number, line in enumerate(itertools.islice(self._lines_of_metrics(), lines), 1):
            if _row(line) is None:
                raise UserError(
                    f"{path}: line {number} is damaged: mend or delete it, then run the same command again"
                )

    def _lines_of_metrics(self) -> Iterator[bytes]:
        path = self.path / "metrics.jsonl"
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                while (line := file.readline(LARGEST_LINE)).endswith(b"\n") or len(line) == LARGEST_LINE:
                    yield line

    def rewind(self, step: int, metrics_lines: int) -> None:
        """Drop the metrics past the checkpoint of `step`, after which steps are about to be taken again."""
        self.check_owned()
        self.set_damaged_aside()
        last = max((row["step"] for line in self._lines_of_metrics() if (row := _row(line))), default=step)
        first = itertools.islice(self._lines_of_metrics(), metrics_lines)
        kept = [line for line in first if (row := _row(line)) and row["step"] <= step]
        if (lacking := metrics_lines - len(kept)) > 0:
            print(f"warning: {self}/metrics.jsonl lacks {lacking} lines up to step {step}", file=sys.stderr)
        # A new file: an earlier owner that still runs has the old one open, and writes there.
        with replaced(self.path / "metrics.jsonl") as temporary:
            temporary.write_bytes(b"".join(kept))
        if self._metrics is not None:
            self._metrics.close()
        self._metrics_lines, self._unwritten, self._metrics = len(kept), b"", None
        if self._owner is not None:
            self._owner.note(step, max(last - step, 0))
        self.write_status("running", step)

    def newest(self) -> Path | None:
        """The newest checkpoint, valid or not."""
        return next(iter(checkpoints_in(self.checkpoints)), None)

    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        newest = self.newest()
        return int(newest.name) if newest else 0

    def newest_checkpoint(self) -> Path | None:
        """The newest valid checkpoint; None for a run that has none yet.

        Raises:
            UserError: there are checkpoints, and all of them are damaged, or there were some.
        """
        damaged = self._damaged = {}
        for folder in checkpoints_in(self.checkpoints):
            try:
                verify_checkpoint(folder)
            except UserError as error:
                damaged[folder] = error
            else:
                return folder
        if damaged or self._saved_step():
            raise UserError(
                *(str(refusal) for refusal in damaged.values()),
                f"no checkpoint of {self} can be used: bring one back, or give another --run-dir",
            )
        return None

    def _saved_step(self) -> int:
        step = self._status().get("step")
        return step if type(step) is int else 0

    def _status(self) -> dict[str, Any]:
        try:
            return read_json(self.path / "status.json")
        except UserError:
            return {}

    def set_damaged_aside(self) -> None:
        """Name the damaged checkpoints that `newest_checkpoint` came upon, and move them out of the way."""
        for path, refusal in self._damaged.items():
            aside = path.with_name(f"damaged-{path.name}")
            clear(aside)
            path.rename(aside)
            print(f"warning: {refusal}; moved to {aside}, going back to the one before", file=sys.stderr)
        self._damaged = {}


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError):
        return None
    well_formed = (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(value is None or is_number(value) for value in row.values())
    )
    return row if well_formed else None
