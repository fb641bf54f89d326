"""A task of a user's own: any number of processes, a kill, bad data."""

import json
import signal

import pytest
import torch
from launched import Launched, files_of, metrics, newest_checkpoint
from safetensors.torch import load_file

MLP = ("examples/mlp.py", "--steps", "400", "--log-every", "1", "--checkpoint-every", "100",
       "--wandb", "disabled")  # fmt: skip


@pytest.fixture(scope="module")
def never_stopped(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("mlp") / "run"
    launch(*MLP, "--run-dir", run)
    return run


def test_it_learns(never_stopped):
    assert metrics(never_stopped)[-1]["eval/accuracy"] >= 0.95


def test_it_can_be_taken_again_to_the_last_bit(launch, never_stopped):
    refused = launch("launch/audit.py", never_stopped, check=False)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {never_stopped} is a run of 'mlp', which is no task of the project: "
        f"give --task path/to/file.py:Class\n"
    )
    done = launch("launch/audit.py", never_stopped, "--task", "examples/mlp.py:MLPTask")
    equal = [f"steps {start} to {start + 100}: equal to the last bit" for start in (200, 300)]
    assert done.stdout.splitlines() == equal


def test_it_is_trained_by_its_name_as_well(launch, never_stopped, tmp_path):
    run = tmp_path / "run"
    launch("launch/train.py", "examples/mlp.py:MLPTask", *MLP[1:], "--run-dir", run)
    ends = [load_file(newest_checkpoint(r) / "mlp" / "model.safetensors") for r in (run, never_stopped)]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


@pytest.mark.slow
def test_two_processes_train_the_same(launch, never_stopped, tmp_path):
    run = tmp_path / "run"
    options = ("--config_file", "accelerate_configs/cpu_ddp.yaml")
    launch(*MLP, "--run-dir", run, launcher="accelerate", options=options)
    losses = [
        [row["train/loss"] for row in metrics(r)[:50] if "train/loss" in row] for r in (run, never_stopped)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert metrics(run)[-1]["eval/accuracy"] == pytest.approx(
        metrics(never_stopped)[-1]["eval/accuracy"], abs=0.02
    )


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_never_was(launch, launch_environment, never_stopped, tmp_path):
    run = tmp_path / "run"
    with Launched(MLP, run, launch_environment) as started:
        started.wait_for_line("step 150/")
        started.send_signal(signal.SIGKILL)
        started.end()
    launch(*MLP, "--run-dir", run)
    ends = [files_of(newest_checkpoint(r)) for r in (run, never_stopped)]
    for end in ends:
        state = json.loads(end.pop("trainer.json"))
        assert state["step"] == 400
    assert ends[0] == ends[1]
    weights = load_file(newest_checkpoint(run) / "mlp" / "model.safetensors")
    assert weights["net.4.weight"].shape == torch.Size([3, 64])


def test_a_table_that_is_none_is_one_line(launch, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("length,width\n1,2\n")
    done = launch(*MLP, "--data", table, "--run-dir", tmp_path / "run", check=False)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    assert "table.csv cannot be read as a table of numbers" in done.stderr


def test_a_preset_that_it_has_not_is_refused(launch, tmp_path):
    done = launch(*MLP, "--preset", "smoke", "--run-dir", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --preset smoke is not allowed: give one of fast\n"
