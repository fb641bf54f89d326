"""What a run leaves behind that is refused before its first step, and what is closed at its end."""

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel

from cs324dist import trackers
from cs324dist.errors import RunFailed, UserError
from cs324dist.loop import main, run_task
from cs324dist.runs import saving
from cs324dist.runs.checkpoints import TrainerState
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.lstm.task import LSTMTask


class RefusesItsData(LSTMTask):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        raise UserError("--data holds no numbers")


class HasABadName(LSTMTask):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.networks = {"../lstm": self.model}


class HoldsWhatCannotBeSaved(LSTMTask):
    def state_dict(self):
        return {"length": self.length, "file": object()}


class HasAComplexBuffer(LSTMTask):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))


class TrainsWhatIsNotItsOwn(LSTMTask):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.optimizers = {"lstm": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (RefusesItsData, "--data holds no numbers"),
        (HasABadName, r"a network cannot be called '\.\./lstm'"),
        (HoldsWhatCannotBeSaved, "the task's state holds file = <object"),
        (HasAComplexBuffer, "it cannot be saved: KeyError: torch.complex128"),
        (TrainsWhatIsNotItsOwn, "optimizer 'lstm' holds 1 parameters of no network of the task"),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
def test_a_run_that_is_refused_before_its_first_step_leaves_no_trace(tmp_path, task, said):
    with pytest.raises(UserError, match=said):
        run_in(tmp_path / "run", task)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_seen_before_the_first_step(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot be written to \(No space left on device\): give another"):
        run_in(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, capsys):
    honest = saving.write_checkpoint

    def full(folder: Path, trained: object, state: TrainerState, *owner: object) -> None:
        if owner:  # none has what is written before the first step, to see whether it can be
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(folder, trained, state)

    monkeypatch.setattr(saving, "write_checkpoint", full)
    with pytest.raises(RunFailed, match=r"^no checkpoint of step 4: No space left on device; there is no"):
        run_in(tmp_path / "run", steps=4, checkpoint_every=2)
    assert "warning: no checkpoint of step 2: No space left on device" in capsys.readouterr().err
    assert RunDir(tmp_path / "run").read_status().step == 0


def run_in(folder, task=LSTMTask, **changes) -> bool:
    config = replace(task.presets["smoke"], preset="smoke", run_dir=folder, wandb="disabled", **changes)
    return run_task(task, config, Accelerator(cpu=True))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_finished_run_names_steps_only_where_they_can_be_more(tmp_path, capsys, schedule):
    for _ in range(2):
        assert run_in(tmp_path / "run", steps=2, schedule=schedule)
    more = "--steps or another --run-dir" if schedule == "constant" else "another --run-dir"
    assert capsys.readouterr().err.endswith(f"is finished, 2 steps: for more, give {more}\n")


class ForgetsTheOutput(LSTMTask):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        first, *self.left = self.model.parameters()
        self.optimizers = {"lstm": torch.optim.SGD([first], 0.1)}


class Freezes(ForgetsTheOutput):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        for parameter in self.left:
            parameter.requires_grad_(False)


class Averages(LSTMTask):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.networks["average"] = AveragedModel(self.model)


def test_parameters_that_nothing_trains_are_warned_of_unless_they_are_frozen(tmp_path, capsys):
    said = {}
    for task in (LSTMTask, ForgetsTheOutput, Freezes, Averages):
        run_in(tmp_path / task.__name__, task, steps=1)
        said[task] = capsys.readouterr().err
    count = len([*LSTMTask(LSTMTask.presets["smoke"], torch.device("cpu")).model.parameters()]) - 1
    assert f"warning: {count} parameters of 'lstm' are in no optimizer\n" in said[ForgetsTheOutput]
    assert "optimizer" not in said[LSTMTask] + said[Freezes] + said[Averages]
    assert ", precision: float32\n" in said[LSTMTask]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "3", "--schedule", "linear"), "--steps 3 differs from the run's 2, which"),
        (("--batch-size", "128", "--micro-batches", "3"), "--batch-size 128 is not divisible by --micro-"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, monkeypatch, capsys, words, said):
    run_in(tmp_path, steps=2, schedule="linear")
    before = sorted(tmp_path.rglob("*"))
    command = ["train.py", "--preset", "smoke", "--run-dir", str(tmp_path), "--dry-run", *words]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=said):
        main(LSTMTask, None)
    assert capsys.readouterr().out == ""
    assert sorted(tmp_path.rglob("*")) == before


class Fails(LSTMTask):
    def step(self, step, trainer):
        raise RuntimeError("a bug")


class Tracker:
    def __init__(self, calls):
        self.finish = lambda: calls.append("tracker finished")

    def log(self, *_, **__): ...

    log_images = log


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What a run with a tracker closes."""
    calls = []
    monkeypatch.setattr(Accelerator, "end_training", lambda self: calls.append("training ended"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("process group destroyed"))
    monkeypatch.setattr(trackers, "open_wandb", lambda *_: Tracker(calls))
    command = ["train.py", "--preset", "smoke", "--steps", "1", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    return calls


def test_on_an_error_only_trackers_are_closed(calls):
    """To leave the process group while others wait in a collective would hang."""
    with pytest.raises(RuntimeError, match="a bug"):
        main(Fails, None)
    assert calls == ["tracker finished"]


def test_at_the_end_the_process_group_is_left_as_well(calls):
    with pytest.raises(SystemExit) as ended:
        main(LSTMTask, None)
    assert not ended.value.code
    assert calls == ["training ended"]
