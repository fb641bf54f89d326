"""A task of a user's own: any number of processes, a kill, bad data."""

import pytest
from launched import metrics

MLP = ("examples/mlp.py", "--steps", "400", "--log-every", "1", "--checkpoint-every", "100",
       "--wandb", "disabled")  # fmt: skip


@pytest.fixture(scope="module")
def never_stopped(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("mlp") / "run"
    launch(*MLP, "--run-dir", run)
    return run


def test_it_learns(never_stopped):
    assert metrics(never_stopped)[-1]["eval/accuracy"] >= 0.95


def test_a_table_that_is_none_is_one_line(launch, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("length,width\n1,2\n")
    done = launch(*MLP, "--data", table, "--run-dir", tmp_path / "run", check=False)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    assert "table.csv cannot be read as a table of numbers" in done.stderr
