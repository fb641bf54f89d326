"""Learning rates over the steps: those of torch's schedulers, and what the trainer makes of them."""

import warnings
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from cs324dist.config import Config
from cs324dist.data.streams import MicroBatch
from cs324dist.schedules import SCHEDULES, learning_rate_factor
from cs324dist.tasks.base import Metrics, Task
from cs324dist.trainer import Trainer


def factors(schedule: str, steps: int, warmup_steps: int = 0) -> list[float]:
    return [learning_rate_factor(schedule, step, steps, warmup_steps) for step in range(steps)]


def torchs(
    steps: int, *parts: tuple[type[LRScheduler], dict[str, float]], milestones: list[int]
) -> list[float]:
    """The learning rates that torch's schedulers, one after the other, make of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    found = []
    with warnings.catch_warnings():  # of torch about its own use of itself
        warnings.simplefilter("ignore")
        scheduler = SequentialLR(optimizer, [kind(optimizer, **how) for kind, how in parts], milestones)
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("steps", [6, 37])
def test_linear_and_cosine_are_torchs_after_a_warm_up_that_is_torchs(steps, warmup):
    rest = steps - warmup
    before = [(LinearLR, {"start_factor": 1 / (warmup + 1), "total_iters": warmup})] if warmup else []
    milestones = [warmup] if warmup else []
    line = (LinearLR, {"start_factor": 1.0, "end_factor": 0.0, "total_iters": rest})
    half_cosine = (CosineAnnealingLR, {"T_max": rest})
    for schedule, part in (("linear", line), ("cosine", half_cosine)):
        expected = torchs(steps, *before, part, milestones=milestones)
        assert factors(schedule, steps, warmup) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
)
def test_every_step_trains_and_only_the_warm_up_rises(schedule, steps, warmup):
    """Also where the warm-up is as long as the run, or longer."""
    found = factors(schedule, steps, warmup)
    assert all(0 < factor <= 1 for factor in found)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == 1


class Falling(Task[Config]):
    """A weight whose gradient is 1: it falls by the learning rate at each step."""

    name = "falling"
    presets = {"default": Config()}  # noqa: RUF012

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.weights = torch.nn.ModuleDict(
            {name: torch.nn.Linear(1, 1, bias=False) for name in ("fast", "slow")}
        )
        for weight in self.weights.values():
            torch.nn.init.zeros_(weight.weight)
        self.networks = dict(self.weights)
        self.optimizers = {
            "both": [
                torch.optim.SGD(self.weights["fast"].parameters(), lr=1.0),
                torch.optim.SGD(self.weights["slow"].parameters(), lr=0.125),
            ]
        }

    def loss(self, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        ones = torch.ones(1, 1)
        loss = sum(weight(ones).mean() for weight in self.weights.values())
        return loss, {"loss": loss}


def test_the_trainer_takes_each_optimizers_own_rate_times_the_factor_of_the_step():
    config = replace(Config(), schedule="linear", steps=4, warmup_steps=0, batch_size=1)
    task = Falling(config, torch.device("cpu"))
    trainer = Trainer(task, Accelerator(cpu=True))
    fallen, slowly = [], []
    for step in (0, 1, 2, 3):
        trainer.step(step, is_logged=False)
        fallen.append(-task.weights["fast"].weight.item())
        slowly.append(-task.weights["slow"].weight.item())
    assert fallen == [1.0, 1.75, 2.25, 2.5]
    assert slowly == [value / 8 for value in fallen]
