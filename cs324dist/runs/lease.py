"""One owner a run: who may write into a run folder.

owners/2.json    the second process that ran it: host, process id, Slurm job, since when, from which step, and
                 whether it has ended
owners/2.lock    locked while it lives

Each owner has a generation and writes under it: its checkpoints carry it and replace none of a later one, and
its metrics go to a file that the next owner replaces. Readers take the highest. So an owner that was cut off
from the network and still runs can replace nothing that its successor wrote, however late it wakes up.
"""

import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cs324dist.errors import UserError, printable
from cs324dist.runs.checkpoints import LARGEST_GENERATION
from cs324dist.runs.files import clear, read_json, sync, write_json

PATIENCE = 10  # seconds that a new owner waits for one on its way out
HEARTBEAT = 5  # seconds from one sign of life to the next
SILENCE = 20  # seconds without a sign of life after which an owner on another machine counts as dead
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Superseded(UserError):
    """Another process owns the run by now."""


class Ownership:
    """The right to write into a run folder, held by one process."""

    def __init__(self, run: Path, after: int = 0) -> None:
        """Take it, with a generation later than `after`.

        Raises:
            UserError: a live process has it.
            OSError: the folder cannot be written to.
        """
        self._folder = run / "owners"
        self._is_first = not self._folder.exists()
        self._folder.mkdir(exist_ok=True)
        before = newest_generation(self._folder)
        if before >= LARGEST_GENERATION:
            raise UserError(f"{self._folder / f'{before}.json'} is no owner of this run: delete it")
        if after >= LARGEST_GENERATION:
            raise UserError(f"{run}/checkpoints holds one that no owner of this run wrote: delete it")
        if before:
            _wait_for_the_end_of(self._folder, before, run)
        last_sign = _last_sign(self._folder / f"{before}.json")
        self.generation = max(before, after) + 1
        self._path = self._folder / f"{self.generation}.json"
        self._lock = FileLock(self._path.with_suffix(".lock"))
        try:
            self._lock.acquire(blocking=False)
            with self._path.open("x"):
                pass
        except (Timeout, FileExistsError):
            raise UserError(f"{run} was just taken by another process: wait for it, or stop it") from None
        self._facts = _this_process()
        now = _last_sign(self._path)  # by the clock of the file system, as the other one
        if last_sign and now:
            self._facts["seconds_since_previous"] = round(max(now - last_sign, 0.0), 1)
        write_json(self._path, self._facts)
        sync(self._folder)
        for lock in self._folder.glob("*.lock"):
            if lock.name != f"{self.generation}.lock":
                lock.unlink(missing_ok=True)
        for left_behind in self._folder.glob(".*.json.tmp"):
            if left_behind.name != f".{self.generation}.json.tmp":
                clear(left_behind)
        self._released = threading.Event()
        threading.Thread(target=self._give_signs_of_life, daemon=True).start()

    def check(self) -> None:
        """Find that no other process has taken the run since.

        Raises:
            Superseded: one has.
        """
        newest = newest_generation(self._folder)
        if newest > self.generation:
            owner = _read(self._folder / f"{newest}.json")
            raise Superseded(
                f"{self._folder.parent} was taken over by {_name(owner)}: this process writes nothing more"
            )

    def note(self, from_step: int, lost_steps: int) -> None:
        """Write down where this process begins, and how many steps, of those logged, it has to take again."""
        self._facts |= {"from_step": from_step, "lost_steps": lost_steps}
        with suppress(OSError):  # on a full disk, the run is worth more than its story
            write_json(self._path, self._facts)

    def release(self) -> None:
        """Let another process have it."""
        self._released.set()
        with suppress(OSError, Superseded):
            self.check()
            write_json(self._path, {**self._facts, "ended": True})
        self._lock.release()

    def withdraw(self) -> None:
        """Release it as if it had never been taken: for a process that has written nothing."""
        self.release()
        for path in (self._path, self._path.with_suffix(".lock")):
            path.unlink(missing_ok=True)
        if self._is_first:
            self._folder.rmdir()

    def _give_signs_of_life(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self._path)


def newest_generation(owners: Path) -> int:
    """The number of the last owner; 0 without one."""
    files = [path for path in owners.glob("*.json") if path.is_file() and not path.is_symlink()]
    found = (re.fullmatch(r"([1-9][0-9]{0,8})\.json", path.name) for path in files)
    return max((int(match[1]) for match in found if match), default=0)


def _wait_for_the_end_of(owners: Path, generation: int, run: Path) -> None:
    path = owners / f"{generation}.json"
    owner, me = _read(path), _this_process()
    in_use = UserError(f"{run} is in use by {_name(owner)}: wait for it, stop it, or give another --run-dir")
    if _is_earlier_start_of(owner, me):
        return  # Slurm has ended it, or cut it off
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{run} is in use by {_name(owner)}; waiting {PATIENCE} s for its end", file=sys.stderr)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise in_use from None
    lock.release()
    if owner.get("machine") == me["machine"] or owner.get("ended") is True:
        return
    # Locks may not reach from one machine to another, and clocks may differ: watch for a sign of life.
    print(f"{run} was left by {_name(owner)}; until_stopped it for {SILENCE} s", file=sys.stderr)
    seen, until = _touched(path), time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(HEARTBEAT / 5)
        if _touched(path) != seen:
            raise in_use


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": BOOT.read_text().strip() if BOOT.exists() else socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _is_earlier_start_of(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    job, restarts = owner.get("slurm_job"), owner.get("slurm_restarts")
    return job is not None and job == me["slurm_job"] and restarts in range(me["slurm_restarts"])


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError:
        return {}


def _last_sign(owner: Path) -> float | None:
    try:
        return owner.stat().st_mtime
    except OSError:
        return None


def _touched(path: Path) -> int:
    with path.open() as file:  # opened, as network file systems look anew only then
        return os.fstat(file.fileno()).st_mtime_ns


def _name(owner: dict[str, Any]) -> str:
    job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    return printable(f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}")
