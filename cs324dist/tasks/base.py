"""What a task offers to the loop, and the optimizer state as named tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from cs324dist.metrics.accuracy import UntilStopped
from cs324dist.settings import RunSettings


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every rank."""

    metrics: Mapping[str, float]
    picture: UInt8[Tensor, "channels height width"] | None = None
    strip: Callable[[], UInt8[Tensor, "channels height width"]] | None = None
    """Draws a walk through the latent space; called only where somebody looks at it."""


@runtime_checkable
class Task(Protocol):
    """A model, its data and its step; the loop does the rest."""

    settings: RunSettings

    models: Mapping[str, nn.Module]
    """Everything a checkpoint holds, as it was before Accelerate wrapped it."""

    optimizers: Mapping[str, torch.optim.Optimizer]
    """The optimizers, by the name of the model they train."""

    counters: dict[str, int]
    """Integers that are part of the state, such as a curriculum's length."""

    counter_limits: Mapping[str, range]
    """The values that each of them can take."""

    def step(self, step: int) -> Mapping[str, Tensor]:
        """Train on the samples of step `step`, counted from 0.

        Returns:
            This rank's metrics as scalars on the device; the loop averages them over ranks when it logs.
        """

    def evaluate(self, until_stopped: UntilStopped = iter) -> Evaluation:
        """Measure the models as they are, from streams of evaluation's own; every rank takes part.

        A loop over `until_stopped(parts)` ends early when the run is asked to stop; what it found is thrown away.
        """


def optimizer_tensors(task: Task) -> dict[str, Tensor]:
    """Every optimizer's state by name, such as `generator/fc.0.weight/exp_avg`: the live tensors."""
    for optimizer in task.optimizers.values():
        if not optimizer.state:
            create_state(optimizer)
    return {
        f"{model}/{parameter}/{key}": value
        for model, optimizer in task.optimizers.items()
        for parameter, tensor in task.models[model].named_parameters()
        for key, value in optimizer.state[tensor].items()
    }


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a new optimizer its state at once, all zero, where torch would wait for the first step.

    A checkpoint can then be read into it in place, and checked for exactly these names and shapes. A step
    of size zero moves no weight.
    """
    step_sizes = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for group, step_size in zip(optimizer.param_groups, step_sizes, strict=True):
        group["lr"] = step_size
    for parameter in parameters:
        for value in optimizer.state[parameter].values():
            value.zero_()
