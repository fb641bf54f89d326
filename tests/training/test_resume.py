"""A run that was stopped or killed, and continued by the same command, ends as one that never was."""

import json
import re
import shutil
import signal

import pytest
from chaos import TASKS, content_of
from launched import Launched, newest_checkpoint, status

from cs324dist.runs.history import step_of

LSTM = ("launch/lstm.py", "--length", "10", "--steps", "60", "--log-every", "1", "--evaluate-every", "20",
        "--checkpoint-every", "20", "--learning-rate", "1e-2", "--wandb", "disabled")  # fmt: skip
SMOKE = ("launch/lstm.py", "--preset", "smoke", "--wandb", "disabled")


@pytest.fixture(scope="module")
def never_stopped(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    launch(*LSTM, "--run-dir", run)
    assert status(run) == {"state": "finished", "step": 60, "why": ""}
    return content_of(run)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["TERM", "INT"]
)
def test_a_signal_leads_to_a_checkpoint(tmp_path, launch_environment, launch, never_stopped, number):
    run = tmp_path / "run"
    with Launched(LSTM, run, launch_environment) as started:
        started.wait_for_line("step 30/")
        started.send_signal(number)
        assert started.end() == 75
    assert status(run)["state"] == "stopped"
    stopped_at = status(run)["step"]
    assert 30 <= stopped_at < 60
    assert step_of(newest_checkpoint(run)) == stopped_at
    assert f"continuing from step {stopped_at}" in launch(*LSTM, "--run-dir", run).stderr
    assert content_of(run) == never_stopped


def test_killed_and_continued_it_ends_with_the_same_bits(tmp_path, launch_environment, launch):
    """chaos.py does so at random moments, on several processes too."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    launch(*TASKS["gan"], "--run-dir", whole)
    with Launched(TASKS["gan"], run, launch_environment) as started:
        started.wait_for_line("step 17/")
        started.send_signal(signal.SIGKILL)
        started.end()
    assert status(run)["state"] == "running"
    done = launch(*TASKS["gan"], "--run-dir", run)
    (step,) = re.findall(r"continuing from step (\d+)", done.stderr)
    assert 10 <= int(step) < 30
    assert content_of(run) == content_of(whole)


@pytest.fixture(scope="module")
def finished(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    launch(*SMOKE, "--run-dir", run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A finished run of 20 steps; the checkpoint before the last is of step 10."""
    return shutil.copytree(finished, tmp_path / "run")


def test_on_a_read_only_disk_a_run_is_refused(run, launch):
    command = ("launch/train.py", "tests/faulty.py:LSTM", *SMOKE[1:], "--run-dir", run)
    done = launch(*command, environment={"FAULT": f"read-only disk: {run}"}, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {run} cannot be written to (Read-only file system)")


def test_with_micro_batches_a_process_has_one_thread_whatever_is_asked_for(launch, tmp_path):
    command = (*SMOKE, "--steps", "1", "--micro-batches", "2", "--run-dir", tmp_path / "run")
    launch(*command, environment={"CS324DIST_THREADS": "2"})
    owner = json.loads((tmp_path / "run" / "owners" / "1.json").read_text())
    assert owner["environment"]["threads"] == 1
