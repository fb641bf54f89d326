"""How fast a run is, what it waited for and what it held: numbers of the machine, all named throughput."""

import time
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from launched import metrics

from cs324dist import Config, MicroBatch, Task, loader
from cs324dist.loop import run_task
from cs324dist.runs.run_dir import RunDir
from cs324dist.trackers import Trackers

DELAY = 0.01  # seconds that a sample takes


class Slow(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, item: int) -> torch.Tensor:
        time.sleep(DELAY)
        return torch.ones(1) * item


class Waiting(Task[Config]):
    name = "waiting"
    presets: ClassVar = {"fast": Config(steps=6, batch_size=4, log_every=2, wandb="disabled")}

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.data = loader(Slow(), config.seed, "slow")
        self.networks = {"model": torch.nn.Linear(1, 1)}
        self.optimizers = {"model": torch.optim.SGD(self.networks["model"].parameters(), 1e-3)}

    def loss(self, batch: MicroBatch):
        loss = self.networks["model"](self.data.batch(batch)).square().mean()
        return loss, {"loss": loss}


def lines(task, folder):
    config = replace(task.presets["fast"], preset="fast", run_dir=folder)
    began = time.monotonic()
    assert run_task(task, config, Accelerator(cpu=True))
    took = time.monotonic() - began
    return [row for row in metrics(folder) if "train/loss" in row], took


def test_a_line_has_the_seconds_that_its_steps_waited_for_data(tmp_path):
    rows, took = lines(Waiting, tmp_path / "run")
    waited = [row["throughput/data_seconds"] for row in rows]
    assert len(waited) == 3
    assert all(seconds >= 2 * 4 * DELAY for seconds in waited)  # two steps of four samples
    assert sum(waited) <= took
    assert all(row["throughput/steps_per_second"] <= 2 / (2 * 4 * DELAY) for row in rows)
    assert [row["throughput/steps_per_second"] * 4 for row in rows] == pytest.approx(
        [row["throughput/samples_per_second"] for row in rows]
    )


def test_on_a_gpu_a_line_has_the_most_memory_that_was_held(tmp_path, monkeypatch):
    logged = {}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    monkeypatch.setattr(RunDir, "append_metrics", lambda _, step, row: logged.update(row))
    tracking = {"config": {}, "wandb": "disabled", "tensorboard": False}
    Trackers(RunDir(tmp_path), Accelerator(cpu=True), start=0, until=20, **tracking).log_step(10, {})
    assert logged["throughput/peak_memory_gib"] == 1.5


@pytest.mark.parametrize("seconds", [0, 20])
def test_checkpoints_that_take_long_are_named_at_the_end(tmp_path, monkeypatch, capsys, seconds):
    clock = map(float, range(0, 10**6, seconds)) if seconds else None
    if clock:
        monkeypatch.setattr("cs324dist.base_run.time.monotonic", lambda: next(clock))
    lines(Waiting, tmp_path / "run")
    assert ("checkpoints took 20 of " in capsys.readouterr().err) == bool(seconds)
