"""A run that was stopped or killed, and continued by the same command, ends as one that never was."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LSTM = ("launch/lstm.py", "--length", "10", "--steps", "60", "--log-every", "1", "--evaluate-every", "20",
        "--checkpoint-every", "20", "--wandb", "disabled")  # fmt: skip
GAN = ("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--steps", "30", "--log-every", "1",
       "--checkpoint-every", "10", "--wandb", "disabled")  # fmt: skip


def interrupted(command, run: Path, at_step: int, number: int, environment, launcher=()) -> int:
    """Start a run and send it a signal as soon as it has logged `at_step`; returns its exit code."""
    process = subprocess.Popen(
        [sys.executable, *launcher, *command, "--run-dir", str(run)],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        for line in process.stderr:
            if line.startswith(f"step {at_step}/"):
                process.send_signal(number)
                break
        process.stderr.read()
    return process.returncode


def content_of(run: Path) -> dict[str, bytes]:
    """The bytes of the newest checkpoint's tensors, and the metrics without the throughput."""
    newest = max((run / "checkpoints").iterdir())
    content = {str(path.relative_to(newest)): path.read_bytes() for path in newest.rglob("*.safetensors")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("throughput/samples_per_second", None)
    return {**content, "step": newest.name.encode(), "metrics": json.dumps(lines).encode()}


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def never_stopped(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    launch(*LSTM, "--run-dir", run)
    assert status(run) == {"state": "finished", "step": 60, "why": ""}
    return content_of(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_leads_to_a_checkpoint_and_exit_code_75(
    tmp_path, launch_environment, launch, never_stopped, number
):
    run = tmp_path / "run"
    assert interrupted(LSTM, run, 30, number, launch_environment) == 75
    assert status(run)["state"] == "stopped"
    stopped_at = status(run)["step"]
    assert 30 <= stopped_at < 60
    assert int(max((run / "checkpoints").iterdir()).name) == stopped_at
    assert f"continuing from step {stopped_at}" in launch(*LSTM, "--run-dir", run).stderr
    assert content_of(run) == never_stopped


def test_a_killed_run_goes_back_to_its_last_checkpoint(tmp_path, launch_environment, launch, never_stopped):
    run = tmp_path / "run"
    assert interrupted(LSTM, run, 30, signal.SIGKILL, launch_environment) == -signal.SIGKILL
    assert "continuing from step 20 of 60" in launch(*LSTM, "--run-dir", run).stderr
    assert content_of(run) == never_stopped


def test_two_processes_agree_on_the_step_to_stop_after(tmp_path, launch_environment, launch, never_stopped):
    run = tmp_path / "run"
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert interrupted(LSTM, run, 30, signal.SIGTERM, launch_environment, two) != 0
    assert status(run)["state"] == "stopped"
    launch(*LSTM, "--run-dir", run)  # and one process goes on with what two began
    assert status(run)["state"] == "finished"
    step, metrics = content_of(run)["step"], json.loads(content_of(run)["metrics"])
    assert step == never_stopped["step"]
    whole = json.loads(never_stopped["metrics"])
    assert [line["step"] for line in metrics] == [line["step"] for line in whole]
    losses, expected = ([line.get("train/loss") for line in lines] for lines in (metrics, whole))
    assert losses == pytest.approx(expected, abs=1e-3)


def test_a_finished_run_says_so(tmp_path, launch):
    run = tmp_path / "run"
    command = ("launch/lstm.py", "--preset", "smoke", "--wandb", "disabled", "--run-dir", run)
    launch(*command)
    before = content_of(run)
    assert f"{run} is finished, 20 steps" in launch(*command).stderr
    assert content_of(run) == before
    assert "continuing from step 20 of 25" in launch(*command, "--steps", "25").stderr


@pytest.mark.slow
def test_a_killed_gan_ends_as_one_that_never_was(tmp_path, launch_environment, launch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    launch(*GAN, "--run-dir", whole)
    interrupted(GAN, run, 17, signal.SIGKILL, launch_environment)
    assert "continuing from step 10 of 30" in launch(*GAN, "--run-dir", run).stderr
    assert content_of(run) == content_of(whole)
