"""Faults that are no crashes: a full disk, a loss that is no number, a process that hangs, no memory."""

import math
import resource
import signal
from pathlib import Path

import pytest
from launched import Launched, metrics, status
from safetensors.torch import load_file

from cs324dist.runs.checkpoints import verify_checkpoint
from cs324dist.runs.history import step_of

pytestmark = pytest.mark.slow  # real processes, signals and faults: minutes

LSTM = ("launch/lstm.py", "--length", "4", "--batch-size", "8", "--log-every", "1", "--wandb", "disabled")
FAULTY = ("launch/train.py", "tests/faulty.py:LSTM")
TWO = "torchrun with two"


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_valid_and_finite(checkpoint: Path) -> None:
    verify_checkpoint(checkpoint)
    for path in checkpoint.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def errors(said: str) -> list[str]:
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error")]


def test_a_picture_that_cannot_be_written_does_not_end_the_run(launch_environment, tmp_path):
    run = tmp_path / "run"
    smoke = ("launch/gan.py", "--dataset", "fake", "--batch-size", "8", "--latent-dim", "8", "--steps", "9")
    every = ("--log-every", "1", "--evaluate-every", "3", "--checkpoint-every", "9", "--wandb", "disabled")
    with Launched((*smoke, *every), run, launch_environment) as started:
        started.wait_for_line("step 1/")
        (run / "samples").rmdir()
        (run / "samples").write_text("no folder")
        assert started.end() == 0
    assert started.said.count("warning: no picture of step") == 3
    assert status(run)["state"] == "finished"


@pytest.mark.parametrize(("log", "save"), [("1", "1"), ("50", "3"), ("7", "50")])
def test_a_loss_that_is_no_number_fails_the_run_after_a_good_checkpoint(launch, tmp_path, log, save):
    run = tmp_path / "run"
    command = (*FAULTY, *LSTM[1:], "--hidden-size", "8", "--steps", "50", "--evaluate-every", "50")
    every = ("--log-every", log, "--checkpoint-every", save, "--run-dir", run)
    done = launch(*command, *every, environment={"FAULT": "diverges"}, check=False)
    assert done.returncode == 1
    named, advice = errors(done.stderr)
    assert "lower the learning rate" in advice
    saved = checkpoints(run)
    if saved:
        last = run / "checkpoints" / saved[-1]
        assert named.endswith(f"the last good checkpoint is {last}")
        assert_valid_and_finite(last)
        assert step_of(last) == 9
    else:
        assert named.endswith("there is no checkpoint yet")
    assert status(run)["state"] == "failed"
    assert status(run)["step"] == (step_of(last) if saved else 0)
    for row in metrics(run):
        assert all(value is None or math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is killed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_of_two_processes_fails_all_end_and_it_is_said(launch_environment, tmp_path, number, rank):
    run, never = tmp_path / "run", "1000000"
    long = ("--steps", never, "--evaluate-every", never, "--checkpoint-every", "10", "--peer-timeout", "5")
    with Launched((*LSTM, "--hidden-size", "8", *long), run, launch_environment, TWO) as started:
        started.wait_for_line("step 20/")
        started.workers()[rank].send_signal(number)
        assert started.end() == 1  # and no process is left
    if number == signal.SIGSTOP:
        answer = "another process did not answer within 5 s (--peer-timeout)"
        assert f"error on rank {1 - rank}: {answer}" in started.said
    if rank == 1:
        assert status(run)["state"] == "failed"
    assert_valid_and_finite(max((run / "checkpoints").iterdir()))


def test_the_launchers_signal_after_a_crash_is_no_request_to_stop(launch_environment, tmp_path):
    fault = {"FAULT": "dies beside a busy one"}
    with Launched((*FAULTY, *LSTM[1:]), tmp_path / "run", launch_environment | fault, TWO) as started:
        assert started.end() == 1
    assert status(tmp_path / "run")["state"] == "failed"
    assert "error on rank 0: another process of the run has ended: see what it said" in started.said


def with_little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def test_too_little_memory_names_the_option_to_lower(launch_environment, tmp_path):
    command, limit = (*LSTM, "--hidden-size", "65536"), {"preexec_fn": with_little_memory}
    with Launched(command, tmp_path / "run", launch_environment, **limit) as started:
        assert started.end() == 1
    (line,) = errors(started.said)
    assert line.endswith("out of memory: lower the batch size (--batch-size)")
    assert not (tmp_path / "run" / "status.json").exists()
