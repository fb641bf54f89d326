"""Replaying a run: a step is a function of weights and step number, so any interval can be taken again.

A bit that flipped in a stored weight, a step that a faulty processor got wrong, a run that was continued with
other code: each makes the replay end elsewhere.
"""

import dataclasses
import os
import random
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from cs324dist.distributed.failures import translate_errors
from cs324dist.distributed.process import on_main_process, start_accelerator
from cs324dist.errors import RunFailed, UserError
from cs324dist.models.gan import Generator
from cs324dist.models.lstm import LSTM
from cs324dist.models.rnn import RNN
from cs324dist.progress import averaged_over_ranks
from cs324dist.runs.checkpoints import checkpoints_in, tensors_by_file, verify_checkpoint
from cs324dist.runs.models import load_model, read_tensors
from cs324dist.runs.run_dir import RunDir
from cs324dist.settings import RunSettings, from_json
from cs324dist.tasks.base import Task, optimizer_tensors
from cs324dist.tasks.classifier import ClassifierSettings, ClassifierTask
from cs324dist.tasks.gan import GANSettings, GANTask
from cs324dist.tasks.lstm import LSTMSettings, LSTMTask
from cs324dist.trainer import restore

TASKS: Mapping[str, tuple[type[RunSettings], Callable[..., Any]]] = {
    "lstm": (LSTMSettings, LSTMTask),
    "gan": (GANSettings, GANTask),
    "classifier": (ClassifierSettings, ClassifierTask),
}
SIZES: tuple[tuple[str, type[Any], str, str], ...] = (
    ("lstm", LSTM, "hidden_size", "hidden_size"),
    ("rnn", RNN, "hidden_size", "hidden_size"),
    ("generator", Generator, "input_dim", "latent_dim"),
)


class Interval(NamedTuple):
    """The steps between two checkpoints; `start` is None for the beginning of the run."""

    start: Path | None
    end: Path

    def __str__(self) -> str:
        return f"steps {self.first} to {int(self.end.name)}"

    @property
    def first(self) -> int:
        """The step it starts after."""
        return int(self.start.name) if self.start else 0


def audit(path: Path, count: int | None, from_start: bool, data_root: Path | None = None) -> None:
    """Replay `count` intervales of a run, drawn at random, or all, and compare what they end in bit for bit.

    Raises:
        UserError: the run cannot be replayed here.
        RunFailed: a replay ended elsewhere; each line names a interval and what differs.
    """
    run = RunDir(path)
    if not run.exists:
        raise UserError(f"{run} is no run: give a run folder, such as runs/gan-fast-0")
    config = run.read_config()
    name, environment = config.get("task"), config.get("environment")
    if not isinstance(name, str) or name not in TASKS or not isinstance(environment, dict):
        raise UserError(f"{run}/config.json is damaged, or of a task that is not known here")
    settings_type, build = TASKS[name]
    settings = from_json(settings_type, config.get("settings"))
    if data_root is not None and hasattr(settings, "data_root"):
        settings = dataclasses.replace(settings, data_root=data_root)  # type: ignore[call-arg]
    if environment.get("threads") in range(1, 1025):
        os.environ.setdefault("CS324DIST_THREADS", str(environment["threads"]))  # bits depend on it
    with translate_errors(settings):
        accelerator = start_accelerator(settings.batch_size)
        precision = accelerator.mixed_precision
        if precision != (recorded := environment.get("precision")):
            raise UserError(
                f"the precision is {precision!r} here, and was {recorded!r:.9} in the run: "
                f"give that to accelerate launch as --mixed_precision"
            )
        intervales = on_main_process(
            accelerator, lambda: choose(run, accelerator.num_processes, settings.steps, count, from_start)
        )
        on_main_process(accelerator, lambda: run.environment(precision))
        on_main_process(accelerator, lambda: check_sizes(run, settings, intervales[0].end))
        rows = {row["step"]: row for row in run.read_metrics() if any("train/" in key for key in row)}
        task = build(settings, accelerator)
        wrong = []
        for interval in intervales:
            differences = replay(task, interval, rows, accelerator)
            if accelerator.is_main_process:
                print(f"{interval}: {'DIFFERENT' if differences else 'equal to the last bit'}")
            wrong += [f"{interval}: {difference}" for difference in differences]
        if wrong:
            raise RunFailed(*wrong, f"{run} does not repeat: see docs/checkpoints.md for what that can mean")


def check_sizes(run: RunDir, settings: RunSettings, checkpoint: Path) -> None:
    """Find that the settings ask for models as large as those that are there: for no other amount of memory.

    Raises:
        UserError: they do not.
    """
    own = [entry for entry in SIZES if hasattr(settings, entry[3])]
    found = [entry for entry in own if (checkpoint / entry[0]).is_dir()]
    if own and not found:
        raise UserError(f"{checkpoint} holds no model of this run: it is damaged")
    for folder, model, size, setting in found:
        there, given = load_model(checkpoint / folder, model).config[size], getattr(settings, setting)
        if given != there:
            raise UserError(f"{run}/config.json: {setting} is {given}, but {there} in {checkpoint}")


def choose(run: RunDir, world_size: int, steps: int, count: int | None, from_start: bool) -> list[Interval]:
    """Intervals that `world_size` processes took: the beginning only if asked for, and then first."""
    checkpoints = sorted(checkpoints_in(run.checkpoints), key=lambda path: int(path.name))
    states = {path: verify_checkpoint(path) for path in checkpoints}
    if checkpoints and int(checkpoints[-1].name) > steps:
        raise UserError(f"{checkpoints[-1]} is of a later step than the run's last, {steps}")
    intervales = [Interval(None, checkpoints[0])] if checkpoints and from_start else []
    intervales += [Interval(*pair) for pair in pairwise(checkpoints)]
    if not intervales:
        raise UserError(f"{run} has no two checkpoints to go from one to the other: give --from-start")
    here = [interval for interval in intervales if states[interval.end].world_size == world_size]
    if not here:
        taken_by = states[intervales[-1].end].world_size
        raise UserError(
            f"{run} was taken by {taken_by} processes, and bits depend on that: "
            f"accelerate launch --config_file accelerate_configs/cpu_ddp.yaml --num_processes {taken_by} "
            f"launch/audit.py {run}"
        )
    drawn = here if count is None else random.sample(here, min(count, len(here)))
    return sorted(drawn, key=lambda interval: interval.first)


def replay(
    task: Task, interval: Interval, rows: Mapping[int, Mapping[str, float]], accelerator: Accelerator
) -> list[str]:
    """Take the steps of a interval again; what differs at its end, and in the metrics on the way."""
    if interval.start is not None:
        restore(task, interval.start, accelerator)
    else:
        optimizer_tensors(task)
    differences = []
    steps = range(interval.first, int(interval.end.name))
    for step in tqdm(steps, str(interval), unit="step", disable=not sys.stderr.isatty()):
        metrics = task.step(step)
        if row := rows.get(step + 1):
            values = averaged_over_ranks(metrics, accelerator)
            differences += [
                f"{name} after step {step + 1} was {row[name]}, now {value}"
                for name, value in values.items()
                if row.get(name, value) != value
            ]
    for file, live in tensors_by_file(task.models, optimizer_tensors(task)).items():
        stored = read_tensors(interval.end / file, live)
        for name, tensor in live.items():
            different = int(differing_values(tensor.detach().cpu(), stored[name]).sum())
            if different:
                differences.append(f"{file}: {name} differs in {different} of {tensor.numel()} values")
    if dict(task.counters) != dict(verify_checkpoint(interval.end).counters):
        differences.append(f"counters are {task.counters}")
    return differences


def differing_values(a: Tensor, b: Tensor) -> Bool[Tensor, " values"]:
    """Which values of two tensors of one shape and dtype differ in any bit."""
    bytes_of_a, bytes_of_b = (
        tensor.contiguous().reshape(-1).view(torch.uint8).view(tensor.numel(), -1) for tensor in (a, b)
    )
    return (bytes_of_a != bytes_of_b).any(dim=1)
