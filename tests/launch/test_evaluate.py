"""launch/evaluate.py: figures that repeat, beside what they are to be held against."""

import hashlib
import json
from pathlib import Path

import pytest

from cs324dist.data import fetch
from cs324dist.metrics.digits import WEIGHTS

TWO = ("--config_file", "accelerate_configs/cpu_ddp.yaml")


@pytest.fixture(scope="module")
def run(launch, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("evaluate") / "run"
    launch("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--wandb", "disabled", "--run-dir", run)
    return run


@pytest.mark.slow
def test_figures_are_printed_and_stored_and_repeat_to_the_last_digit(launch, run, mnist_root, tmp_path):
    command = ("launch/evaluate.py", run, "--count", "1000", "--data-root", mnist_root)
    done = launch(*command)
    stored = (run / "evaluation.json").read_text()
    figures = json.loads(stored)
    assert f"Fréchet distance  {figures['frechet_distance']:.3f}" in done.stdout
    assert figures["classifier_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert 0 < figures["floor"] < 5  # real digits are near digits, noise is far from them
    assert min(figures["frechet_distance"], figures["frechet_distance_to_training_images"]) > 50
    assert 0.97 < figures["sure_of_test_images"] < 0.98
    assert sum(figures["shares"]) == pytest.approx(1)
    launch(*command, "--out", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == stored
    checkpoint = run / "checkpoints" / "000000020-1"  # it may be deleted: what was found goes to the run
    launch("launch/evaluate.py", checkpoint, *command[2:], "--seed", "1")
    other = json.loads((run / "evaluation.json").read_text())
    assert other["frechet_distance"] != figures["frechet_distance"]
    assert not (checkpoint / "evaluation.json").exists()


@pytest.mark.slow
def test_two_processes_share_the_work(launch, run, mnist_root, tmp_path):
    command = ("launch/evaluate.py", run, "--count", "1001", "--data-root", mnist_root, "--out")
    launch(*command, tmp_path / "one.json")
    launch(*command, tmp_path / "two.json", launcher="accelerate", options=TWO)
    words = ("weights", "dataset", "classifier_sha256")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [two.pop(name) for name in words] == [one.pop(name) for name in words]
    assert two.pop("shares") == pytest.approx(one.pop("shares"), rel=1e-9)
    assert two == pytest.approx(one, rel=1e-9)


def test_a_run_without_a_generator_is_refused(launch, tmp_path):
    done = launch("launch/evaluate.py", tmp_path, check=False)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)


@pytest.mark.slow
@pytest.mark.skipif(not fetch._DEBIAN_FASHION_MNIST.exists(), reason="needs dataset-fashion-mnist")
def test_a_run_on_other_images_is_judged_by_a_classifier_of_those(launch, tmp_path):
    def train(script: str) -> Path:
        run = tmp_path / script
        options = ("--preset", "smoke", "--dataset", "fashion-mnist", "--data-root", tmp_path)
        launch(f"launch/{script}.py", *options, "--wandb", "disabled", "--run-dir", run)
        return run

    gan, classifier = train("gan"), train("classifier")
    command = ("launch/evaluate.py", gan, "--count", "1000", "--data-root", tmp_path)
    done = launch(*command, check=False)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    assert "launch/classifier.py --dataset fashion-mnist" in done.stderr
    checkpoint = gan / "checkpoints" / "000000020-1"
    assert "knows mnist" in launch("launch/evaluate.py", checkpoint, check=False).stderr
    launch(*command, "--classifier", classifier)
    figures = json.loads((gan / "evaluation.json").read_text())
    weights = classifier / "checkpoints" / "000000020-1" / "classifier" / "model.safetensors"
    assert figures["dataset"] == "fashion-mnist"
    assert figures["classifier_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
