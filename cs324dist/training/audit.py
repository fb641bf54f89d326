"""Replaying a run: a step is a function of weights and step number, so any stretch can be taken again.

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

from cs324dist.errors import Failed, Refused
from cs324dist.models.gan import Generator
from cs324dist.models.lstm import LSTM
from cs324dist.models.rnn import RNN
from cs324dist.runs.checkpoints import checkpoints_in, tensors_by_file, verify_checkpoint
from cs324dist.runs.folder import RunFolder
from cs324dist.runs.models import load_model, read_tensors
from cs324dist.training.classifier import ClassifierSettings, ClassifierTask
from cs324dist.training.failures import explained
from cs324dist.training.gan import GANSettings, GANTask
from cs324dist.training.loop import restore
from cs324dist.training.lstm import LSTMSettings, LSTMTask
from cs324dist.training.process import on_main_process, start_accelerator
from cs324dist.training.progress import averaged_over_ranks
from cs324dist.training.settings import RunSettings, from_json
from cs324dist.training.task import Task, optimizer_tensors

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


class Stretch(NamedTuple):
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
    """Replay `count` stretches of a run, drawn at random, or all, and compare what they end in bit for bit.

    Raises:
        Refused: the run cannot be replayed here.
        Failed: a replay ended elsewhere; each line names a stretch and what differs.
    """
    run = RunFolder(path)
    if not run.exists:
        raise Refused(f"{run} is no run: give a run folder, such as runs/gan-fast-0")
    config = run.read_config()
    name, made_by = config.get("task"), config.get("made_by")
    if not isinstance(name, str) or name not in TASKS or not isinstance(made_by, dict):
        raise Refused(f"{run}/config.json is damaged, or of a task that is not known here")
    settings_type, build = TASKS[name]
    settings = from_json(settings_type, config.get("settings"))
    if data_root is not None and hasattr(settings, "data_root"):
        settings = dataclasses.replace(settings, data_root=data_root)  # type: ignore[call-arg]
    if made_by.get("threads") in range(1, 1025):
        os.environ.setdefault("CS324DIST_THREADS", str(made_by["threads"]))  # bits depend on it
    with explained(settings):
        accelerator = start_accelerator(settings.batch_size)
        precision = accelerator.mixed_precision
        if precision != (recorded := made_by.get("precision")):
            raise Refused(
                f"the precision is {precision!r} here, and was {recorded!r:.9} in the run: "
                f"give that to accelerate launch as --mixed_precision"
            )
        stretches = on_main_process(
            accelerator, lambda: choose(run, accelerator.num_processes, settings.steps, count, from_start)
        )
        on_main_process(accelerator, lambda: run.made_by(precision))
        on_main_process(accelerator, lambda: check_sizes(run, settings, stretches[0].end))
        rows = {row["step"]: row for row in run.read_metrics() if any("train/" in key for key in row)}
        task = build(settings, accelerator)
        wrong = []
        for stretch in stretches:
            differences = replay(task, stretch, rows, accelerator)
            if accelerator.is_main_process:
                print(f"{stretch}: {'DIFFERENT' if differences else 'equal to the last bit'}")
            wrong += [f"{stretch}: {difference}" for difference in differences]
        if wrong:
            raise Failed(*wrong, f"{run} does not repeat: see docs/checkpoints.md for what that can mean")


def check_sizes(run: RunFolder, settings: RunSettings, checkpoint: Path) -> None:
    """Find that the settings ask for models as large as those that are there: for no other amount of memory.

    Raises:
        Refused: they do not.
    """
    own = [entry for entry in SIZES if hasattr(settings, entry[3])]
    found = [entry for entry in own if (checkpoint / entry[0]).is_dir()]
    if own and not found:
        raise Refused(f"{checkpoint} holds no model of this run: it is damaged")
    for folder, model, size, setting in found:
        there, given = load_model(checkpoint / folder, model).config[size], getattr(settings, setting)
        if given != there:
            raise Refused(f"{run}/config.json: {setting} is {given}, but {there} in {checkpoint}")


def choose(run: RunFolder, world_size: int, steps: int, count: int | None, from_start: bool) -> list[Stretch]:
    """Stretches that `world_size` processes took: the beginning only if asked for, and then first."""
    checkpoints = sorted(checkpoints_in(run.checkpoints), key=lambda path: int(path.name))
    states = {path: verify_checkpoint(path) for path in checkpoints}
    if checkpoints and int(checkpoints[-1].name) > steps:
        raise Refused(f"{checkpoints[-1]} is of a later step than the run's last, {steps}")
    stretches = [Stretch(None, checkpoints[0])] if checkpoints and from_start else []
    stretches += [Stretch(*pair) for pair in pairwise(checkpoints)]
    if not stretches:
        raise Refused(f"{run} has no two checkpoints to go from one to the other: give --from-start")
    here = [stretch for stretch in stretches if states[stretch.end].world_size == world_size]
    if not here:
        taken_by = states[stretches[-1].end].world_size
        raise Refused(
            f"{run} was taken by {taken_by} processes, and bits depend on that: "
            f"accelerate launch --config_file accelerate_configs/cpu_ddp.yaml --num_processes {taken_by} "
            f"launch/audit.py {run}"
        )
    drawn = here if count is None else random.sample(here, min(count, len(here)))
    return sorted(drawn, key=lambda stretch: stretch.first)


def replay(
    task: Task, stretch: Stretch, rows: Mapping[int, Mapping[str, float]], accelerator: Accelerator
) -> list[str]:
    """Take the steps of a stretch again; what differs at its end, and in the metrics on the way."""
    if stretch.start is not None:
        restore(task, stretch.start, accelerator)
    else:
        optimizer_tensors(task)
    differences = []
    steps = range(stretch.first, int(stretch.end.name))
    for step in tqdm(steps, str(stretch), unit="step", disable=not sys.stderr.isatty()):
        metrics = task.step(step)
        if row := rows.get(step + 1):
            values = averaged_over_ranks(metrics, accelerator)
            differences += [
                f"{name} after step {step + 1} was {row[name]}, now {value}"
                for name, value in values.items()
                if row.get(name, value) != value
            ]
    for file, live in tensors_by_file(task.models, optimizer_tensors(task)).items():
        stored = read_tensors(stretch.end / file, live)
        for name, tensor in live.items():
            different = int(differing_values(tensor.detach().cpu(), stored[name]).sum())
            if different:
                differences.append(f"{file}: {name} differs in {different} of {tensor.numel()} values")
    if dict(task.counters) != dict(verify_checkpoint(stretch.end).counters):
        differences.append(f"counters are {task.counters}")
    return differences


def differing_values(a: Tensor, b: Tensor) -> Bool[Tensor, " values"]:
    """Which values of two tensors of one shape and dtype differ in any bit."""
    bytes_of_a, bytes_of_b = (
        tensor.contiguous().reshape(-1).view(torch.uint8).view(tensor.numel(), -1) for tensor in (a, b)
    )
    return (bytes_of_a != bytes_of_b).any(dim=1)
