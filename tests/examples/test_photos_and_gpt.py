"""Two larger examples keep what the toolkit promises, with workers, BatchNorm, dropout, two optimizers."""

import importlib
import math
import random
import signal

import psutil
import pytest
from launched import REPOSITORY, Launched, metrics, newest_checkpoint, status

from cs324dist.runs.history import step_of
from cs324dist.testing import assert_same_on, assert_same_when_killed

SMALL = ("--steps", "6", "--batch-size", "12", "--micro-batches", "3", "--log-every", "1",
         "--evaluate-every", "3", "--checkpoint-every", "2")  # fmt: skip


@pytest.fixture(scope="module")
def photos(launch, tmp_path_factory):
    """The command for a few steps."""
    folder = tmp_path_factory.mktemp("shapes")
    launch("examples/shapes.py", folder, "60")
    return ("examples/photos.py", "--data", folder, "--workers", "1", *SMALL)


@pytest.fixture(scope="module")
def gpt(launch, tmp_path_factory):
    """The command for a few steps of a small one."""
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
def test_photos_ends_the_same_when_killed(photos, tmp_path):
    assert_same_when_killed((*photos, "--steps", "30"), tmp_path)


@pytest.mark.slow
def test_gpt_ends_the_same_when_killed(gpt, tmp_path):
    assert_same_when_killed((*gpt, "--steps", "30"), tmp_path)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_photos_leaves_a_checkpoint(photos, launch_environment, tmp_path):
    command = (*map(str, photos), "--steps", "9999", "--checkpoint-every", "9999", "--workers", "2")
    with Launched(command, tmp_path / "run", launch_environment) as started:
        started.wait_for_line("step 3/")
        own = psutil.Process(started.process.pid)
        for process in (*own.children(), own):  # as Slurm does
            process.send_signal(signal.SIGTERM)
        assert started.end() == 75
    assert status(tmp_path / "run")["state"] == "stopped"
    assert step_of(newest_checkpoint(tmp_path / "run")) >= 3


@pytest.mark.slow
def test_photos_reads_what_it_is_said_to(launch, tmp_path):
    launch("examples/shapes.py", tmp_path / "shapes")
    launch(
        "examples/photos.py",
        "--data",
        tmp_path / "shapes",
        "--run-dir",
        tmp_path / "run",
        "--wandb",
        "disabled",
    )
    assert metrics(tmp_path / "run")[-1]["eval/accuracy"] >= 0.95


@pytest.mark.slow
def test_gpt_learns_what_it_is_said_to(launch, tmp_path):
    text = tmp_path / "sentences.txt"
    entropy = float(launch("examples/sentences.py", text).stdout)
    assert entropy == pytest.approx(0.350, abs=5e-4)
    launch("examples/gpt.py", "--text", text, "--run-dir", tmp_path / "run", "--wandb", "disabled")
    assert entropy < metrics(tmp_path / "run")[-1]["eval/loss"] < 0.41


def test_the_entropy_of_the_sentences_is_that_of_what_they_are_drawn_from(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    sentences = importlib.import_module("sentences")
    small = {"whole": ("{letter}{letter}", "0"), "letter": ("a", "b", "cc")}
    monkeypatch.setattr(sentences, "GRAMMAR", small)
    likely = {"0": 1 / 2, **{a + b: 1 / 18 for a in small["letter"] for b in small["letter"]}}
    nats, characters = sentences.entropy_and_length("{whole}.")
    assert nats == pytest.approx(-sum(p * math.log(p) for p in likely.values()))
    assert characters == pytest.approx(1 + sum(p * len(text) for text, p in likely.items()))
    rng = random.Random(0)
    assert {sentences.write("{whole}", rng) for _ in range(1000)} == set(likely)


def test_a_photo_that_cannot_be_read_is_named(launch, tmp_path):
    launch("examples/shapes.py", tmp_path / "shapes", "60")
    broken = tmp_path / "shapes" / "cross" / "00001.png"
    broken.write_bytes(b"no picture")
    command = (
        "examples/photos.py",
        "--data",
        tmp_path / "shapes",
        "--run-dir",
        tmp_path / "run",
        "--workers",
        "1",
    )
    done = launch(*command, "--wandb", "disabled", check=False)
    assert done.returncode == 2
    assert f"error: {broken} cannot be read: cannot identify image file" in done.stderr


@pytest.mark.parametrize("words", [(), ("--help",), ("shapes", "many"), ("shapes", "3", "4")])
def test_shapes_says_how_it_is_called(launch, tmp_path, words):
    script = REPOSITORY / "examples" / "shapes.py"
    done = launch(
        "-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", *words, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: give a folder, and a number of photos if not 1200: shapes.py FOLDER [COUNT]\n"
    )


@pytest.mark.parametrize(("folder", "problem"), [("nowhere", "is no folder"), ("", "holds no photos")])
def test_photos_that_are_not_there_are_refused(launch, tmp_path, folder, problem):
    run = ("--run-dir", tmp_path / "run", "--wandb", "disabled")
    done = launch("examples/photos.py", "--data", tmp_path / folder, *run, check=False)
    said = f"--data {tmp_path / folder} {problem}: give one that has a folder for each class"
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
