"""The example with a loop of its own keeps what docs/own_loop.md says of it."""

import difflib

import pytest
from launched import REPOSITORY, Launched, metrics, newest_checkpoint

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
