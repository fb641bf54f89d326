"""Some of the points that `make crash-points` tries, and every control. See `crash_points/points.py`."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import python

HERE = Path(__file__).with_name("crash_points")
CONTROLS = [
    *("fsync of files", "fsync of metrics", "fsync of folders", "temporary names of files"),
    *("temporary names of checkpoints", "renaming what is deleted", "metrics cut back"),
    *("a new file of metrics", "half a line taken back", "the check before a write", "generations", "nonces"),
]
Enumerate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def crash_points(launch_environment: dict[str, str]) -> Enumerate:
    if shutil.which("cc") is None and "CS324DIST_CI" not in os.environ:
        pytest.skip("no C compiler, `cc`")

    return lambda *arguments: python(HERE, *arguments, env=launch_environment)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seconds; it takes one minute on two cores
def test_no_fault_changes_how_a_run_ends(crash_points: Enumerate) -> None:
    done = crash_points("--stride", "17")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 bad, " in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_a_guard_some_point_fails_and_is_named(crash_points: Enumerate) -> None:
    done = crash_points(*(word for guard in CONTROLS for word in ("--without", guard)))
    found = dict(line.removeprefix("without ").split(": ", 1) for line in done.stdout.splitlines()[:-1])
    assert list(found) == CONTROLS, done.stdout + done.stderr
    assert all(" at k=" in point for point in found.values())
    assert done.returncode == 0
