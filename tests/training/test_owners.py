"""A run that another process owns: refused, waited for, or taken over; what one that was cut off can do."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest
from launched import files_of, wait_for_line

pytestmark = pytest.mark.slow  # real processes, signals and faults: minutes

OPTIONS = ("--length", "4", "--hidden-size", "8", "--batch-size", "8", "--steps", "120",
           "--log-every", "1", "--evaluate-every", "60", "--checkpoint-every", "5",
           "--wandb", "disabled")  # fmt: skip
FAULTY = ("launch/train.py", "tests/faulty.py:LSTM")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(start_python, launch_environment, tmp_path) -> Start:
    """Start the command, with a fault or as a job's start number `restart` if these are given."""
    outside = {k: v for k, v in launch_environment.items() if not k.startswith("SLURM_")}

    def process(fault: str | None = None, restart: int | None = None) -> "subprocess.Popen[str]":
        job = {} if restart is None else {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restart)}
        command = ("launch/lstm.py",) if fault is None else FAULTY
        environment = {**outside, **job, "FAULT": fault or ""}
        return start_python(*command, *OPTIONS, "--run-dir", tmp_path / "run", env=environment)

    return process


def stopped(process: "subprocess.Popen[str]") -> None:
    """Wait until it is stopped in its tracks."""
    until = time.monotonic() + 120
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)


def end(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    said = process.stderr.read().splitlines()
    return process.wait(), said


def test_a_live_owner_is_waited_for_and_the_second_is_refused_in_one_line(start, tmp_path):
    first = start()
    wait_for_line(first, "step 12/")
    first.send_signal(signal.SIGSTOP)  # alive, and at no risk of being done before the second has waited
    stopped(first)
    before = files_of(tmp_path / "run")
    code, said = end(start())
    assert code == 2
    waiting, refusal = said
    assert f"{tmp_path}/run is in use by process {first.pid} on " in waiting
    assert refusal.startswith(f"error: {tmp_path}/run is in use by process {first.pid} on ")
    assert "give another folder" in refusal
    assert files_of(tmp_path / "run") == before


def test_the_second_goes_on_when_the_first_ends_within_the_wait(start, tmp_path):
    first = start()
    wait_for_line(first, "step 12/")
    first.send_signal(signal.SIGSTOP)
    stopped(first)
    second = start()
    wait_for_line(second, f"{tmp_path}/run is in use by process {first.pid} on ")
    first.kill()
    assert "continuing from step 10 of 120" in wait_for_line(second, f"{tmp_path}/run: continuing")
    assert end(second)[0] == 0


@pytest.mark.parametrize(
    "fault",
    [
        None,
        "stops while a checkpoint is written: 7",
        "stops before a checkpoint gets its name: 3",
        "stops before a line of metrics is written: 17",
        "stops before the status is written: 4",
    ],
)
def test_an_owner_that_was_cut_off_can_replace_nothing_when_it_wakes(start, tmp_path, fault):
    run = tmp_path / "run"
    old = start(fault, restart=0)
    if fault is None:
        wait_for_line(old, "step 17/")
        old.send_signal(signal.SIGSTOP)
    stopped(old)
    new = start(restart=1)
    code, said = end(new)
    assert code == 0, said
    assert any("continuing from step" in line for line in said)
    before = files_of(run)
    assert {name.split("/")[1] for name in before if name.startswith("checkpoints/0")} == {
        "000000110-2", "000000115-2", "000000120-2"
    }  # fmt: skip

    old.send_signal(signal.SIGCONT)
    code, said = end(old)
    assert code == 2
    (line,) = [line for line in said if line.startswith("error")]
    assert "Traceback" not in "".join(said)
    assert line.startswith(f"error: {run} was taken over by process {new.pid} on ")
    assert files_of(run) == before


def test_a_killed_owners_lock_is_recognised_at_once(start, tmp_path):
    first = start()
    wait_for_line(first, "step 12/")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = start()
    code, said = end(second)
    assert code == 0
    assert said[0].startswith(f"{tmp_path}/run: continuing from step 10 of 120")
