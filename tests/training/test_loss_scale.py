"""fp16's loss scaling, here on a CPU: steps that it leaves out are counted, all others are as without it."""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from accelerate import Accelerator

from cs324dist.audit import Interval, _replay
from cs324dist.config import Config
from cs324dist.distributed.stop import StopRequest
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.environment import environment
from cs324dist.tasks.base import Task
from cs324dist.tasks.lstm import LSTMTask
from cs324dist.trainer import SkippedSteps, Trainer, run_task


def accelerator(**scaler) -> Accelerator:
    made = Accelerator(cpu=True)
    made.scaler = torch.amp.GradScaler("cpu", **scaler) if scaler else None
    return made


def test_each_step_with_an_overflow_is_counted_once():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaled = accelerator(init_scale=2.0**10)
    scaler, skipped = scaled.scaler, SkippedSteps(scaled)
    counts = []
    for gradient in (float("inf"), 1.0, 1.0, float("nan"), float("inf"), 1.0):
        scaler.scale(weight.sum()).backward()
        weight.grad.fill_(gradient)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped.observe()
        counts.append(skipped.read())
    assert counts == [{"train/skipped_steps": count} for count in (1, 1, 1, 2, 3, 3)]


def test_a_scale_that_a_checkpoint_restores_is_no_skipped_step(tmp_path):
    config = replace(LSTMTask.presets["smoke"], preset="smoke", steps=2)
    trainers = [
        Trainer(LSTMTask(config, torch.device("cpu")), accelerator(init_scale=scale)) for scale in (8.0, 64.0)
    ]
    saved, resumed = trainers
    state = TrainerState(0, loss_scale=saved.accelerator.scaler.state_dict())
    write_checkpoint(tmp_path / "0", saved.task, state)
    resumed.restore(tmp_path / "0")
    resumed.step(0, is_logged=True)
    assert resumed.accelerator.scaler.get_scale() == 8.0
    assert resumed.read_metrics()["train/skipped_steps"] == 0


def test_without_a_scaler_there_is_nothing_to_count():
    for without in (accelerator(), accelerator(enabled=False)):
        skipped = SkippedSteps(without)
        skipped.observe()
        assert skipped.read() == {}


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
        with StopRequest(1) as stop:
            assert run_task(LSTMTask, config, scaled, stop)
        scales.append(scaled.scaler.get_scale())
    assert scales == [8.0 * 2**2, 8.0 * 2**3]


class OverflowsFirst(Task[Config]):
    name = "overflows"
    presets: ClassVar = {"fast": Config()}

    def __init__(self, config, device):
        super().__init__(config, device)
        weight = torch.nn.Parameter(torch.ones(3))
        self.networks = {"net": torch.nn.ParameterList([weight])}
        self.optimizers = {"net": torch.optim.SGD([weight], 0.1)}

    def loss(self, batch):
        (weight,) = self.networks["net"]
        loss = weight.square().sum()
        return (math.inf if batch.step == 0 else 1) * loss, {"loss": loss}


def test_an_audit_does_not_compare_how_many_steps_were_skipped_before_it_starts(tmp_path):
    made, again = (
        Trainer(OverflowsFirst(Config(), torch.device("cpu")), accelerator(init_scale=8.0)) for _ in range(2)
    )
    for step in range(4):
        made.step(step, is_logged=True)
        if step % 2 == 1:
            state = TrainerState(step + 1, loss_scale=made.accelerator.scaler.state_dict())
            write_checkpoint(tmp_path / f"{step + 1:09d}-1", made.task, state)
    row = made.read_metrics()
    assert row["train/skipped_steps"] == 1
    first, last = sorted(tmp_path.iterdir())
    interval = Interval(first, last, TrainerState(4), tmp_path, environment(), {})
    assert _replay(again, interval, {4: row}) == []
    (difference,) = _replay(again, interval, {4: {**row, "train/loss": 0.0}})
    assert difference.startswith("train/loss after step 4 was 0.0, now ")
