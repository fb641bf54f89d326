"""Replaying a run: a step is a function of weights and step number, so any interval can be taken again.

A bit that flipped in a stored weight, a step that a faulty processor got wrong, a run that was continued with
other code: each makes the replay end elsewhere.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cs324dist.config import from_json
from cs324dist.data.streams import seed_everything
from cs324dist.distributed.failures import translate_errors
from cs324dist.distributed.process import compiled_by, on_main_process, start_accelerator
from cs324dist.errors import RunFailed, UserError, printable, say, warn
from cs324dist.runs.checkpoints import (
    TrainerState,
    plain_state,
    read_checkpoint,
    tensors_by_file,
    verify_checkpoint,
)
from cs324dist.runs.environment import Environment, environment
from cs324dist.runs.hidden_state import HiddenState
from cs324dist.runs.history import generation_of, history_of, step_of
from cs324dist.runs.lease import Owner, owner_of
from cs324dist.runs.models import read_tensors
from cs324dist.runs.records import LOOP
from cs324dist.runs.run_dir import HASH_SEED, RunDir
from cs324dist.tasks import TASKS, find_task
from cs324dist.tasks.base import Task
from cs324dist.trainer import Trainer

NEEDED = {"precision", "compiled"}  # of an environment; the rest is warned about
BY_DDP = {"processes", "threads"}  # needed as well, unless there are micro-batches


@dataclass(frozen=True)
class Interval:
    """The steps between two checkpoints; `start` is None for the beginning of the run."""

    start: Path | None
    end: Path
    state: TrainerState  # at the end
    owner: Path  # the file of the process that took the steps
    environment: Environment  # of that process
    config: dict[str, Any]  # its options

    def __str__(self) -> str:
        return f"steps {self.first} to {self.state.step}"

    @property
    def first(self) -> int:
        """The step it starts after."""
        return step_of(self.start) if self.start else 0


def audit(path: Path, task_name: str | None, from_start: bool, data_root: Path = Path("data")) -> None:
    """Replay the intervals of a run between its checkpoints, and compare what they end in bit for bit.

    launch/audit.py explains the options.

    Raises:
        UserError: the run cannot be replayed here.
        RunFailed: a replay ended elsewhere; each line names an interval and what differs.
    """
    run = RunDir(path)
    if not run.exists:
        raise UserError(f"{run} is not a run folder: give one, such as runs/gan-fast-0")
    record = run.read_record()
    if record.task == LOOP:
        raise UserError(
            f"{run} is of a loop of your own, which cannot be replayed from here: "
            f"cs324dist.testing.assert_same_when_killed tests it"
        )
    if task_name is None and record.task not in TASKS:
        raise UserError(
            f"{run} is a run of {record.task!r:.99}, which is no task of the project: "
            f"give --task path/to/file.py:Class"
        )
    task_type = find_task(task_name or record.task)
    if task_type.name != record.task:
        raise UserError(f"{run} is a run of {record.task!r:.99}, not of {task_type.name}")
    config_type = type(next(iter(task_type.presets.values())))
    config = run.read_config(config_type)
    with translate_errors(config.peer_timeout):
        intervals = list(_intervals(run, from_start))
        made = intervals[-1].environment
        if config.micro_batches is None:
            os.environ.setdefault("CS324DIST_THREADS", str(made.threads))
        accelerator = start_accelerator(config.batch_size, config.micro_batches, preferred=made.precision)
        here = environment(accelerator.num_processes, accelerator.mixed_precision, compiled_by(accelerator))
        needed = NEEDED if config.micro_batches else NEEDED | BY_DDP
        chosen = on_main_process(accelerator, lambda: _comparable(intervals, here, needed))
        rows = {row["step"]: row for row in run.read_metrics() if any("train/" in key for key in row)}
        wrong: list[str] = []
        for interval in chosen:
            config = from_json(config_type, interval.config, str(interval.owner))
            if hasattr(config, "data_root"):
                config = dataclasses.replace(config, data_root=data_root)
            seed_everything(config.seed, "task", accelerator.device)
            trainer = Trainer(task_type(config, accelerator.device), accelerator)
            differences = _replay(trainer, interval, rows)
            if accelerator.is_main_process:
                print(f"{interval}: {'DIFFERENT' if differences else 'equal to the last bit'}")
            wrong += [f"{interval}: {difference}" for difference in differences]
        if wrong:
            raise RunFailed(*wrong, f"{run} does not repeat: docs/troubleshooting.md says what that can mean")


def _intervals(run: RunDir, from_start: bool) -> Iterator[Interval]:
    """The intervals that checkpoints allow to replay, in order."""
    ends = [*reversed(history_of(run.checkpoints))]
    pairs = [*zip([None, *ends], ends, strict=False)][0 if from_start else 1 :]
    if not pairs:
        raise UserError(f"{run} has no two checkpoints to go from one to the other: give --from-start")
    for start, end in pairs:
        state = verify_checkpoint(end)
        file, owner = _owner_of_steps(run, end)
        if owner is None or owner.environment is None or owner.config is None:
            raise UserError(f"{file} does not say how {end} was made")
        # launch/audit.py sets the hash seed where the run had none.
        variables = {HASH_SEED: "0", **owner.environment.variables}
        made = dataclasses.replace(owner.environment, variables=variables)
        yield Interval(start, end, state, file, made, owner.config)


def _owner_of_steps(run: RunDir, checkpoint: Path) -> tuple[Path, Owner | None]:
    """The owner that took the steps before a checkpoint: later ones may have made up for its evaluation."""
    generation = generation_of(checkpoint)
    while (owner := owner_of(run.path, generation)) and generation > 1:
        if owner.from_step is not None and owner.from_step < step_of(checkpoint):
            break
        generation -= 1
    return run.path / "owners" / f"{generation}.json", owner


def _comparable(intervals: list[Interval], here: Environment, needed: set[str]) -> list[Interval]:
    """The intervals that can be compared here; warns about what else differs."""
    comparable, reasons = [], []
    for interval in intervals:
        compared = ((k, v, getattr(here, k)) for k, v in vars(interval.environment).items())
        differing = [(k, v, now) for k, v, now in compared if v != now and k not in BY_DDP - needed]
        if strict := [f"{name} {value}, here {now}" for name, value, now in differing if name in needed]:
            reasons.append(f"{interval} cannot be compared: made with {', '.join(strict)}")
            continue
        comparable.append(interval)
        for name, value, now in differing:
            warn(f"{interval} were made with {name} {value}, now {now}: bits may differ")
    if not comparable:
        made = intervals[-1].environment
        python = f"torchrun --nproc_per_node {made.processes}" if made.processes > 1 else "python"
        raise UserError(
            *reasons,
            f"to repeat them: CS324DIST_THREADS={made.threads} ACCELERATE_MIXED_PRECISION={made.precision} "
            f"{python} -m cs324dist.launch.audit {printable(shlex.join(sys.argv[1:]), None)}",
        )
    for reason in reasons:
        say(reason)
    return comparable


def _replay(trainer: Trainer, interval: Interval, rows: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Take the steps of an interval again; what differs at its end, and in the metrics on the way."""
    task: Task[Any] = trainer.task
    if interval.start is not None:
        read_checkpoint(interval.start, task, HiddenState(task), trainer.accelerator.scaler)
    differences = []
    steps = range(interval.first, interval.state.step)
    for step in tqdm(steps, str(interval), unit="step", disable=not sys.stderr.isatty()):
        row = rows.get(step + 1)
        seed_everything(task.config.seed, f"step {step}", trainer.accelerator.device)
        trainer.step(step, is_logged=row is not None)
        if row is not None:
            values = trainer.read_metrics()
            differences += [
                f"{name} after step {step + 1} was {row[name]}, now {value}"
                for name, value in values.items()
                if row.get(name, value) != value
            ]
    for file, live in tensors_by_file(task).items():
        stored = read_tensors(interval.end / file, live)
        for name, tensor in live.items():
            both = (t.contiguous().reshape(-1) for t in (tensor.detach().cpu(), stored[name]))
            now, before = (t.view(torch.uint8).view(-1, t.element_size()) for t in both)  # bytes, by value
            if different := int((now != before).any(dim=1).sum()):
                differences.append(f"{file}: {name} differs in {different} of {tensor.numel()} values")
    if (state := plain_state(task)) != interval.state.task:
        differences.append(f"the task's own state is {state}")
    return differences
