"""fp16's loss scaling, here on a CPU: steps that it does not leave out are as without it."""

from dataclasses import replace
from typing import ClassVar

import torch
from accelerate import Accelerator

from cs324dist.config import Config
from cs324dist.loop import run_task
from cs324dist.tasks.base import Task
from cs324dist.tasks.lstm.task import LSTMTask
from cs324dist.trainer import Trainer


def accelerator(**scaler) -> Accelerator:
    made = Accelerator(cpu=True)
    made.scaler = torch.amp.GradScaler("cpu", **scaler) if scaler else None
    return made


def test_gradients_are_clipped_and_applied_as_without_a_scale():
    """A scale is a power of two: it changes no bit of a gradient."""
    ends = []
    for scaler in ({}, {"init_scale": 2.0**10}):
        config = replace(LSTMTask.presets["smoke"], optimizer="rmsprop", max_grad_norm=0.01)
        task = LSTMTask(config, torch.device("cpu"))
        trainer = Trainer(task, accelerator(**scaler))
        for step in range(3):
            trainer.step(step, is_logged=True)
        loss = trainer.read_metrics()["train/loss"]
        ends.append((loss, [parameter.tolist() for parameter in task.model.parameters()]))
    assert ends[0] == ends[1]


class TwoOptimizers(Task[Config]):
    name = "two"
    presets: ClassVar = {"fast": Config(max_grad_norm=1.0)}
    gradient = 1.0  # of the first parameter

    def __init__(self, config, device):
        super().__init__(config, device)
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
        self.networks = {"net": torch.nn.ParameterList(parameters)}
        self.optimizers = {"net": tuple(torch.optim.SGD([one], 0.1) for one in parameters[:2])}

    def loss(self, batch):
        first, second, untrained = self.networks["net"]
        return (self.gradient * first + second + 9 * untrained).sum(), {}


def moved(gradient: float, **scaler: float) -> list[float]:
    task = TwoOptimizers(TwoOptimizers.presets["fast"], torch.device("cpu"))
    task.gradient = gradient
    trainer = Trainer(task, accelerator(**scaler))
    trainer.step(0, is_logged=False)
    return [round((1 - parameter[0]).item(), 6) for parameter in task.networks["net"]]


def test_an_overflow_of_one_optimizer_does_not_reach_another():
    assert moved(float("inf"), init_scale=8.0) == [0, 0.1, 0]  # as without clipping
    step = round(0.1 / 6**0.5, 6)  # six gradients of one, together of norm one
    assert moved(1.0, init_scale=8.0) == moved(1.0) == [step, step, 0]


def test_a_run_goes_on_with_the_scale_that_it_had(tmp_path):
    scales = []
    for steps in (4, 6):
        config = replace(
            LSTMTask.presets["smoke"], preset="smoke", steps=steps, wandb="disabled", run_dir=tmp_path
        )
        scaled = accelerator(init_scale=8.0, growth_interval=2)
        assert run_task(LSTMTask, config, scaled)
        scales.append(scaled.scaler.get_scale())
    assert scales == [8.0 * 2**2, 8.0 * 2**3]
