"""Two larger examples keep what the toolkit promises, with workers, BatchNorm, dropout, two optimizers."""

import pytest
from launched import metrics

from cs324dist.testing import assert_same_on, assert_same_when_killed

SMALL = ("--steps", "6", "--batch-size", "12", "--micro-batches", "3", "--log-every", "1",
         "--evaluate-every", "3", "--checkpoint-every", "2")  # fmt: skip


@pytest.fixture(scope="module")
def photos(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    launch("examples/shapes.py", folder, "60")
    return ("examples/photos.py", "--data", folder, "--workers", "1", *SMALL)


@pytest.fixture(scope="module")
def gpt(launch, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "sentences.txt"
    launch("examples/sentences.py", text, "300")
    return ("examples/gpt.py", "--text", text, "--context", "24", "--head-size", "4", *SMALL)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("CS324DIST_THREADS", "1")


@pytest.mark.slow
def test_photos_is_the_same_on_one_process_and_three(photos, tmp_path):
    assert_same_on(1, 3, command=photos, folder=tmp_path)
    assert 0 <= metrics(tmp_path / "1")[-1]["eval/accuracy"] <= 1


@pytest.mark.slow
def test_gpt_is_the_same_on_one_process_and_three(gpt, tmp_path):
    assert_same_on(1, 3, command=gpt, folder=tmp_path)
    losses = [row["eval/loss"] for row in metrics(tmp_path / "1") if "eval/loss" in row]
    assert losses[0] < 5.6  # of 256 equally likely characters: 5.55
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_gpt_ends_the_same_when_killed(gpt, tmp_path):
    assert_same_when_killed((*gpt, "--steps", "30"), tmp_path)


@pytest.mark.slow
def test_photos_reads_what_it_is_said_to(launch, tmp_path):
    launch("examples/shapes.py", tmp_path / "shapes")
    run = ("--run-dir", tmp_path / "run", "--wandb", "disabled")
    launch("examples/photos.py", "--data", tmp_path / "shapes", *run)
    assert metrics(tmp_path / "run")[-1]["eval/accuracy"] >= 0.95


@pytest.mark.slow
def test_gpt_learns_what_it_is_said_to(launch, tmp_path):
    text = tmp_path / "sentences.txt"
    entropy = float(launch("examples/sentences.py", text).stdout)
    assert entropy == pytest.approx(0.350, abs=5e-4)
    launch("examples/gpt.py", "--text", text, "--run-dir", tmp_path / "run", "--wandb", "disabled")
    assert entropy < metrics(tmp_path / "run")[-1]["eval/loss"] < 0.41


@pytest.mark.parametrize(("folder", "problem"), [("nowhere", "is no folder"), ("", "holds no photos")])
def test_photos_that_are_not_there_are_refused(launch, tmp_path, folder, problem):
    run = ("--run-dir", tmp_path / "run", "--wandb", "disabled")
    done = launch("examples/photos.py", "--data", tmp_path / folder, *run, check=False)
    said = f"--data {tmp_path / folder} {problem}: give one that has a folder for each class"
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
