"""A job that trains, watched through what it leaves behind."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, wait_until

from cs324dist.runs.files import read_json
from cs324dist.runs.history import checkpoints_in
from cs324dist.runs.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 240  # seconds: a test must not depend on the machine's speed
WORKER = " -u launch/"  # in its command line
LAUNCHER = "python slurm/accelerate_launch.py"


@dataclass
class Outcome:
    """A row of the closing table."""

    scenario: str
    requeues: int
    seconds: float | None = None
    equal: bool | None = None


class Job:
    """One job, or one task of an array."""

    def __init__(self, cluster: Cluster, checkout: Path, number: str, run: str = "run") -> None:
        self.cluster, self.checkout, self.number = cluster, checkout, number
        self.run = RunDir(checkout / run)

    @property
    def facts(self) -> dict[str, str]:
        """What Slurm says about it."""
        words = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def restarts(self) -> int:
        return int(self.facts["Restarts"])

    @property
    def output(self) -> str:
        path = Path(self.facts["StdOut"])
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        """What the run's status says."""
        return read_json(self.run.path / "status.json")["state"]

    @property
    def step(self) -> int:
        """The step that the run's status says."""
        return read_json(self.run.path / "status.json")["step"]

    @property
    def logged_step(self) -> int:
        """The last step with a line of metrics."""
        return max((row["step"] for row in self.run.read_metrics()), default=0)

    def signal_of_time_limit(self) -> None:
        """Send what Slurm sends ahead of the time limit, to the batch shell."""
        self.cluster.call("scancel", "--batch", "--signal=USR1", self.number)

    def wait_for(self, what: str, ready) -> None:
        try:
            wait_until(what, ready, PATIENCE)
        except AssertionError as error:
            said = f"{self.output[-4000:]}\nslurmctld.log:\n{self.cluster.controller_log[-8000:]}"
            raise AssertionError(f"{error}\n{self.facts}\n{said}") from None

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: self.logged_step >= step)

    def wait_for_worker(self, node: str) -> None:
        self.wait_for("a worker", lambda: self.cluster.processes(node, WORKER))

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        self.wait_for(
            "the job's end", lambda: self.facts["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")
        )
        assert self.facts["JobState"] == state, f"{self.facts}\n{self.output[-4000:]}"

    def wait_for_progress(self, restart: int) -> None:
        """Wait until a step has been taken after the restart with that number."""
        started = re.compile(rf"restart {restart},.*?(?:continuing from|starting at) step (\d+)", re.DOTALL)
        self.wait_for(f"restart {restart}", lambda: started.search(self.output))
        match = started.search(self.output)
        assert match
        self.wait_for_step(int(match[1]) + 1)

    @contextmanager
    def fault(self, scenario: str, outcomes: list[Outcome], *, or_once_more: bool = False) -> Iterator[None]:
        """What happens inside makes Slurm start the job again, after which it goes on.

        After a node failed, Slurm may kill the earlier start's step on another node so late that it meets the
        new start (seen in one of ten power failures): then it takes one start more.
        """
        before = self.restarts
        start = time.monotonic()
        yield
        self.wait_for_progress(before + 1)
        requeues = self.restarts - before
        outcomes.append(Outcome(scenario, requeues, time.monotonic() - start))
        assert requeues == 1 or (or_once_more and requeues == 2), self.output[-4000:]

    def tensors(self) -> dict[str, bytes]:
        """The files of the newest checkpoint that hold weights and optimizer state."""
        newest = checkpoints_in(self.run.checkpoints)[0]
        return {str(path.relative_to(newest)): path.read_bytes() for path in newest.rglob("*.safetensors")}

    def losses(self) -> list[tuple[int, float]]:
        """The steps that were logged, and their losses."""
        return [(row["step"], row["train/loss"]) for row in self.run.read_metrics() if "train/loss" in row]

    def assert_as_if_uninterrupted(self, reference: "Job", outcomes: list[Outcome]) -> None:
        """It ended at the end of the run, with every step logged once and the weights of `reference`."""
        self.wait_for_end()
        assert self.state == "finished"
        equal = self.tensors() == reference.tensors()
        for outcome in outcomes:
            outcome.equal = equal
        assert equal
        steps = [[row["step"] for row in job.run.read_metrics()] for job in (self, reference)]
        assert steps[0] == steps[1]
