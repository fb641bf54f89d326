"""Two small examples: what they learn, and bad data; golden curves hold the classifier to its weights."""

import pytest
from launched import metrics, newest_checkpoint

from cs324dist import accuracy, load_model
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import DigitClassifier

MLP = ("examples/mlp.py", "--steps", "400", "--wandb", "disabled")


def test_the_share_of_right_answers_is_that_of_the_trained_network(launch, tmp_path):
    run = tmp_path / "run"
    smoke = ("--preset", "smoke", "--dataset", "fake", "--wandb", "disabled")
    launch("examples/classifier.py", *smoke, "--run-dir", run)
    network = load_model(newest_checkpoint(run) / "classifier", DigitClassifier)
    test = load_images("fake", "test", tmp_path)
    expected = accuracy(network(to_unit_range(test.images)), test.labels).item()
    assert metrics(run)[-1]["eval/accuracy"] == pytest.approx(expected)


def test_the_mlp_learns(launch, tmp_path):
    launch(*MLP, "--run-dir", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["eval/accuracy"] >= 0.95


def test_a_table_that_is_none_is_one_line(launch, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("length,width\n1,2\n")
    done = launch(*MLP, "--data", table, "--run-dir", tmp_path / "run", check=False)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    assert "table.csv cannot be read as a table of numbers" in done.stderr
