"""One owner per run: who may write into a run folder.

owners/2.json         the second process that ran it, where, with which options, and from which step
owners/2-NONCE.lock   locked while it lives

Each owner has a number, its generation: a fencing token. The names of its checkpoints have it. Its metrics go
to a file that the next owner replaces. Every other file is written under a temporary name, and renamed after
`check_owned`. A new owner claims the run, then removes the temporary files of earlier owners. So an earlier
owner that still runs cannot replace what a later one wrote: it finds that it was superseded, or its temporary
file is gone.
"""

import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import StringConstraints

from cs324dist.errors import UserError, printable, say
from cs324dist.runs.checkpoints import Number
from cs324dist.runs.environment import Environment
from cs324dist.runs.files import clear, matches, read_record, sync, write_record

PATIENCE = 10  # seconds that a new owner waits for one that is about to end
HEARTBEAT = 5  # seconds between heartbeats: the file of the owner gets a new time
POLL = 0.1  # seconds between looks at a lock
SILENCE = 20  # seconds without a heartbeat after which an owner on another machine counts as dead
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """A process that ran it."""

    host: str
    machine: str
    """Id of this boot of the machine."""

    pid: int
    nonce: Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]
    """Tells it from an owner of the same number in another folder of this name."""

    since: str
    slurm_job: str | None = None
    slurm_restarts: int = 0
    seconds_since_previous: Annotated[float, Interval(ge=0, le=1e15)] | None = None
    """From the last heartbeat of the owner before."""

    from_step: Number | None = None
    """The step that it went on from."""

    lost_steps: Number | None = None
    """Steps past that one which had been logged, and are taken again."""

    environment: Environment | None = None
    config: dict[str, Any] | None = None
    """Its options: those that may change along a run are as they were for its steps."""

    ended: bool = False
    """Whether it has let the run go."""

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return printable(f"process {self.pid} on {self.host}{job}, since {self.since}")


class Superseded(UserError):
    """Another process owns the run by now."""


class Lease:
    """The right to write into a run folder, held by one process."""

    def __init__(self, run: Path, after: int = 0) -> None:
        """Take it, with a generation later than `after`.

        Raises:
            UserError: a live process has it.
            OSError: the folder cannot be written to.
        """
        self._run, self._folder = run, run / "owners"
        self._is_first = not self._folder.exists()
        before = newest_generation(self._folder)
        if before:
            _wait_for_the_end_of(before, run)
        self._folder.mkdir(parents=True, exist_ok=True)  # a withdrawing owner may have removed the folder
        last_heartbeat = _last_heartbeat(self._folder / f"{before}.json")
        self.generation = max(before, after) + 1
        self._path = self._folder / f"{self.generation}.json"
        self._owner = this_process()
        self._lock_path = _lock_of(self._path, self._owner.nonce)
        try:
            self._claim()
        except (FileExistsError, FileNotFoundError):  # the folder has gone with an owner that withdrew
            raise UserError(f"{run} was just taken by another process: wait for it, or stop it") from None
        if last_heartbeat and (now := _last_heartbeat(self._path)):
            self.note(seconds_since_previous=round(max(now - last_heartbeat, 0) / 1e9, 1))
        sync(self._folder)
        for left in matches(self._folder, r"\.*([1-9][0-9]*)\W.*\.(lock|tmp)"):
            if int(left[1]) <= self.generation and self._owner.nonce not in left[0]:
                clear(self._folder / left[0])
        self._released = threading.Event()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def _claim(self) -> None:
        """Create the file of this owner, whole, unless there is one."""
        draft = self._folder / f".{self.generation}-{self._owner.nonce}.tmp"
        self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _try_to_lock(self._lock)
            write_record(draft, self._owner)
            try:
                os.link(draft, self._path)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                with self._path.open("x"):  # a file system without hard links
                    draft.replace(self._path)
        except BaseException:
            self._unlock()
            raise
        finally:
            clear(draft)

    def check_owned(self) -> None:
        """Check that this process still owns the run.

        Raises:
            Superseded: another one does, or the folder is no longer this run's.
        """
        newest = newest_generation(self._folder)
        if newest > self.generation:
            owner = owner_of(self._run, newest) or "another process"
            raise Superseded(f"{self._run} was taken over by {owner}: this process writes nothing more")
        if not self._is_there():
            raise Superseded(f"{self._run} was moved or replaced: this process writes nothing more")

    def _is_there(self) -> bool:
        """Whether the file of this owner is there; another run's owner may have one of the same name."""
        with suppress(FileNotFoundError):
            return self._owner.nonce in self._path.read_text()
        return False

    def note(self, **facts: Any) -> None:
        """Add facts of an `Owner` to what it has written down.

        Raises:
            OSError: it cannot be written.
        """
        self._owner = replace(self._owner, **facts)
        write_record(self._path, self._owner, self)

    def release(self) -> None:
        """Let another process have it."""
        self._released.set()
        with suppress(OSError, Superseded):
            self.note(ended=True)
        self._unlock()

    def _unlock(self) -> None:
        with suppress(OSError):
            self._lock_path.unlink()
        os.close(self._lock)

    def withdraw(self) -> None:
        """Release it as if it had never been taken: for a process that has written nothing."""
        self.release()
        with suppress(OSError):
            if self._is_there():
                self._path.unlink()
        if self._is_first:
            with suppress(OSError):  # another process has come
                self._folder.rmdir()

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self._path)


def generations(owners: Path) -> list[int]:
    """The numbers of the owners, in order."""
    return sorted(int(match[1]) for match in matches(owners, r"([1-9][0-9]*)\.json"))


def newest_generation(owners: Path) -> int:
    """The number of the last owner; 0 without one."""
    return max(generations(owners), default=0)


def owner_of(run: Path, generation: int) -> Owner | None:
    """What the owner of this generation wrote down; None if there is nothing that an owner would write.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        return read_record(Owner, run / "owners" / f"{generation}.json")
    except UserError:
        return None


def _wait_for_the_end_of(generation: int, run: Path) -> None:
    owner, me = owner_of(run, generation), this_process()
    path = run / "owners" / f"{generation}.json"
    name = owner or "another process"
    in_use = UserError(f"{run} is in use by {name}: wait for it, stop it, or give another folder")
    if owner and owner.slurm_job == me.slurm_job is not None and owner.slurm_restarts < me.slurm_restarts:
        return  # an earlier start of this job, which Slurm has ended or cut off
    lock = _lock_of(path, owner.nonce if owner else "*")
    if (found := _look_at(lock)) == "locked":
        say(f"{run} is in use by {name}; waiting {PATIENCE} s for its end")
        until = time.monotonic() + PATIENCE
        while found == "locked":
            if time.monotonic() >= until:
                raise in_use
            time.sleep(POLL)
            found = _look_at(lock)
    if owner and (owner.ended or (found == "free" and owner.machine == me.machine)):
        return
    # Locks may not reach from one machine to another, and clocks may differ: watch for a heartbeat.
    say(f"{run} was left by {name}; watching it for {SILENCE} s")
    seen, until = _last_heartbeat(path), time.monotonic() + SILENCE
    while time.monotonic() < until:
        time.sleep(HEARTBEAT / 5)
        if not (now := _last_heartbeat(path)):
            return  # it has withdrawn
        if now != seen:
            raise in_use


def _lock_of(owner: Path, nonce: str) -> Path:
    return owner.with_name(f"{owner.stem}-{nonce}.lock")


def _look_at(pattern: Path) -> Literal["locked", "free", "unknown"]:
    """Whether one of these locks is held; unknown where the file system has no locks."""
    for path in pattern.parent.glob(pattern.name):
        try:
            lock = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        except OSError:  # another user's, perhaps
            return "unknown"
        try:
            if not _try_to_lock(lock):
                return "unknown"
        except BlockingIOError:
            return "locked"
        finally:
            os.close(lock)
    return "free"


def _try_to_lock(descriptor: int) -> bool:
    """Lock an open file, until it is closed or the process ends; False where there are no locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            return False
        raise
    return True


def this_process() -> Owner:
    """This process as an owner."""
    return Owner(
        host=socket.gethostname(),
        machine=BOOT.read_text().strip() if BOOT.exists() else socket.gethostname(),
        pid=os.getpid(),
        nonce=secrets.token_hex(8),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
        slurm_restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _last_heartbeat(owner: Path) -> int | None:
    """Its last heartbeat, in nanoseconds by the clock of the file system; None without its file."""
    # Opened, because network file systems only then look anew.
    with suppress(FileNotFoundError), owner.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None
