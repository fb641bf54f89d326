"""Some of the points that `make crash-points` tries, and every control. See `crash_points/points.py`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).with_name("crash_points")
CONTROLS = [
    "fsync of files",
    "fsync of metrics",
    "fsync of folders",
    "temporary names of files",
    "temporary names of checkpoints",
    "renaming what is deleted",
    "metrics cut back",
    "a new file of metrics",
    "half a line taken back",
    "the check before a write",
    "generations",
    "nonces",
]
Enumerate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def crash_points(launch_environment: dict[str, str]) -> Enumerate:
    if shutil.which("cc") is None and "CS324DIST_CI" not in os.environ:
        pytest.skip("no C compiler, `cc`")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, HERE, *arguments]
        return subprocess.run(command, env=launch_environment, capture_output=True, text=True, check=False)

    return run


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


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(HERE)
    from disk import Disk

    (run := tmp_path / "run").mkdir()
    disk = Disk(run)
    yield disk
    disk.close()


def test_of_a_power_cut_only_what_was_synced_is_left(disk) -> None:
    (folder := disk.root / "folder").mkdir()
    (written := folder / ".written.tmp").write_bytes(b"12")
    disk.look()
    disk.sync(written)
    written.write_bytes(b"1234")
    disk.look()
    assert disk.tree(bytes_lost=True) == {".": None, "folder": None, "folder/.written.tmp": b"12"}
    assert disk.tree(names_lost=True) == {".": None, "folder": None}
    disk.sync(folder)
    disk.sync(written)
    written.rename(folder / "written")
    disk.look()
    assert disk.tree() == {".": None, "folder": None, "folder/written": b"1234"}
    lost = {"bytes_lost": True, "names_lost": True}
    assert disk.tree(**lost) == {".": None, "folder": None, "folder/.written.tmp": b"1234"}
    disk.sync(folder)
    (folder / "written").unlink()
    disk.look()
    assert disk.tree(**lost) == {".": None, "folder": None, "folder/written": b"1234"}


def test_half_of_a_write_is_half_of_what_it_adds(disk) -> None:
    from disk import half_written

    assert half_written("a", {"a": b"12"}, {"a": b"123456"}) == {"a": b"1234"}
    assert half_written("a", {"a": bytes(4)}, {"a": b"1234"}) == {"a": b"12\0\0"}
    assert half_written("a", {}, {"a": b"12", "b": None}) == {"a": b"1", "b": None}
