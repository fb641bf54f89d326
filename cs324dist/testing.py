"""For tests of your own training: what the toolkit promises of its runs, checked by running a script.

A script is a task's, or has a loop of its own. Where its command has a word with {run}, the run folder stands
there; otherwise `--run-dir FOLDER --wandb disabled` is added, as a task's script takes them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cs324dist.runs.files import sha256
from cs324dist.runs.run_dir import RunDir

Command = Sequence[str | Path]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def assert_same_on(*processes: int, command: Command, folder: Path) -> None:
    """Check that a run ends in the same bits on these numbers of processes: `assert_same_on(1, 3, …)`.

    Args:
        processes: two numbers or more.
        command: a script and its options, such as `("my_task.py", "--steps", "20", "--micro-batches", "4")`;
            without exact gradients the ends are equal up to rounding only.
        folder: an empty one, where the runs go.

    Raises:
        AssertionError: a run fails, or the ends differ; it says in what.
    """
    for count in processes:
        _run(command, folder / str(count), count)
        _assert_same_end(folder / str(processes[0]), folder / str(count))


def assert_same_when_killed(command: Command, folder: Path, *, processes: int = 1) -> None:
    """Check that a run that is killed (-9) after its first checkpoint, and continued, ends in the same bits.

    Args:
        command: a script and its options; it needs several checkpoints, and lines of metrics after them.
        folder: an empty one, where the two runs go.
        processes: of each run.

    Raises:
        AssertionError: a run fails, ends before it can be killed, or the ends differ; it says in what.
    """
    _run(command, folder / "whole", processes)
    run = RunDir(folder / "killed")
    process = _start(command, run.path, processes)
    while process.poll() is None:
        logged = max((row["step"] for row in run.read_metrics()), default=0)
        if 0 < run.newest_step() < logged:
            break
        time.sleep(0.01)
    if process.poll() is not None:
        raise AssertionError(f"it ended before it could be killed: {_said(run.path)}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _run(command, run.path, processes)
    _assert_same_end(folder / "whole", run.path)


def _start(command: Command, run: Path, processes: int) -> "subprocess.Popen[bytes]":
    launcher = (*TORCHRUN, str(processes)) if processes > 1 else ()
    given = [str(word).replace("{run}", str(run)) for word in command]
    options = () if given != [*map(str, command)] else ("--run-dir", str(run), "--wandb", "disabled")
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("wb") as log:
        words = [sys.executable, *launcher, *given, *options]
        return subprocess.Popen(words, stderr=log, stdout=log, start_new_session=True)


def _run(command: Command, run: Path, processes: int = 1) -> None:
    if _start(command, run, processes).wait() != 0:
        raise AssertionError(f"it failed: {_said(run)}")


def _said(run: Path) -> str:
    """The lines of its errors; if it gave none, the end of all it said."""
    said = run.with_suffix(".log").read_text(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "error on rank "))]
    return "\n".join(errors) or said[-2000:]


def _end(path: Path) -> dict[str, Any]:
    """What has to be the same: digests of all tensors, the task's own state, and every metric but speeds."""
    run = RunDir(path)
    checkpoint = run.newest()
    assert checkpoint is not None, f"{run} has no checkpoint"
    tensors = {str(file.relative_to(checkpoint)): sha256(file) for file in checkpoint.rglob("*.safetensors")}
    rows = ({k: v for k, v in row.items() if not k.startswith("throughput/")} for row in run.read_metrics())
    metrics = {f"line {number} of metrics.jsonl": row for number, row in enumerate(rows, 1)}
    state = json.loads((checkpoint / "trainer.json").read_text())
    return {"step": state["step"], "the other state": state["task"], **tensors, **metrics}


def _assert_same_end(one: Path, other: Path) -> None:
    ends = _end(one), _end(other)
    different = [k for k in dict.fromkeys([*ends[0], *ends[1]]) if ends[0].get(k) != ends[1].get(k)]
    if different:
        raise AssertionError(f"{one} and {other} differ in {', '.join(different[:9])}")
