"""All Python of docs/your_own_task.md is run: the first line of a block says which file it is."""

import os
import re
from pathlib import Path

import pytest
from launched import metrics, python, status

from cs324dist.testing import assert_same_on, assert_same_when_killed

PAGE = Path(__file__).parents[1] / "docs" / "your_own_task.md"


def blocks_of(page):
    return re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(PAGE)


@pytest.fixture
def run(tmp_path, launch_environment):
    """Run Python on the files of the page, in a folder of their own."""
    for name, code in BLOCKS:
        (tmp_path / name).write_text(code)

    def run(*words: str) -> str:
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = python(*words, cwd=tmp_path, env={**launch_environment, "PYTHONPATH": path})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    return run


def test_every_block_is_a_file():
    assert PAGE.read_text().count("```python") == len(BLOCKS)
    files = ["my_data.py", "train.py", "my_task.py", "use.py", "use_weights.py", "weighted.py", "averaged.py"]
    assert [name for name, _ in BLOCKS] == [*files, "test_my_task.py"]


@pytest.mark.slow
def test_the_script_runs_and_the_task_learns(run, tmp_path):
    run("train.py")
    run("my_task.py", "--wandb", "disabled", "--run-dir", "runs/mine")
    assert metrics(tmp_path / "runs" / "mine")[-1]["eval/accuracy"] > 0.8
    run("use.py")
    run("use_weights.py")


@pytest.mark.slow
def test_the_weighted_task_stops_early(run, tmp_path):
    often = ("--evaluate-every", "4", "--steps", "400")
    run("weighted.py", *often, "--wandb", "disabled", "--run-dir", "run")
    assert status(tmp_path / "run")["state"] == "finished"
    assert status(tmp_path / "run")["step"] < 400


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "command",
    [
        ("averaged.py", "--micro-batches", "4", "--checkpoint-every", "5", "--log-every", "1"),
        ("averaged_loop.py", "--run-dir", "{run}"),
    ],
    ids=lambda command: command[0],
)
def test_averaged_weights_are_continued(command, processes, tmp_path, monkeypatch):
    for name, code in BLOCKS + blocks_of(PAGE.with_name("own_loop.md")):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    assert_same_when_killed(command, tmp_path / "runs", processes=processes)
    if processes > 1:
        assert_same_on(1, processes, command=command, folder=tmp_path / "others")


@pytest.mark.slow
def test_the_test_of_the_page_passes(run):
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_task.py")
