"""The example with a loop of its own keeps what docs/own_loop.md says of it."""

import difflib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from launched import REPOSITORY, Launched, metrics, newest_checkpoint

from cs324dist.runs.checkpoints import step_of
from cs324dist.testing import assert_same_on

SCRIPT = REPOSITORY / "examples/own_loop.py"


@pytest.fixture(scope="module")
def data(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    launch("examples/shapes.py", folder, "120")
    return folder


def tensors(run):
    """The bytes of the last checkpoint's tensors, and the metrics."""
    files = sorted(newest_checkpoint(run).rglob("*.safetensors"))
    rows = [(row["step"], row.get("accuracy")) for row in metrics(run)]
    return [file.read_bytes() for file in files], rows


def test_it_is_the_loop_before_with_at_most_20_other_lines():
    before, after = (
        (REPOSITORY / "examples" / name).read_text().splitlines()
        for name in ("own_loop_before.py", "own_loop.py")
    )
    changed = [line for line in difflib.ndiff(before, after) if line.startswith("+ ") and line[2:].strip()]
    assert len(changed) <= 20, changed


@pytest.mark.slow
def test_it_is_the_same_on_one_to_four_processes_and_by_each_launcher(launch_environment, data, tmp_path):
    command = (SCRIPT, "--data", data, "--epochs", "4", "--run-dir", "{run}")
    assert_same_on(1, 2, 3, 4, command=command, folder=tmp_path)
    for launcher in ("accelerate with one", "accelerate with two"):
        words = (str(SCRIPT), "--data", str(data), "--epochs", "4")
        with Launched(words, tmp_path / launcher, launch_environment, launcher) as started:
            assert started.end() == 0, started.said
        assert tensors(tmp_path / launcher) == tensors(tmp_path / "1")


@pytest.mark.slow
def test_killed_ten_times_on_other_numbers_of_processes_it_ends_the_same(data, tmp_path):
    drawn = random.Random(0)
    options = ("--data", str(data), "--epochs", "60")
    subprocess.run([sys.executable, SCRIPT, *options, "--run-dir", tmp_path / "whole"], check=True)
    run = tmp_path / "killed"
    for _ in range(10):
        before = step_of(newest_checkpoint(run)) if (run / "checkpoints").exists() else 0
        launcher = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(drawn.randint(1, 4)),
        )
        process = subprocess.Popen(
            [sys.executable, *launcher, SCRIPT, *options, "--run-dir", run], start_new_session=True
        )
        while process.poll() is None and not list(run.glob("checkpoints/0*")):
            time.sleep(0.01)
        while process.poll() is None and step_of(newest_checkpoint(run)) <= before + 20 * drawn.randint(0, 1):
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    subprocess.run([sys.executable, SCRIPT, *options, "--run-dir", run], check=True)
    assert tensors(run) == tensors(tmp_path / "whole")
