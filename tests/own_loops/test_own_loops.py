"""A loop of one's own keeps the promises of a task's, and each mistake of a first hour ends in one line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import REPOSITORY, metrics, newest_checkpoint, python, status, trainer

from cs324dist.testing import assert_same_on, assert_same_when_killed

SCRIPT = REPOSITORY / "tests/own_loops/script.py"
COMMAND = (SCRIPT, "{run}", "30")
Done = subprocess.CompletedProcess


@pytest.fixture(scope="module")
def run(launch) -> Callable[..., Done]:
    def run(variant: str, folder: Path, processes: int = 0, steps: int = 15) -> Done:
        environment = {"VARIANT": variant}
        return launch(SCRIPT, folder, steps, processes=processes, environment=environment, check=False)

    return run


def errors(done: Done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run("exact", folder).returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["exact", "without an accelerator", "gan"])
def test_it_is_the_same_on_one_to_four_processes(variant, monkeypatch, tmp_path):
    monkeypatch.setenv("VARIANT", variant)
    assert_same_on(1, 2, 3, 4, command=COMMAND, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "processes"), [("exact", 1), ("exact", 3), ("ddp", 2), ("ddp", 3), ("gan", 2)]
)
def test_it_ends_the_same_when_killed(variant, processes, monkeypatch, tmp_path):
    monkeypatch.setenv("VARIANT", variant)
    assert_same_when_killed((SCRIPT, "{run}", "200"), tmp_path, processes=processes)


def test_a_second_start_says_that_it_is_finished_and_more_steps_go_on(run, finished, tmp_path):
    before = newest_checkpoint(finished)
    again = run("exact", finished)
    assert again.returncode == 0
    assert "is finished, 15 steps" in again.stderr
    assert newest_checkpoint(finished) == before
    assert run("exact", finished, steps=20).returncode == 0
    assert trainer(finished)["step"] == 20
    whole = tmp_path / "whole"
    run("exact", whole, steps=20)
    assert [row["loss"] for row in metrics(whole)] == [row["loss"] for row in metrics(finished)]


def test_break_saves_finishes_and_is_not_gone_past(run, tmp_path):
    folder = tmp_path / "run"
    assert run("break", folder).returncode == 0
    assert (status(folder)["state"], trainer(folder)["step"], len(metrics(folder))) == ("finished", 12, 12)
    again = run("exact", folder)
    assert again.returncode == 0
    assert "is finished, 12 steps: its loop has ended" in again.stderr
    assert trainer(folder)["step"] == 12


def test_an_error_of_the_loop_is_a_traceback_and_the_status_says_it(run, tmp_path):
    done = run("own error", tmp_path / "run")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    found = status(tmp_path / "run")
    assert (found["state"], found["step"]) == ("failed", 5)
    where = re.escape(str(SCRIPT))
    assert re.fullmatch(rf"ValueError in {where}, line \d+ \(in step \d+\): of the loop itself", found["why"])
    assert done.stderr.splitlines()[-1] == f"error: {found['why']}"


def test_a_scheduler_and_its_rate_come_back(finished):
    state = trainer(finished)
    assert state["task"]["scheduler"]["last_epoch"] == state["step"]
    (rates,) = state["hidden"].values()
    passed = sum(step <= state["step"] for step in (10, 20))
    assert rates["lr"] == pytest.approx(1e-2 * 0.1**passed)


MISTAKES = {  # on how many processes (0: without a launcher), and what is said
    "prepared network": (0, r"Sequential went through accelerator.prepare, which would add gradients"),
    "prepared loader": (0, r"the DataLoader of 'train' went through accelerator.prepare, which gives each"),
    "prepared scheduler": (0, r"accelerator.prepare was given a scheduler, which it would step once"),
    "unshuffled loader": (0, r"the DataLoader of 'train' has the order of a SequentialSampler"),
    "seeded workers": (0, r"the DataLoader of 'train' has a worker_init_fn, which would not be called"),
    "accumulation": (0, r"the Accelerator has gradient_accumulation_steps=4, which would change nothing"),
    "forgotten scheduler": (0, r"optimizer 'net' has a scheduler that no checkpoint would hold"),
    "logged too soon": (0, r"log was called before the first step"),
    "forgotten network": (0, r"critic was prepared, and no checkpoint would hold it: give it to the run"),
    "optimizer of another": (0, r"optimizer 'net' trains 6 parameters of no network of the run: give it"),
    "no dict": (0, r"networks= is a Sequential: give a dict, by name"),
    "more threads": (0, r"torch has 2 threads, on which sums depend"),
    "network before": (2, r"Sequential: .* on rank 1 is not as on rank 0: make ExactGradients"),
    "each alone": (2, r"2 processes were started, and the Accelerator lets each train alone"),
    "draw on one rank": (3, r"before a backward pass, one process drew random numbers that others did not"),
    "skipped backward": (2, r"the place in the program on rank 1 is not as on rank 0 \(.* in loss of step 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_first_hour_is_one_line(run, mistake, tmp_path):
    processes, said = MISTAKES[mistake]
    done = run(mistake, tmp_path / "run", processes)
    assert done.returncode != 0
    (line,) = errors(done)
    assert re.match(f"error: {said}", line)
    assert not list((tmp_path / "run").glob("checkpoints/0*"))
    if not processes:
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("other networks", r"error: .*model.safetensors.*"),
        ("other optimizer", r"error: optimizer net = Adam of 6 param.* differs from the run's AdamW of"),
        ("other rate", r"error: optimizer net = AdamW of 6 parameters, lr 0.5, .* differs from .* lr 0.01"),
        ("other parts", r"error: gradients = 8 parts, seed 0 differs from the run's 4 parts, seed 0"),
        ("other setting", r"error: lr = 0.02 differs from the run's 0.01: give the run's value"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(run, finished, variant, said):
    before = newest_checkpoint(finished)
    done = run(variant, finished, steps=40)
    assert done.returncode == 2
    (line,) = errors(done)
    assert re.match(said, line)
    assert newest_checkpoint(finished) == before


def test_a_detached_loss_is_warned_of(run, tmp_path):
    done = run("detached loss", tmp_path / "run")
    assert "warning: the loss of no part depends on a parameter" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_start_goes_on(run, tmp_path, number):
    folder = tmp_path / "run"
    environment = {**os.environ, "VARIANT": "exact"}
    command = [sys.executable, SCRIPT, folder, "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as first:
        for line in first.stderr:
            if line.startswith("step 12/"):
                first.send_signal(number)
                break
        assert "stopped after" in first.stderr.read()
    assert first.returncode == 75
    stopped_at = status(folder)["step"]
    assert status(folder)["state"] == "stopped"
    assert stopped_at >= 12
    done = run("exact", folder, steps=stopped_at + 5)
    assert done.returncode == 0
    assert f"continuing from step {stopped_at}" in done.stderr


@pytest.mark.slow
def test_in_bf16_it_is_the_same_too(monkeypatch, tmp_path):
    monkeypatch.setenv("VARIANT", "exact")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_same_on(1, 3, command=COMMAND, folder=tmp_path)
    (owner,) = (tmp_path / "3" / "owners").glob("*.json")
    assert json.loads(owner.read_text())["environment"]["precision"] == "bf16"


def test_in_a_notebook_or_a_test_it_is_one_process_of_python(tmp_path):
    code = f"""
import os, runpy, sys
os.environ["VARIANT"] = "without an accelerator"
sys.argv = ["", {str(tmp_path / "run")!r}, "5"]
print("after", runpy.run_path({str(SCRIPT)!r})["STEPS"])
"""
    done = python("-c", code)
    assert done.stdout == "after 5\n"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"] == {"lr": 0.01, "steps": 5}
