"""Faults that are no crashes: a full disk, a loss that is no number, a process that hangs, no memory."""

import json
import math
import resource
import signal
from pathlib import Path

import psutil
import pytest
from launched import status, wait_for_line
from safetensors.torch import load_file

from cs324dist.runs.checkpoints import verify_checkpoint
from cs324dist.runs.history import step_of

pytestmark = pytest.mark.slow  # real processes, signals and faults: minutes

LSTM = ("launch/lstm.py", "--length", "4", "--batch-size", "8", "--log-every", "1", "--wandb", "disabled")
FAULTY = ("launch/train.py", "tests/faulty.py:LSTM")


def metrics(run: Path) -> list[dict]:
    """Every line, read as strictly as JSON has it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    content = (run / "metrics.jsonl").read_text()
    assert content.endswith("\n") or not content
    return [json.loads(line, parse_constant=refuse) for line in content.splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_valid_and_finite(checkpoint: Path) -> None:
    verify_checkpoint(checkpoint)
    for path in checkpoint.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def errors(said: str) -> list[str]:
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error")]


def test_a_picture_that_cannot_be_written_does_not_end_the_run(start_python, tmp_path):
    run = tmp_path / "run"
    smoke = ("launch/gan.py", "--dataset", "fake", "--batch-size", "8", "--latent-dim", "8")
    every = ("--steps", "9", "--log-every", "1", "--evaluate-every", "3", "--checkpoint-every", "9")
    process = start_python(*smoke, *every, "--wandb", "disabled", "--run-dir", run)
    wait_for_line(process, "step 1/")
    (run / "samples").rmdir()
    (run / "samples").write_text("no folder")
    said = process.stderr.read()
    assert process.wait() == 0
    assert said.count("warning: no picture of step") == 3
    assert status(run)["state"] == "finished"


class TestNotANumber:
    @pytest.mark.parametrize(("log", "save"), [("1", "1"), ("50", "3"), ("7", "50")])
    def test_the_run_fails_in_one_line_that_names_the_last_good_checkpoint(self, launch, tmp_path, log, save):
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


class TestOneOfTwoProcesses:
    TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    LONG = ("--hidden-size", "8", "--steps", "1000000", "--checkpoint-every", "10",
            "--evaluate-every", "1000000")  # fmt: skip

    @pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is killed"])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_all_end_and_it_is_said(self, start_python, tmp_path, number, rank):
        run = tmp_path / "run"
        process = start_python(*self.TWO, *LSTM, *self.LONG, "--peer-timeout", "5", "--run-dir", run)
        wait_for_line(process, "step 20/")
        children = psutil.Process(process.pid).children(recursive=True)
        workers = {child.environ()["RANK"]: child for child in children if "LOCAL_RANK" in child.environ()}
        workers[str(rank)].send_signal(number)
        said = process.stderr.read()
        assert process.wait() == 1
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        if number == signal.SIGSTOP:
            answer = "another process did not answer within 5 s (--peer-timeout)"
            assert f"error on rank {1 - rank}: {answer}" in said
        if rank == 1:
            assert status(run)["state"] == "failed"
        assert_valid_and_finite(max((run / "checkpoints").iterdir()))

    def test_the_launchers_signal_after_a_crash_is_no_request_to_stop(
        self, start_python, launch_environment, tmp_path
    ):
        run = tmp_path / "run"
        command = (*self.TWO, *FAULTY, *LSTM[1:], "--peer-timeout", "60", "--run-dir", run)
        fault = {"FAULT": "dies beside a busy one"}
        process = start_python(*command, env={**launch_environment, **fault})
        said = process.stderr.read()
        assert process.wait() == 1
        assert status(run)["state"] == "failed"
        assert "error on rank 0: another process of the run has ended: see what it said" in said


def with_little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


class TestMemory:
    def test_too_little_names_the_option_to_lower_and_its_value(self, start_python, tmp_path):
        run = tmp_path / "run"
        command = (*LSTM, "--hidden-size", "65536", "--run-dir", run)
        process = start_python(*command, preexec_fn=with_little_memory)
        said = process.stderr.read()
        assert process.wait() == 1
        (line,) = errors(said)
        assert line.endswith("out of memory: lower the batch size (--batch-size)")
        assert not (run / "status.json").exists()
