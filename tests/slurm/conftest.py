"""The cluster, jobs on it, and the table of what became of them."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from cluster import Cluster, missing, version
from jobs import REPOSITORY, Job, Outcome

OUTCOMES = pytest.StashKey[list[Outcome]]()
Submit = Callable[..., Job]
BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", action="store_true", help="write the closing table for docs/results.md")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why := missing():
        # Where it must be there, the environment says so.
        (pytest.fail if os.environ.get("CS324DIST_CI") else pytest.skip)(why)
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        cluster = Cluster(Path(folder), nodes=3)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def breakable(cluster) -> Iterator[Cluster]:
    """The cluster for a test that takes nodes away: they are back afterwards, however it ends."""
    yield cluster
    cluster.restore()


@pytest.fixture(scope="session")
def submit(cluster, launch_environment, tmp_path_factory) -> Submit:
    """Submit a script from a checkout of its own; `options` are those of sbatch."""

    def submit(
        script: str,
        *arguments: str,
        nodes: int | str = 2,
        options: tuple[str, ...] = (),
        checkout: Path | None = None,
    ) -> Job:
        if checkout is None:
            checkout = tmp_path_factory.mktemp("checkout")
            for name in ("slurm", "launch", "examples", "accelerate_configs", ".venv"):
                if (REPOSITORY / name).exists():
                    (checkout / name).symlink_to(REPOSITORY / name)
        command = ["sbatch", "--parsable", f"--nodes={nodes}", *options, f"slurm/{script}", *arguments]
        # What launchers that are killed leave behind goes away with the checkout.
        environment = {**launch_environment, "TMPDIR": str(checkout)}
        return Job(cluster, checkout, cluster.call(*command, cwd=checkout, env=environment).strip())

    return submit


@pytest.fixture(scope="session")
def uninterrupted(submit) -> Submit:
    """Jobs that nothing happens to, each asked for once."""
    known = {}

    def job(*arguments, nodes=2):
        if (arguments, nodes) not in known:
            known[arguments, nodes] = submit(*arguments, nodes=nodes)
            known[arguments, nodes].wait_for_end()
        return known[arguments, nodes]

    return job


@pytest.fixture
def outcomes(request) -> list[Outcome]:
    """The rows of the closing table."""
    return request.config.stash.setdefault(OUTCOMES, [])


def pytest_terminal_summary(terminalreporter, config) -> None:
    if rows := config.stash.get(OUTCOMES, []):
        terminalreporter.section("faults on a Slurm cluster")
        terminalreporter.line(f"{'scenario':<60}{'requeues':>9}{'seconds':>9}  equal")
        for row in rows:
            seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
            equal = {None: "", True: "yes", False: "NO"}[row.equal]
            terminalreporter.line(f"{row.scenario:<60}{row.requeues:>9}{seconds:>9}  {equal}")
        terminalreporter.line(
            "seconds: from the fault to the next step; equal: weights and optimizer state at the"
        )
        terminalreporter.line("end, to the last bit, to those of a run that nothing interrupted")
        if config.getoption("--store"):
            from chaos import store  # it imports torch

            counts = {name: len(terminalreporter.getreports(name)) for name in ("passed", "failed")}
            table = [asdict(row) for row in rows]
            store("slurm", BEGAN, version=version(), tests=counts, table=table)
