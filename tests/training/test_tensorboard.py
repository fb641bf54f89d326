"""--tensorboard: the values of metrics.jsonl, once each however the run was continued."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from launched import metrics

from cs324dist.loop import run_task
from cs324dist.tasks.gan.task import GANTask
from cs324dist.tasks.lstm.task import LSTMTask


class Writer:
    """A stand-in for SummaryWriter, as far as it is called; it remembers what was flushed."""

    opened: list["Writer"]

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self._pending, self.written = folder, purge_step, [], []
        self.opened.append(self)

    def add_scalar(self, name, value, step):
        self._pending.append((step, name, value))

    def add_image(self, name, image, step):
        assert image.dtype is torch.uint8
        assert image.shape[0] in (1, 3)  # channels first
        self._pending.append((step, name, tuple(image.shape)))

    def flush(self):
        self.written += self._pending
        self._pending.clear()


@pytest.fixture
def opened(monkeypatch):
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    Writer.opened = []
    return Writer.opened


def train(task, folder, **changed):
    config = replace(task.presets["smoke"], preset="smoke", run_dir=folder, wandb="disabled", **changed)
    assert run_task(task, replace(config, tensorboard=True), Accelerator(cpu=True))


def test_it_gets_what_the_metrics_file_gets(opened, tmp_path):
    train(LSTMTask, tmp_path / "run", steps=20)
    train(LSTMTask, tmp_path / "run", steps=30)
    assert [writer.purge_step for writer in opened] == [1, 21]
    assert {writer.folder for writer in opened} == {tmp_path / "run" / "tensorboard"}
    rows: dict[int, dict[str, float]] = {}
    for step, name, value in (event for writer in opened for event in writer.written):
        rows.setdefault(step, {})[name] = value
    expected: dict[int, dict[str, float]] = {}
    for row in metrics(tmp_path / "run"):
        expected.setdefault(row.pop("step"), {}).update(row)
    assert rows == expected


def test_it_gets_the_pictures(opened, tmp_path):
    train(GANTask, tmp_path / "run", dataset="fake", steps=2, batch_size=4)
    (writer,) = opened
    assert [name for _, name, _ in writer.written if "/" not in name] == ["samples", "strip"]


@pytest.mark.parametrize("when", ["opened", "written to"])
def test_without_it_training_goes_on_and_says_so_in_one_line(opened, monkeypatch, tmp_path, capsys, when):
    def broken(*_, **__):
        raise ImportError("No module named 'tensorboard'")

    monkeypatch.setattr(Writer, {"opened": "__init__", "written to": "flush"}[when], broken)
    train(LSTMTask, tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert line.startswith("warning: TensorBoard: No module named 'tensorboard'; nothing ")
    assert len(metrics(tmp_path / "run")) == 4
