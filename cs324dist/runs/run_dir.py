"""A run is a folder, and the folder is the truth.

config.json       which task, and every option
status.json       running | stopped | finished | failed, the step, and why
metrics.jsonl     one JSON object a line
samples/          pictures, named by step
checkpoints/      see `checkpoints`
owners/           the processes that ran it, and in what environment; see `lease`
"""

import errno
import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from cs324dist.config import Config, conflicts, from_json
from cs324dist.errors import UserError, printable, warn
from cs324dist.runs.checkpoints import (
    Number,
    checkpoint_name,
    checkpoints_in,
    clear_unfinished,
    generation_of,
    history_of,
    keep_newest,
    step_of,
    verify_checkpoint,
)
from cs324dist.runs.environment import Environment
from cs324dist.runs.files import clear, clear_temporaries, content_of, read_record, replaced, write_record
from cs324dist.runs.lease import Lease, generations, owner_of

OnMain = Callable[[Callable[[], None]], None]
State = Literal["running", "stopped", "finished", "failed"]
HASH_SEED = "PYTHONHASHSEED"
LOOP = "loop"  # the task of a loop of one's own, whose settings have names of their own
FOLDERS = {"owners", "checkpoints", "samples"}
LEFTOVERS = r"\.config\.json.*\.tmp"  # of a start that was killed


@dataclass(frozen=True)
class RunRecord:
    """What `config.json` holds."""

    task: str
    script: str
    """The script that trains it, as it was started."""

    config: dict[str, Any]
    """Every option."""

    changed: dict[str, Any]
    """Options whose value is not their preset's, with the preset's value."""

    tracker_run_id: Annotated[str, StringConstraints(pattern="^[0-9a-f]{8}$")] = field(
        default_factory=lambda: secrets.token_hex(4)
    )
    """Id of the run at Weights & Biases."""

    task_given: str = ""
    """The task as it was given to the script; empty for a script of one task."""

    made_of: dict[str, str] = field(default_factory=dict)
    """Of a loop of one's own: how gradients are made, the kinds of optimizers and states, its `keep_best`."""

    format: Literal[4] = 4

    @property
    def keep_best(self) -> str:
        """Its --keep-best, or of a loop of one's own its `keep_best`."""
        return str({**self.config, **self.made_of}.get("keep_best") or "")


@dataclass(frozen=True)
class Status:
    """What `status.json` holds: where the run stands, for batch scripts."""

    state: State
    step: Number
    """Completed steps of which a checkpoint exists."""

    why: str = ""


class RunDir:
    """The files of one run; only the process that owns it writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: Lease | None = None
        self._is_new = self._started = False
        self._read_only: UserError | None = None  # a finished run can still say that it is
        self._metrics: FileIO | None = None
        self._metrics_lines = 0
        self._size = 0  # of the metrics that are surely on the disk
        self._unsynced = b""  # the lines after those
        self._written = 0  # how much of them is in the file
        self._damaged: dict[Path, UserError] = {}

    def __str__(self) -> str:
        return str(self.path)

    def check_fits(self, task: str, config: Config) -> None:
        """Check that the folder is new, empty, or a run of `task` that these options may continue.

        Raises:
            UserError: it is something else.
        """
        if self.check_holds(task) and (lines := conflicts(config, self.read_config(type(config)))):
            raise UserError(*lines)

    def check_holds(self, task: str) -> bool:
        """Whether the folder holds a run of `task`; if not, it is new or empty.

        Raises:
            UserError: it is something else.
        """
        for name in (*FOLDERS, "wandb", ".wandb", "tensorboard", "metrics.jsonl"):
            if (self.path / name).is_symlink():
                raise UserError(f"{self.path / name} is a link: a run writes only into its own folder")
        found = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if not self.exists:  # looked at after the names: another process may start it in between
            if self.path.is_file() or any(not re.fullmatch(LEFTOVERS, name) for name in found - FOLDERS):
                raise UserError(f"{self} is not a run folder: give an empty or a new one")
            return False
        record = self.read_record()
        if record.task != task:
            raise UserError(f"{self} holds a run of {record.task!r:.99}: give another folder")
        return True

    @contextmanager
    def claimed(self, check: Callable[[], None], on_main: OnMain) -> Iterator[None]:
        """Own the folder inside. If nothing was started there, no trace of this process is left.

        Args:
            check: raises `UserError` if the folder does not fit.
            on_main: has the main process do something, and raises on all what it raises.

        Raises:
            UserError: a live process owns it, or it cannot be written to.
        """
        on_main(check)
        try:
            on_main(self._claim)
            on_main(check)  # again: another process may have had it in the meantime
            yield
        finally:
            if self._metrics is not None:
                self._metrics.close()
            if self._lease is not None:
                self._lease.release() if self._started else self._lease.withdraw()
                if self._is_new and not self._started:
                    with suppress(OSError):  # somebody has put something there
                        self.path.rmdir()
            self._lease = self._metrics = None

    def _claim(self) -> None:
        self._is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            newest = self.newest()
            self._lease = Lease(self.path, after=generation_of(newest) if newest else 0)
            # An earlier owner that sleeps between its check and its rename has nothing to rename any more.
            for name in ("config.json", "status.json", "metrics.jsonl"):
                clear_temporaries(self.path, name, self.generation)
            clear_temporaries(self.path / "samples", "", self.generation)
            clear_unfinished(self.checkpoints, self.generation)
        except OSError as error:
            self._read_only = self.unwritable(error)
            if error.errno != errno.EROFS or not self._is_finished():
                raise self._read_only from None

    def start(
        self,
        record: RunRecord,
        environment: Environment,
        step: int,
        metrics_lines: int,
        *,
        is_exact: bool = False,
    ) -> None:
        """Write down what is about to run, and drop the metrics past the checkpoint of `step`.

        Raises:
            UserError: the folder cannot be written to.
        """
        if self._read_only:
            raise self._read_only
        self.check_owned()
        self._started = True
        before = self.latest_environment()
        hash_seed, now = before and before.variables.get(HASH_SEED), environment.variables.get(HASH_SEED)
        if is_exact and hash_seed and hash_seed != now:
            raise UserError(
                f"{self} was made with {HASH_SEED}={hash_seed}, now {now}: a set of words would have another "
                f"order; set it to {hash_seed}"
            )
        for name, value in vars(environment).items():
            if name in ("threads", "processes") and is_exact:
                continue
            if before and value != (old := getattr(before, name)):
                warn(f"{self} was made with {name} {printable(old)}, now {value}: bits may differ")
        if self.exists:
            record = RunRecord(**{**vars(record), "tracker_run_id": self.read_record().tracker_run_id})
        try:
            for folder in FOLDERS:
                (self.path / folder).mkdir(exist_ok=True)
            write_record(self.path / "config.json", record, self)
            self.set_damaged_aside()
            lost = self._rewind(step, metrics_lines)
            if self._lease is not None:
                self._lease.note(
                    from_step=step, lost_steps=lost, environment=environment, config=record.config
                )
        except OSError as error:
            raise self.unwritable(error) from None
        self.write_status("running", step)

    def latest_environment(self) -> Environment | None:
        """What the last steps of the run were taken in; None if there is none yet.

        Raises:
            OSError: they cannot be read now. Another precision might follow from passing them over.
        """
        owners = (owner_of(self.path, number) for number in reversed(generations(self.path / "owners")))
        return next((owner.environment for owner in owners if owner and owner.environment), None)

    def unwritable(self, error: OSError) -> UserError:
        """What to say of an error before the first step."""
        return UserError(f"{self} cannot be written to ({error.strerror}): give another folder")

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
        return self._lease.generation if self._lease else 1

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of one step that this owner writes."""
        return self.checkpoints / checkpoint_name(step, self.generation)

    @property
    def scratch(self) -> Path:
        """A folder for a trial; if it stays behind, it goes as an unfinished checkpoint does."""
        return self.checkpoints / f".{checkpoint_name(0, self.generation)}.tmp"

    def sample(self, step: int) -> Path:
        """The picture of one step."""
        return self.path / "samples" / f"{step:09d}.png"

    def read_record(self) -> RunRecord:
        """What `config.json` holds.

        Raises:
            UserError: it is damaged, or of another format.
        """
        return read_record(RunRecord, self.path / "config.json")

    def read_config(self, config_type: type[Any]) -> Any:
        """The options of the run, as `config_type`; raises as `read_record` does."""
        return from_json(config_type, self.read_record().config, f"{self.path / 'config.json'}")

    def read_status(self) -> Status:
        """What `status.json` holds; raises as `read_record` does."""
        return read_record(Status, self.path / "status.json")

    def check_owned(self) -> None:
        """Check that no other process has taken the folder over; called before anything is written.

        Raises:
            Superseded: one has.
        """
        if self._lease is not None:
            self._lease.check_owned()

    def write_status(self, state: State, step: int, why: str = "") -> None:
        """Write where the run stands; warn if that cannot be written."""
        try:
            write_record(self.path / "status.json", Status(state, step, why), self)
        except OSError as error:
            warn(f"{self}/status.json cannot be written: {error.strerror}")

    def finish(self, step: int, keep_last: int, keep_best: str = "") -> None:
        """Mark a complete run finished if a crash prevented it."""
        if self._is_finished():
            return
        self._started = True
        self.keep_newest(keep_last, keep_best)
        self.write_status("finished", step)

    def _is_finished(self) -> bool:
        with suppress(UserError):
            return self.read_status().state == "finished"
        return False

    def keep_newest(self, count: int, best: str = "") -> None:
        """Delete all but the newest `count` checkpoints and the best; warn of one that cannot be deleted.

        Args:
            count: of the newest.
            best: the metric that is largest at the best one; `METRIC:min`: smallest.
        """
        try:
            found = self.best(best)
            keep_newest(self.checkpoints, count, self.generation, best=found and step_of(found[0]))
        except OSError as error:  # somebody reads it over a network file system, perhaps
            warn(f"an old checkpoint stays for now: {error}")

    def best(self, wanted: str) -> tuple[Path, float] | None:
        """The checkpoint where the metric `wanted` is largest (`METRIC:min`: smallest), and that value."""
        metric, _, smallest = wanted.partition(":")
        saved = {step_of(path): path for path in history_of(self.checkpoints)} if wanted else {}
        rows = ((row["step"], row.get(metric)) for row in self.read_metrics()) if saved else ()
        values = {step: value for step, value in rows if step in saved and value is not None}
        step = (min if smallest else max)(values, key=values.__getitem__, default=None)
        return None if step is None else (saved[step], values[step])

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line; `step` is the number of completed steps. Values that are not finite become null.

        Raises:
            OSError: it cannot be written; it will be, together with the next.
        """
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self._unsynced += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._metrics_lines += 1
        self.write_metrics()

    def write_metrics(self, *, sync: bool = False) -> int:
        """Write the lines that are not yet written, with `sync` to the disk itself.

        Returns:
            How many lines there are.

        Raises:
            OSError: it cannot be done; no part of a line is left behind, and the next call tries again.
        """
        self.check_owned()
        if self._metrics is not None:
            try:
                _append(self._metrics, self._unsynced[self._written :])
                self._written = len(self._unsynced)
                if sync:
                    self._written = 0  # if it fails, nobody knows what is on the disk
                    os.fsync(self._metrics.fileno())
                    self._size, self._unsynced = self._size + len(self._unsynced), b""
            except OSError:
                self._metrics.truncate(self._size + self._written)
                raise
        return self._metrics_lines

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The rows so far; lines that are none, such as one that is just being written, are skipped."""
        return (row for _, row in self._lines_of_metrics() if row is not None)

    def read_evaluations(self, until: int) -> list[dict[str, float]]:
        """The metrics of the evaluations after at most `until` steps."""
        rows = (row for row in self.read_metrics() if row["step"] <= until)
        named = (
            {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")} for row in rows
        )
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in named if row]

    def has_evaluation(self, step: int, lines: int) -> bool:
        """Whether the evaluation after `step` is among the first lines; if not, it was cut off.

        Raises:
            UserError: one of the lines is damaged.
        """
        found = False
        for number, (_, row) in enumerate(itertools.islice(self._lines_of_metrics(), lines), 1):
            if row is None:
                raise UserError(
                    f"{self}/metrics.jsonl: line {number} is damaged: mend or delete it, "
                    f"then run the same command again"
                )
            names = row.keys() - {"step"}  # none: an evaluation that measured nothing
            found |= row["step"] == step and (not names or any(name.startswith("eval/") for name in names))
        return found

    def _lines_of_metrics(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """The whole lines, and what they say."""
        with suppress(UserError):
            *lines, _ = content_of(self.path / "metrics.jsonl").split(b"\n")
            yield from ((line + b"\n", _row(line)) for line in lines)

    def _rewind(self, step: int, metrics_lines: int) -> int:
        """Drop the metrics past the checkpoint of `step`; returns how many steps had been logged past it."""
        last, kept = step, 0
        if self._metrics is not None:
            self._metrics.close()
        # A new file, which stays open: an earlier owner that still runs writes to the one that it has open.
        with replaced(self.path / "metrics.jsonl", self) as temporary:
            self._metrics = FileIO(temporary, "a")
            for number, (line, row) in enumerate(self._lines_of_metrics()):
                last = max(last, row["step"] if row else 0)
                if number < metrics_lines and row and row["step"] <= step:
                    _append(self._metrics, line)
                    kept += 1
        if kept < metrics_lines:
            warn(f"{self}/metrics.jsonl lacks {metrics_lines - kept} lines up to step {step}")
        self._size = os.fstat(self._metrics.fileno()).st_size
        self._metrics_lines, self._unsynced, self._written = kept, b"", 0
        return last - step

    def newest(self) -> Path | None:
        """The newest checkpoint, valid or not."""
        return next(iter(checkpoints_in(self.checkpoints)), None)

    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        newest = self.newest()
        return step_of(newest) if newest else 0

    def newest_checkpoint(self) -> Path | None:
        """The newest valid checkpoint; None for a run that has none yet.

        Raises:
            UserError: all checkpoints are damaged, or there were some and none is left.
            OSError: one cannot be read now; it may be whole.
        """
        damaged = self._damaged = {}
        for folder in checkpoints_in(self.checkpoints):
            try:
                verify_checkpoint(folder)
            except UserError as error:
                damaged[folder] = error
            else:
                return folder
        saved = 0
        with suppress(UserError):
            saved = self.read_status().step
        if damaged or saved:
            raise UserError(
                *(str(error) for error in damaged.values()),
                f"no checkpoint of {self} can be used: bring one back, or give another folder",
            )
        return None

    def set_damaged_aside(self) -> None:
        """Move the damaged checkpoints that `newest_checkpoint` found out of the way, with a warning."""
        for path, error in self._damaged.items():
            aside = path.with_name(f"damaged-{path.name}")
            clear(aside)
            path.rename(aside)
            warn(f"{error}; moved to {aside}, going back to the one before")
        self._damaged = {}


def _append(file: FileIO, data: bytes) -> None:
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    well_formed = (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(value is None or type(value) in (int, float) for value in row.values())
    )
    return row if well_formed else None
