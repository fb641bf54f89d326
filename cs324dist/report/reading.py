"""What run folders say, as far as it can be read: running, failed and damaged runs are reported too.

Nothing in a folder is trusted: text becomes one line of printable characters, numbers are finite, whatever
else is left out.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs324dist.errors import UserError
from cs324dist.runs.checkpoints import TRAINER
from cs324dist.runs.files import is_number, read_json
from cs324dist.runs.run_dir import RunDir

Series = dict[int, float | None]  # value by step, in the order of steps; None: it was not finite
LARGEST = 1e15  # beyond, a value is no longer drawn
LONGEST = 300  # characters of a text
MOST_METRICS, MOST_STARTS = 40, 100
DOUBTED_AFTER = 60  # seconds without a sign of life after which a run that says it is running is doubted


@dataclass(frozen=True)
class Start:
    """One process that ran it."""

    since: str
    where: str
    from_step: int | None
    lost_steps: int | None
    seconds_away: float | None


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: Path
    name: str
    task: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    state: str
    step: int
    why: str
    silent_for: float | None
    metrics: Mapping[str, Series]
    samples: Mapping[int, Path]
    starts: list[Start]
    """The last of them, of `started` in all."""
    started: int
    processes: int | None
    problems: list[str]

    @property
    def steps(self) -> int | None:
        """How many steps it is to take."""
        return _count(self.settings.get("steps"))

    @property
    def reached(self) -> int:
        """The step it has come to: of one that runs or does not say, the last that was logged."""
        logged = (step for series in self.metrics.values() for step in series)
        return max(self.step, *logged, 0) if self.state in ("running", "unclear") else self.step

    def setting(self, name: str) -> str:
        """A setting as text."""
        return plain(self.settings.get(name, "?"))

    def series(self, name: str) -> Series:
        """A metric's values; empty if it has none."""
        return self.metrics.get(name, {})

    def last(self, name: str) -> float | None:
        """A metric's last value that is a number."""
        return next((v for v in reversed(self.series(name).values()) if v is not None), None)


def plain(value: Any) -> str:
    """Any JSON value as one line of printable text, not too long."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except RecursionError:
            value = "…"
    value = "; ".join(value[: LONGEST + 1].splitlines())
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def read_runs(paths: tuple[Path, ...]) -> tuple[list[Run], list[str]]:
    """The runs among `paths`, and a line for each path that is none.

    Raises:
        UserError: none of them is a run.
    """
    places = {Path(os.path.realpath(path)): path for path in reversed(paths)}  # each once
    found: dict[Path, Path] = {}
    others = []
    for place, path in reversed(places.items()):
        try:
            is_run, why = RunDir(path).exists, "is no run"
        except OSError as error:
            is_run, why = False, f"cannot be read ({error.strerror})"
        if is_run:
            found[place] = path
        else:
            others.append(f"{plain(str(path))} {why}")
    if not found:
        given = "; ".join(others) or "no run was named"
        raise UserError(f"{given}: give run folders, such as runs/gan-fast-0")
    names = [place.name for place in found]
    return [
        read_run(path, place.name if names.count(place.name) == 1 else str(path))
        for place, path in found.items()
    ], others


def read_run(path: Path, name: str) -> Run:
    """What the folder says."""
    problems: list[str] = []

    def read(file: str) -> dict[str, Any]:
        try:
            return read_json(path / file)
        except UserError as refusal:
            problems.append(plain(str(refusal)))
            return {}

    config = read("config.json")
    begun = (path / "status.json").exists()
    status = read("status.json") if begun else {}
    owners = _numbered(path / "owners", r"([1-9][0-9]{0,8})\.json")
    checkpoints = _numbered(path / "checkpoints", r"([0-9]{1,18})")
    trainer = read(f"checkpoints/{checkpoints[-1][1].name}/{TRAINER}") if checkpoints else {}
    try:
        rows = RunDir(path).read_metrics()
    except OSError as error:
        rows = []
        problems.append(f"metrics.jsonl cannot be read: {error.strerror}")
    state = plain(status.get("state", "")) or ("unclear" if begun else "not started")
    return Run(
        path=path,
        name=plain(name),
        task=plain(config.get("task", "unknown")),
        settings=_mapping(config.get("settings")),
        environment=_mapping(config.get("environment")),
        state=state,
        step=_count(status.get("step")) or 0,
        why=plain(status.get("why", "")),
        silent_for=_silence(owners[-1][1]) if owners and state == "running" else None,
        metrics=_metrics(rows),
        samples=dict(_numbered(path / "samples", r"([0-9]{1,18})\.png")),
        starts=[_start(owner) for _, owner in owners[-MOST_STARTS:]],
        started=len(owners),
        processes=_count(trainer.get("world_size")),
        problems=problems,
    )


def _metrics(rows: list[dict[str, Any]]) -> dict[str, Series]:
    found: dict[str, dict[int, float | None]] = {}
    for row in sorted((row for row in rows if row["step"] >= 0), key=lambda row: row["step"]):
        for name, value in row.items():
            if name != "step" and (name in found or len(found) < MOST_METRICS):
                fits = value is not None and abs(value) <= LARGEST
                found.setdefault(name, {})[row["step"]] = float(value) if fits else None
    return {plain(name): series for name, series in found.items()}


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """The paths in a folder that are named by a number, in its order."""
    try:
        paths = [path for path in folder.iterdir() if not path.is_symlink()]
    except OSError:
        return []
    matches: Iterator[tuple[re.Match[str] | None, Path]] = ((re.fullmatch(pattern, p.name), p) for p in paths)
    return sorted((int(match[1]), path) for match, path in matches if match)


def _start(owner: Path) -> Start:
    try:
        content = read_json(owner)
    except UserError:
        content = {}
    job = f", Slurm job {plain(content['slurm_job'])}" if content.get("slurm_job") else ""
    since = plain(content.get("since", "?")).replace("T", " ").replace("+00:00", " UTC")
    return Start(
        since,
        f"{plain(content.get('host', '?'))}, process {plain(content.get('pid', '?'))}{job}",
        _count(content.get("from_step")),
        _count(content.get("lost_steps")),
        _seconds(content.get("seconds_since_previous")),
    )


def _silence(owner: Path) -> float | None:
    try:
        return time.time() - owner.stat().st_mtime
    except OSError:  # it has just withdrawn
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and is_number(value) and value >= 0 else None


def _seconds(value: Any) -> float | None:
    return float(value) if is_number(value) and 0 <= value <= LARGEST else None
