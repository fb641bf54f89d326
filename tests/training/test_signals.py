"""Signals at every moment: what goes on is finished, thrown away or left as it was, and nothing lives on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from chaos import content_of
from launched import LIMIT, Launched, metrics, newest_checkpoint, status, trainer, wait_until

from cs324dist.runs.history import step_of

pytestmark = pytest.mark.slow  # real processes, signals and faults: minutes

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
LONG = ("launch/lstm.py", "--length", "10", "--steps", "5000", "--log-every", "1", "--evaluate-every", "5000",
        "--checkpoint-every", "5000", "--wandb", "disabled")  # fmt: skip
SMOKE = ("launch/lstm.py", "--preset", "smoke", "--wandb", "disabled")
# Two evaluations of eight parts, which take seconds.
EVALUATING = (*SMOKE, "--length", "2001", "--steps", "2", "--log-every", "1", "--evaluate-every", "1",
              "--checkpoint-every", "2")  # fmt: skip


def assert_stopped_with_a_checkpoint(run: Path, step: int) -> None:
    assert status(run)["state"] == "stopped"
    assert status(run)["step"] == trainer(run)["step"] == step_of(newest_checkpoint(run)) >= step
    assert not list(run.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    launch(*EVALUATING, "--run-dir", run)
    assert [sorted(line)[0] for line in metrics(run)] == ["step", "eval/accuracy"] * 2
    return content_of(run)


class TestTraining:
    def test_a_third_signal_ends_at_once_even_within_a_long_step(self, tmp_path, launch_environment):
        run = tmp_path / "run"
        command = ("launch/train.py", "tests/faulty.py:LSTM", *SMOKE[1:])
        with Launched(command, run, {**launch_environment, "FAULT": "hangs"}) as started:
            started.wait_for_line("in the long step")
            for _ in range(3):
                started.send_signal(TERM)
                time.sleep(2)  # or they would count as one
            assert started.end() == 128 + TERM

    def test_one_rank_alone_is_asked_and_all_stop(self, tmp_path, launch_environment):
        run = tmp_path / "run"
        with Launched(LONG, run, launch_environment, "torchrun with two") as started:
            started.wait_for_line("step 10/")
            started.workers()[1].send_signal(TERM)
            assert started.end() != 0
        assert_stopped_with_a_checkpoint(run, 10)


def test_an_evaluation_that_is_cut_short_twice_leaves_no_trace(tmp_path, launch, launch_environment, whole):
    run = tmp_path / "run"
    for beginning in ("step 1/2", f"{run}: continuing from step 1 of 2"):
        with Launched(EVALUATING, run, launch_environment) as started:
            started.wait_for_line(beginning)
            started.send_signal(TERM)
            assert started.end() == 75
        assert_stopped_with_a_checkpoint(run, 1)
        assert [line["step"] for line in metrics(run)] == [1]
        assert "eval/accuracy" not in metrics(run)[0]
    launch(*EVALUATING, "--run-dir", run)
    assert content_of(run) == whole


@pytest.mark.parametrize("number", [TERM, INT], ids=["TERM", "INT"])
def test_a_new_run_is_not_begun(tmp_path, launch_environment, number):
    run = tmp_path / "run"
    with Launched(SMOKE, run, launch_environment) as started:
        started.wait_until_importing()
        started.send_signal(number)
        code = started.end()
    expected = {TERM: (-TERM, ""), INT: (75, "stopped by a signal\n")}
    assert (code, started.said) == expected[number]
    assert not run.exists()


class TestLaunchers:
    @pytest.mark.parametrize("launcher", ["accelerate with one", "accelerate with two"])
    @pytest.mark.parametrize("number", [TERM, KILL, INT], ids=["TERM", "KILL", "INT"])
    def test_whatever_ends_a_launcher_its_workers_stop(self, tmp_path, launch_environment, launcher, number):
        run = tmp_path / "run"
        with Launched(LONG, run, launch_environment, launcher) as started:
            started.wait_for_line("step 10/")
            started.send_signal(number)
            assert started.end() != 0  # and waits for the workers' end
        assert_stopped_with_a_checkpoint(run, 10)

    @pytest.mark.parametrize("launcher", ["accelerate with one", "accelerate with two"])
    def test_workers_whose_launcher_dies_at_start_up_end(self, tmp_path, launch_environment, launcher):
        run = tmp_path / "run"
        with Launched(LONG, run, launch_environment, launcher) as started:
            started.wait_until_importing(workers=2 if launcher.endswith("two") else 1)
            started.send_signal(KILL)
            assert started.end() == -KILL
        assert not list(run.glob("checkpoints/0*"))

    @pytest.mark.parametrize("launcher_is", ["dead", "alive"])
    def test_a_worker_whose_launcher_has_died_before_ends(self, tmp_path, launch_environment, launcher_is):
        """Nobody would ever answer what it waits for: its launcher held the rendezvous."""
        came_so_far = tmp_path / "came so far"
        launcher = subprocess.run(
            [sys.executable, "-c", LAUNCHER_THAT_DIES, launcher_is, WORKER, came_so_far],
            env={**launch_environment, "TORCHELASTIC_RUN_ID": "none"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            check=True,
        )
        worker = int(launcher.stdout)
        wait_until(lambda: not psutil.pid_exists(worker))
        assert came_so_far.read_text() == {"dead": "began", "alive": "began, went on"}[launcher_is]


# It ends, or its worker does, before the other goes on.
LAUNCHER_THAT_DIES = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", *sys.argv[2:]], stdin=subprocess.PIPE)
print(worker.pid, flush=True)
if sys.argv[1] == "alive":
    worker.communicate(b"go on")
"""
WORKER = """
import pathlib, sys
sys.stdin.read()
came_so_far = pathlib.Path(sys.argv[1])
came_so_far.write_text("began")
from cs324dist.distributed.process import prepare_process
prepare_process(on_cpu=True)
came_so_far.write_text("began, went on")
"""
