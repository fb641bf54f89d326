"""A run is a folder, and the folder is the truth.

config.json       every setting, package versions, commit, threads, processor
status.json       running | stopped | finished | failed, the step, and why
metrics.jsonl     one JSON object a line
samples/          pictures, named by step
checkpoints/      see `checkpoints`
"""

import importlib.metadata
import json
import math
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from cs324dist.errors import Refused
from cs324dist.runs.checkpoints import checkpoints_in, verify_checkpoint
from cs324dist.runs.files import read_json, replaced, write_json

State = Literal["running", "stopped", "finished", "failed"]


class RunFolder:
    """The files of one run; only the main process writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def check_fits(self, task: str, conflicts: Callable[[Mapping[str, Any]], list[str]]) -> None:
        """Find that the folder is new, empty, or a run of `task` whose settings have no `conflicts`.

        Raises:
            Refused: it is something else.
        """
        if not self.exists:
            if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
                raise Refused(
                    f"--run-dir {self} holds something that is no run: give an empty or a new folder"
                )
            return
        stored = self.read_config()
        if not isinstance(stored.get("settings"), dict):
            raise Refused(f"{self.path / 'config.json'} is damaged, or not a file of this project")
        if stored.get("task") != task:
            raise Refused(f"--run-dir {self} holds a run of {stored.get('task')!r}: give another folder")
        if lines := conflicts(stored["settings"]):
            raise Refused(*lines)

    def open(self, task: str, settings: Mapping[str, Any]) -> None:
        """Make the folder, or go on with it; say what is run and by what.

        Raises:
            Refused: it cannot be written to.
        """
        stored = self.read_config() if self.exists else {}
        made_by = environment()
        for name, value in made_by.items():
            before = stored.get("made_by", made_by).get(name)
            if value != before:
                print(
                    f"warning: {self} was made with {name} {before}, now {value}: bits may differ",
                    file=sys.stderr,
                )
        tracker_id = stored.get("tracker_run_id") or secrets.token_hex(4)
        try:
            for folder in (self.checkpoints, self.path / "samples"):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(
                self.path / "config.json",
                {"task": task, "settings": settings, "tracker_run_id": tracker_id, "made_by": made_by},
            )
        except OSError as error:
            raise Refused(
                f"--run-dir {self} cannot be written to ({error.strerror}): give a folder that can be"
            ) from None

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "config.json").is_file()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of one step."""
        return self.checkpoints / f"{step:09d}"

    def sample(self, step: int) -> Path:
        """The picture of one step."""
        return self.path / "samples" / f"{step:09d}.png"

    def read_config(self) -> dict[str, Any]:
        """Everything in `config.json`."""
        return read_json(self.path / "config.json")

    def write_status(self, state: State, step: int, why: str = "") -> None:
        """Say where the run stands: what a batch script reads."""
        write_json(self.path / "status.json", {"state": state, "step": step, "why": why})

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line; `step` is the number of completed steps. What is not finite is written as null."""
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines so far; one that a killed writer left unfinished is passed over."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def go_back_to(self, step: int) -> None:
        """Drop the metrics past a checkpoint, whose steps are about to be taken again; the run is running."""
        path = self.path / "metrics.jsonl"
        kept = [json.dumps(row) + "\n" for row in self.read_metrics() if row["step"] <= step]
        with replaced(path) as temporary:
            temporary.write_text("".join(kept))
        self.write_status("running", step)

    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return max((int(path.name) for path in checkpoints_in(self.checkpoints)), default=0)

    def newest_checkpoint(self) -> Path | None:
        """The newest valid checkpoint; damaged ones that are newer are named and moved aside."""
        for folder in checkpoints_in(self.checkpoints):
            try:
                verify_checkpoint(folder)
            except Refused as refusal:
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.replace(aside)
                print(f"warning: {refusal}; moved to {aside}, going back to the one before", file=sys.stderr)
            else:
                return folder
        return None


def environment() -> dict[str, Any]:
    """What the bits of a result may depend on."""
    packages = ("cs324dist", "torch", "accelerate", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The checkout's commit, `-dirty` if files differ from it; None for an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
