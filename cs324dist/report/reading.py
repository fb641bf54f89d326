"""What run folders say, as far as it can be read: running, failed and damaged runs are reported too.

Records are read strictly, and a file that cannot be read becomes a problem.
"""

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

from cs324dist.config import Config, from_json
from cs324dist.errors import UserError
from cs324dist.runs.checkpoints import read_state
from cs324dist.runs.environment import Environment
from cs324dist.runs.files import matches, read_record
from cs324dist.runs.history import checkpoints_in
from cs324dist.runs.lease import Owner, generations
from cs324dist.runs.records import LOOP, RunRecord, State
from cs324dist.runs.run_dir import RunDir

Series = dict[int, float | None]  # value by step, in the order of steps; None: it was not finite
LARGEST = 1e15  # larger values are not drawn
BASE_OPTIONS = {field.name for field in dataclasses.fields(Config)}
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    name: str
    record: RunRecord
    options: Config | None  # those that every task has; None if they cannot be read
    state: State | Literal["not started", "unclear"]
    step: int
    why: str
    silent_for: float  # seconds since the last heartbeat of a process that is marked as running
    metrics: Mapping[str, Series]
    samples: Mapping[int, Path]
    owners: Mapping[int, Owner]  # the processes that ran it, by generation
    environment: Environment | None  # the last owner's that wrote it down
    processes: int | None  # how many trained it together when it was last saved
    problems: list[str]

    @property
    def task(self) -> str:
        """The name of its task."""
        return plain(self.record.task)

    @property
    def state_shown(self) -> str:
        """Its state, if its options can be read."""
        return self.state if self.options else "damaged"

    @property
    def steps(self) -> int | None:
        """How many steps it is to take."""
        return self.options.steps if self.options and self.record.task != LOOP else None

    @property
    def reached(self) -> int:
        """The last saved step; the last logged one of a run that is running, or has no readable status."""
        logged = (step for series in self.metrics.values() for step in series)
        return max(self.step, *logged, 0) if self.state in ("running", "unclear") else self.step

    @property
    def starts(self) -> dict[int, int | None]:
        """The steps it was started or continued from, and how many processes took the steps that follow."""
        found: dict[int, int | None] = {}
        for owner in self.owners.values():
            if (first := owner.from_step) is not None:
                found = {step: processes for step, processes in found.items() if step < first}
                found[first] = owner.environment.processes if owner.environment else None
        return found

    def setting(self, name: str) -> str:
        """A setting as text."""
        return plain(self.record.config.get(name, "?"))

    def series(self, name: str) -> Series:
        """A metric's values; empty if it has none."""
        return self.metrics.get(name, {})

    def last(self, name: str) -> float | None:
        """A metric's last value that is a number."""
        return next((v for v in reversed(self.series(name).values()) if v is not None), None)

    def extremes(self, name: str) -> list[tuple[int, float]]:
        """The steps at which a metric is lowest, highest and last, and its values there."""
        points = [(step, value) for step, value in self.series(name).items() if value is not None]
        return [min(points, key=itemgetter(1)), max(points, key=itemgetter(1)), points[-1]]


def plain(value: Any) -> str:
    """Any JSON value as one line of printable text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "; ".join(text.splitlines())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def read_runs(paths: tuple[Path, ...]) -> tuple[list[Run], list[str]]:
    """The runs among `paths`, and a line for each path that is not one; a `UserError` if none is."""
    found: dict[Path, Path] = {}
    others = []
    for path in paths:
        try:
            if RunDir(path).exists:
                found.setdefault(Path(os.path.realpath(path)), path)  # each once
            else:
                others.append(f"{plain(str(path))} is not a run folder")
        except OSError as error:
            others.append(f"{plain(str(path))} cannot be read ({error.strerror})")
    if not found:
        raise UserError(
            f"{'; '.join(others) or 'no run was named'}: give run folders, such as runs/gan-fast-0"
        )
    names = Counter(place.name for place in found)
    named = ((path, place.name if names[place.name] == 1 else str(path)) for place, path in found.items())
    return [read_run(path, name) for path, name in named], others


def read_run(path: Path, name: str) -> Run:
    """What the folder says."""
    folder, problems = RunDir(path), []

    def read(reader: Callable[..., Answer], *arguments: Any) -> Answer | None:
        try:
            return reader(*arguments)
        except UserError as error:
            problems.append(plain(error.lines[0]))
        except OSError as error:
            problems.append(plain(f"{error.filename} cannot be read: {error.strerror}"))
        return None

    record = read(folder.read_record)
    given = record.config if record and record.task != LOOP else {}
    base = {name: value for name, value in given.items() if name in BASE_OPTIONS}
    options = read(from_json, Config, base, f"{path}/config.json") if record else None
    begun = (path / "status.json").exists()
    status = read(folder.read_status) if begun else None
    numbers = read(generations, path / "owners") or ()
    files = {number: path / "owners" / f"{number}.json" for number in numbers}
    touched = (
        read(Path.stat, files[numbers[-1]]) if numbers and status and status.state == "running" else None
    )
    owners = {number: owner for number, file in files.items() if (owner := read(read_record, Owner, file))}
    environment = next((o.environment for o in reversed(owners.values()) if o.environment), None)
    states = (read(read_state, checkpoint) for checkpoint in read(checkpoints_in, folder.checkpoints) or ())
    saved = next((state for state in states if state), environment)  # either says how many processes
    samples = read(matches, path / "samples", r"([0-9]+)\.png") or ()
    return Run(
        path=path,
        name=plain(name),
        record=record or RunRecord("unknown", "", {}, {}),
        options=options,
        state=status.state if status else "unclear" if begun else "not started",
        step=status.step if status else 0,
        why=plain(status.why) if status else "",
        silent_for=time.time() - touched.st_mtime if touched else 0.0,
        metrics=read(_read_metrics, folder) or {},
        samples=dict(sorted((int(match[1]), path / "samples" / match[0]) for match in samples)),
        owners=owners,
        environment=environment,
        processes=saved.processes if saved else None,
        problems=problems,
    )


def _read_metrics(run: RunDir) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for row in run.read_metrics():
        for name, value in row.items():
            if name != "step":
                fits = value is not None and abs(value) <= LARGEST
                found.setdefault(name, {})[row["step"]] = float(value) if fits else None
    return {plain(name): dict(sorted(points.items())) for name, points in found.items()}
