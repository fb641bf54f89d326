"""Fixtures of more than one test module."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch
from hypothesis import HealthCheck, settings

from cs324dist.tasks.gan.images import fetch

# A test does not depend on the machine's speed.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

os.environ.setdefault("PYTHONHASHSEED", "0")  # a script that a test runs in this process need not start again
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that outnumber the cores cost thirty times
    os.environ.setdefault("CS324DIST_THREADS", "1")
    torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Tests of the CPU are the same on a machine with a GPU; `pytest -m gpu` alone sees it."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """A test that prepares its own process as a training script's would leave the next ones like it."""
    cores = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_autocast_cache_enabled(True)
    torch.set_num_threads(cores)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> None:
    """Models and inputs that the test makes are in double precision."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """A data root that holds MNIST: the environment's CS324DIST_TEST_DATA, or the repository's data/."""
    root = Path(os.environ.get("CS324DIST_TEST_DATA") or REPOSITORY / "data")
    fetch(root)
    return root


@pytest.fixture(scope="session")
def launch_environment() -> dict[str, str]:
    """What launched programs see: float32; one thread a process, as several run at a time; no login."""
    leave_out = {"WANDB_API_KEY", "OMP_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in leave_out}
    return {
        **kept,
        "ACCELERATE_MIXED_PRECISION": "no",
        "CS324DIST_THREADS": "1",
        "HF_HOME": os.devnull,
        "NETRC": os.devnull,
        "PYTHONHASHSEED": "0",
        "WANDB_SILENT": "true",
    }


class LaunchServer:
    """Runs scripts in forks of a process that has imported what they import; see `launch_server.py`."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, REPOSITORY / "tests" / "launch_server.py"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def run(self, command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        assert self._process.stdin
        assert self._process.stdout
        with NamedTemporaryFile("r") as stdout, NamedTemporaryFile("r") as stderr:
            order = {"command": command, "stdout": stdout.name, "stderr": stderr.name}
            print(json.dumps({**order, "environment": environment}), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())

    def end(self) -> None:
        self._process.communicate("null\n")


@pytest.fixture(scope="session")
def launch_server(launch_environment: dict[str, str]) -> Iterator[LaunchServer]:
    server = LaunchServer(launch_environment)
    yield server
    server.end()


@pytest.fixture(scope="session")
def launch(launch_environment: dict[str, str], launch_server: LaunchServer) -> Launch:
    """Run a script of the repository as a user does, through a launcher, and wait for it.

    `launcher` is "python" or "accelerate"; `options` are the launcher's. Several `processes` are torchrun's.
    What Python runs is forked from a process that has imported it, unless `environment` changes what an
    import reads.
    """

    def run(
        *command: str | Path,
        launcher: str = "python",
        processes: int = 0,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        check: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        if processes:
            launcher, options = "torchrun", ("--nproc_per_node", str(processes))
        words, changed = [*options, *map(str, command)], environment or {}
        if launcher == "python" and words[0] != "-c" and not READ_AT_IMPORT & changed.keys():
            done = launch_server.run(words, launch_environment | changed)
        else:
            done = subprocess.run(
                [*LAUNCHERS[launcher], *words],
                cwd=REPOSITORY,
                env=launch_environment | changed,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    return run


READ_AT_IMPORT = {"HF_HOME", "HOME", "OMP_NUM_THREADS", "PYTHONPATH"}
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch"],
}
