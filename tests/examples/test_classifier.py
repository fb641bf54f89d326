"""The digit classifier's recipe; tests/training/test_golden_curves.py holds it to the weights it gives."""

import pytest
from launched import metrics, newest_checkpoint

from cs324dist import accuracy, load_model
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import DigitClassifier


def test_the_share_of_right_answers_is_that_of_the_trained_network(launch, tmp_path):
    run = tmp_path / "run"
    smoke = ("--preset", "smoke", "--dataset", "fake", "--wandb", "disabled")
    launch("examples/classifier.py", *smoke, "--run-dir", run)
    network = load_model(newest_checkpoint(run) / "classifier", DigitClassifier)
    test = load_images("fake", "test", tmp_path)
    expected = accuracy(network(to_unit_range(test.images)), test.labels).item()
    assert metrics(run)[-1]["eval/accuracy"] == pytest.approx(expected)
