"""A run is a folder, and the folder is the truth.

config.json       which task, and every option
status.json       running | stopped | finished | failed, the step, and why
metrics.jsonl     one JSON object a line
samples/          pictures, named by step
checkpoints/      see `checkpoints`
owners/           the processes that ran it, and in what environment; see `lease`
collectives-…     of each process when one was lost: the last collectives, as torch's flight recorder has them
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cs324dist.config import Config, conflicts, from_json
from cs324dist.errors import UserError, printable, warn
from cs324dist.runs.checkpoints import unwritable, verify_checkpoint
from cs324dist.runs.environment import Environment
from cs324dist.runs.files import clear, clear_temporaries, read_record, write_record
from cs324dist.runs.history import (
    checkpoint_name,
    checkpoints_in,
    clear_unfinished,
    generation_of,
    history_of,
    keep_newest,
    metric_of,
    step_of,
)
from cs324dist.runs.lease import Lease, generations, owner_of
from cs324dist.runs.metrics_file import MetricsFile
from cs324dist.runs.records import RunRecord, State, Status

OnMain = Callable[[Callable[[], None]], None]
HASH_SEED = "PYTHONHASHSEED"
FOLDERS = {"owners", "checkpoints", "samples"}
LEFTOVERS = r"\.config\.json.*\.tmp"  # of a start that was killed


class RunDir(MetricsFile):
    """The files of one run; only the process that owns it writes them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._lease: Lease | None = None
        self._is_new = self._started = False
        self._damaged: dict[Path, UserError] = {}

    def __str__(self) -> str:
        return str(self.path)

    def check_fits(self, task: str, config: Config) -> None:
        """Check that the folder is new, empty, or a run of `task` that these options may continue.

        Raises:
            UserError: it is something else.
        """
        if record := self.record_of(task):
            stored = from_json(type(config), record.config, f"{self.path / 'config.json'}")
            if lines := conflicts(config, stored):
                raise UserError(*lines)

    def record_of(self, task: str) -> RunRecord | None:
        """What is known of the run of `task` that the folder holds; None: it is new or empty.

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
            return None
        record = self.read_record()
        if record.task != task:
            raise UserError(f"{self} holds a run of {record.task!r:.99}: give another folder")
        return record

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
        self._is_new, self._started = not self.path.exists(), False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            newest = self.newest()
            self._lease = Lease(self.path, after=generation_of(newest) if newest else 0)
            # So that an earlier owner that was paused cannot rename one.
            for name in ("config.json", "status.json", "metrics.jsonl"):
                clear_temporaries(self.path, name, self.generation)
            clear_temporaries(self.path / "samples", "", self.generation)
            clear_unfinished(self.checkpoints, self.generation)
        except OSError as error:
            raise unwritable(self.path, error) from None

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
        self.check_owned()
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
            self._started = True  # from here on, files are written
            write_record(self.path / "config.json", record, self)
            self.set_damaged_aside()
            lost = self._rewind(step, metrics_lines)
            if self._lease is not None:
                self._lease.note(
                    from_step=step, lost_steps=lost, environment=environment, config=record.config
                )
        except OSError as error:
            raise unwritable(self.path, error) from None
        self.write_status("running", step)

    def latest_environment(self) -> Environment | None:
        """What the last steps of the run were taken in; None if there is none yet.

        Raises:
            OSError: they cannot be read now. Another precision might follow from passing them over.
        """
        owners = (owner_of(self.path, number) for number in reversed(generations(self.path / "owners")))
        return next((owner.environment for owner in owners if owner and owner.environment), None)

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
        """Mark a complete run finished, unless it is already."""
        if self.is_finished():
            return
        self._started = True
        self.keep_newest(keep_last, keep_best)
        self.write_status("finished", step)

    def is_finished(self) -> bool:
        """Whether the status says so."""
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
        metric = metric_of(wanted)
        saved = {step_of(path): path for path in history_of(self.checkpoints)} if wanted else {}
        rows = ((row["step"], row.get(metric)) for row in self.read_metrics()) if saved else ()
        values = {step: value for step, value in rows if step in saved and value is not None}
        step = (min if wanted.endswith(":min") else max)(values, key=values.__getitem__, default=None)
        return None if step is None else (saved[step], values[step])

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
