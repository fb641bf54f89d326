"""--profile-steps: a trace of the steps that were asked for, complete or absent, and no other bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from chaos import content_of

from cs324dist.distributed.stop import StopRequest
from cs324dist.tasks.gan import GANTask
from cs324dist.tasks.lstm import LSTMTask
from cs324dist.trainer import run_task


def train(folder, steps=6, task=LSTMTask, **changed):
    presets = task.presets["smoke"]
    config = replace(presets, preset="smoke", run_dir=folder, wandb="disabled", steps=steps, **changed)
    with StopRequest(1) as stop:
        assert run_task(task, config, Accelerator(cpu=True), stop)


def traced(folder, what="Optimizer.step#"):
    """How many calls of this kind each trace has, by its name."""
    found = {}
    for path in (folder / "profile").iterdir():
        events = json.loads(path.read_text())["traceEvents"]
        found[path.name] = sum(event.get("name", "").startswith(what) for event in events)
    return found


def test_the_trace_holds_these_steps_and_changes_no_bit(tmp_path):
    train(tmp_path / "plain")
    train(tmp_path / "run", profile_steps="3:4")
    assert traced(tmp_path / "run") == {"steps-3-4.json": 2}
    assert not (tmp_path / "plain" / "profile").exists()
    assert content_of(tmp_path / "run") == content_of(tmp_path / "plain")


def test_micro_batches_in_threads_are_in_it(tmp_path):
    images = {"task": GANTask, "dataset": "fake", "batch_size": 4, "steps": 1, "profile_steps": "1:1"}
    train(tmp_path / "two", **images, micro_batches=2)
    train(tmp_path / "one", **images, micro_batches=1)
    calls = [traced(tmp_path / run, "aten::conv2d")["steps-1-1.json"] for run in ("one", "two")]
    assert 0 < 2 * calls[0] == calls[1]


def test_a_run_that_is_continued_within_them_traces_the_others(tmp_path):
    train(tmp_path / "run", steps=4, profile_steps="3:7")
    train(tmp_path / "run", steps=9, profile_steps="3:7")
    assert traced(tmp_path / "run") == {"steps-3-4.json": 2, "steps-5-7.json": 3}


@pytest.mark.parametrize("how", ["fails", "is cut short in silence"])
def test_no_part_of_a_trace_stays(tmp_path, monkeypatch, capsys, how):
    def half(_, path):
        Path(path).write_text('{"traceEvents": [')
        if how == "fails":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)
    train(tmp_path / "run", steps=2)
    (tmp_path / "run" / "profile").mkdir()
    (tmp_path / "run" / "profile" / ".steps-1-2.json.1-01234567.tmp").touch()  # its owner was killed
    train(tmp_path / "run", profile_steps="3:4")
    assert not [*(tmp_path / "run" / "profile").iterdir()]
    assert "warning: " in (said := capsys.readouterr().err)
    assert "steps-3-4.json cannot be written" in said
