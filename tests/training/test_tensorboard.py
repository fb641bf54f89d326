"""--tensorboard: the values of metrics.jsonl, once each however the run was continued."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
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

    def add_scalar(self, name, value, global_step):
        self._pending.append((global_step, name, value))

    def add_images(self, name, images, global_step, dataformats):
        assert (images.dtype, dataformats) == (np.uint8, "NHWC")
        self._pending.append((global_step, name, images.shape))

    def flush(self):
        self.written += self._pending
        self._pending.clear()

    close = flush


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
    assert {Path(writer.folder) for writer in opened} == {tmp_path / "run" / "tensorboard"}
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
    pictures = {name: shape for _, name, shape in writer.written if "/" not in name}
    assert pictures == {"samples": (1, 152, 152, 1), "strip": (1, 32, 302, 1)}


@pytest.mark.parametrize("when", ["opened", "written to"])
def test_without_it_training_goes_on_and_says_so_in_one_line(opened, monkeypatch, tmp_path, capsys, when):
    def broken(*_, **__):
        raise ImportError("No module named 'tensorboard'")

    monkeypatch.setattr(Writer, {"opened": "__init__", "written to": "flush"}[when], broken)
    train(LSTMTask, tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert line.startswith("warning: TensorBoard: No module named 'tensorboard'; nothing ")
    assert len(metrics(tmp_path / "run")) == 4
