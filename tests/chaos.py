"""Kill runs at random moments, start them again, and compare how they end with a run that was never killed.

    python tests/chaos.py --kills 200 --seed 0 --jobs 2

A trial starts a run, kills it in start-up, between two steps or in a checkpoint's write, starts the same
command again, and so on until it ends. With --micro-batches, each start is on another number of processes
and threads. Killed is one of: every process of the run, one worker, the launcher alone. The end must be that
of the run that was never killed: every tensor of the newest checkpoint byte for byte, and `metrics.jsonl` but
for the throughput. No process may be left behind by a kill.

Prints a line for each kind of run, stores them for docs/results.md with what they were measured on, and exits
with 1 if anything differed.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from cs324dist.runs.environment import environment

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
EVERY = ("--log-every", "1", "--checkpoint-every", "5", "--evaluate-every", "10", "--wandb", "disabled")
FAKE = ("--preset", "smoke", "--dataset", "fake", "--steps", "30", *EVERY)
TASKS = {
    "lstm": ("launch/lstm.py", "--preset", "smoke", "--steps", "60", *EVERY),
    "gan": ("launch/gan.py", *FAKE),
    "classifier": ("examples/classifier.py", *FAKE),
}
EXAMPLES = {
    "mlp": ("examples/mlp.py", "--steps", "60", *EVERY),
    "BatchNorm beside dropout": ("tests/normed_task.py", "--steps", "30", *EVERY),
}
MOMENTS = {"start-up": 2, "training": 4, "writing": 5}
MOST_KILLS = 10  # of one trial
LATER = 0.2  # seconds at most from a step's line to a kill: steps, evaluations and what follows a write
PATIENCE = 300  # seconds for a start that is not killed
UNTIL_GONE = 60  # seconds after a kill; what lives on is an orphan


@dataclass(frozen=True)
class Cell:
    """One kind of run."""

    task: str
    processes: tuple[int, ...]
    """One number, or several to draw from at each start, with as many --micro-batches as the last."""

    precision: str = "no"

    def layout(self, rng: random.Random) -> tuple[int, int]:
        """Processes, and threads of each."""
        processes = rng.choice(self.processes)
        return processes, rng.choice((1, 2)) if processes == 1 < len(self.processes) else 1

    def command(self, processes: int, run: Path) -> list[str]:
        launcher = (*TORCHRUN, str(processes)) if processes > 1 else ()
        exact = ("--micro-batches", str(self.processes[-1])) if len(self.processes) > 1 else ()
        script = (TASKS | EXAMPLES)[self.task]
        return [sys.executable, *launcher, *script, *exact, "--run-dir", str(run)]

    @property
    def title(self) -> str:
        """Of its row in the table, which all precisions share."""
        numbers = " to ".join(map(str, dict.fromkeys((self.processes[0], self.processes[-1]))))
        return f"{self.task}, {numbers} process{'es' * (numbers != '1')}"

    def __str__(self) -> str:
        return f"{self.title}, {self.precision}"


ONE_TO_FOUR = (1, 2, 3, 4)
SHARES = {(ONE_TO_FOUR, "no"): 3, (ONE_TO_FOUR, "bf16"): 1, ((2,), "no"): 1, ((1,), "no"): 1}
CELLS = {Cell(task, *kind): share for kind, share in SHARES.items() for task in ("gan", "classifier", "lstm")}
"""How many kills each gets, relative to the others."""


@dataclass
class Kill:
    """One kill, and the start that followed it."""

    processes: int
    moment: str
    target: str
    during_write: bool
    """A checkpoint's temporary folder was there right after the kill."""
    interrupted: bool
    """It still was when all processes were gone."""
    restart: float | None = None
    """Seconds from the next start to its first step; None if that took none."""


@dataclass
class Outcome:
    """What a cell's trials came to."""

    cell: Cell
    kills: list[Kill] = field(default_factory=list)
    trials: int = 0
    mismatches: list[str] = field(default_factory=list)
    orphans: int = 0


class Start:
    """One start of a run's command, and what it says."""

    def __init__(self, cell: Cell, layout: tuple[int, int], run: Path) -> None:
        self.run, self.lines = run, [""]
        self.processes, threads = layout
        self._stale = set(self.unfinished_writes())
        self.began = time.monotonic()
        self.first_step: float | None = None
        self.steps = 0
        leave_out = {"WANDB_API_KEY", "ACCELERATE_MIXED_PRECISION"}
        kept = {name: value for name, value in os.environ.items() if name not in leave_out}
        own = {
            "ACCELERATE_MIXED_PRECISION": cell.precision,
            "CS324DIST_THREADS": str(threads),
            "HF_HOME": os.devnull,
            "PYTHONPATH": str(REPOSITORY),
        }
        self.process = subprocess.Popen(
            cell.command(self.processes, run),
            cwd=REPOSITORY,
            env={**kept, **own},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stderr as said:
            for line in said:
                if line.startswith("step "):
                    self.first_step = self.first_step or time.monotonic() - self.began
                    self.steps += 1
                self.lines.append(line)

    def unfinished_writes(self) -> list[str]:
        folder = self.run / "checkpoints"
        with suppress(FileNotFoundError):
            return [entry.name for entry in os.scandir(folder) if entry.name.endswith(".tmp")]
        return []

    def is_writing(self) -> bool:
        return any(name not in self._stale for name in self.unfinished_writes())

    def wait_for(self, what) -> bool:
        """Wait until `what()`; False if the start has ended before."""
        until = time.monotonic() + PATIENCE
        while not what():
            if self.process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def end(self) -> int | None:
        """The exit code of a start that is left alone; None if it does not end."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(UNTIL_GONE)
        return code

    def victims(self, target: str, rng: random.Random) -> list[psutil.Process]:
        """All processes, one worker, or the launcher; without a launcher all."""
        try:
            launcher = psutil.Process(self.process.pid)
            below = launcher.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        workers = [process for process in below if belongs_to(process, self.run)]
        if target == "all":
            return rng.sample([launcher, *below], 1 + len(below))
        return [rng.choice(workers)] if target == "worker" and workers else [launcher]

    def kill(self, victims: list[psutil.Process]) -> bool:
        """SIGKILL; returns whether a checkpoint was just being written."""
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return self.is_writing()

    def wait_until_gone(self) -> int:
        """Wait for the end of all processes of the run; returns how many had to be killed for it."""
        until = time.monotonic() + UNTIL_GONE
        while time.monotonic() < until:
            if self.process.poll() is not None and not processes_of(self.run):
                self._reader.join(UNTIL_GONE)
                return 0
            time.sleep(0.05)
        orphans = processes_of(self.run)
        for process in orphans:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        return len(orphans)


def belongs_to(process: psutil.Process, run: Path) -> bool:
    try:
        return str(run) in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def processes_of(run: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if belongs_to(process, run)]


def newest(run: Path) -> Path:
    """The checkpoint of the latest owner, and of its own the latest."""
    found = [path for path in (run / "checkpoints").iterdir() if path.name[0].isdecimal()]
    return max(found, key=lambda path: [*map(int, reversed(path.name.split("-")))])


def content_of(run: Path) -> dict[str, str]:
    """Digests of the newest checkpoint's tensors, the task's state, the metrics without the throughput."""
    checkpoint = newest(run)
    state = json.loads((checkpoint / "trainer.json").read_text())["task"]
    metrics = re.sub(r', "throughput/\w+": [^,}]+', "", (run / "metrics.jsonl").read_text())
    digests = {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*.safetensors"))
    }
    step = checkpoint.name.partition("-")[0]
    return {"step": step, **digests, "task": json.dumps(state), "metrics.jsonl": metrics}


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(
        f"{name} differs" for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )


@dataclass
class Whole:
    """A run that was never killed: how it ends, and how long what takes."""

    content: dict[str, str]
    first_step: float
    write: float

    @classmethod
    def of(cls, cell: Cell, layout: tuple[int, int], run: Path) -> "Whole":
        start, writes = Start(cell, layout, run), []
        while start.wait_for(start.is_writing):
            began = time.monotonic()
            start.wait_for(lambda: not start.is_writing())
            writes.append(time.monotonic() - began)
        if start.end() != 0 or start.first_step is None:
            raise SystemExit(f"{cell} fails without a kill:\n{''.join(start.lines)}")
        return cls(content_of(run), start.first_step, statistics.median(writes or [LATER]))


def trial(outcome: Outcome, whole: Whole, planned: int, rng: random.Random, run: Path) -> None:
    """One run, killed up to `planned` times."""
    outcome.trials += 1
    previous: Kill | None = None
    for number in range(planned + 1):
        start = Start(outcome.cell, outcome.cell.layout(rng), run)
        moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        target = rng.choice(["all", "worker", "launcher"]) if start.processes > 1 else "all"
        victims = wait_for_moment(start, moment, target, whole, rng) if number < planned else []
        if killed := bool(victims):
            during_write = start.kill(victims)
            outcome.orphans += start.wait_until_gone()
            kill = Kill(start.processes, moment, target, during_write, start.is_writing())
            outcome.kills.append(kill)
        code = start.end()
        if previous:
            previous.restart = start.first_step
        if unwanted := [line for line in start.lines if re.search("warning: .*(damaged|lacks)", line)]:
            outcome.mismatches.append(f"{outcome.cell}: {unwanted[0]}")
        if not killed:
            break
        previous = kill
    if code != 0:
        outcome.mismatches.append(f"{outcome.cell}: exit code {code}: {''.join(start.lines[-20:])}")
        return
    different = differences(content_of(run), whole.content)
    if leftovers := [str(path.relative_to(run)) for path in run.rglob(".*.tmp")]:
        different.append(f"left behind: {leftovers}")
    if different:
        outcome.mismatches.append(f"{outcome.cell}: {'; '.join(different)}; kills: {outcome.kills[-number:]}")


def wait_for_moment(
    start: Start, moment: str, target: str, whole: Whole, rng: random.Random
) -> list[psutil.Process]:
    """Wait for the moment to kill; returns whom, nobody if the start has ended before."""
    if moment == "start-up":
        until = start.began + rng.uniform(0, whole.first_step)
        return start.victims(target, rng) if start.wait_for(lambda: time.monotonic() >= until) else []
    if not start.wait_for(lambda: start.steps):
        return []
    victims = start.victims(target, rng)  # ahead, as a write takes no longer than to find them
    if moment == "training":
        steps, delay = rng.randint(1, 12), rng.uniform(0, LATER)
        reached = start.wait_for(lambda: start.steps >= steps)
    else:
        for _ in range(rng.randint(0, 2)):  # let some pass
            start.wait_for(start.is_writing)
            start.wait_for(lambda: not start.is_writing())
        delay, reached = rng.uniform(0, 0.8 * whole.write), start.wait_for(start.is_writing)
    until = time.monotonic() + delay
    return victims if reached and start.wait_for(lambda: time.monotonic() >= until) else []


def torment(cell: Cell, kills: int, seed: int, folder: Path) -> Outcome:
    """Trials of one cell, until there were so many kills."""
    outcome, rng = Outcome(cell), random.Random(f"{seed} {cell}")
    own = folder / str(cell).replace(" ", "")
    whole = Whole.of(cell, (cell.processes[0], 1), own / "whole")
    while len(outcome.kills) < kills:
        planned = min(rng.randint(3, MOST_KILLS), kills - len(outcome.kills))
        run = own / f"trial-{outcome.trials}"
        trial(outcome, whole, planned, rng, run)
        shutil.rmtree(run)
        print(
            f"{cell}: {len(outcome.kills)} of {kills} kills, {len(outcome.mismatches)} mismatches",
            file=sys.stderr,
            flush=True,
        )
    shutil.rmtree(own)
    return outcome


def chaos(kills: int, seed: int, jobs: int, cells: Mapping[Cell, int] = CELLS) -> list[Outcome]:
    """Kill so many times at least, spread over the cells by their shares."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(torment, cell, -(-kills * share // sum(cells.values())), seed, Path(folder))
            for cell, share in cells.items()
        ]
        return [future.result() for future in waiting]


def summary(outcomes: Iterable[Outcome]) -> dict[str, int | float | None]:
    outcomes = list(outcomes)
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    restarts = [kill.restart for kill in kills if kill.restart is not None]
    return {
        "trials": sum(outcome.trials for outcome in outcomes),
        "kills": len(kills),
        "during_write": sum(kill.during_write for kill in kills),
        "mismatches": sum(len(outcome.mismatches) for outcome in outcomes),
        "orphans": sum(outcome.orphans for outcome in outcomes),
        "median_restart": round(statistics.median(restarts), 2) if restarts else None,
        "worst_restart": round(max(restarts), 2) if restarts else None,
    }


def store(name: str, began: float, **result: object) -> None:
    """Write a result for benchmarks/results_page.py, with where and how long it was measured."""
    made = {"environment": {**asdict(environment()), "cores": os.cpu_count()}}
    minutes = round((time.monotonic() - began) / 60, 1)
    (RESULTS / f"{name}.json").write_text(json.dumps({**made, "minutes": minutes, **result}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other")
    arguments = parser.parse_args()

    began = time.monotonic()
    outcomes = chaos(**vars(arguments))
    titles = sorted({outcome.cell.title for outcome in outcomes})
    table = {title: summary(o for o in outcomes if o.cell.title == title) for title in titles}
    table["all"] = summary(outcomes)
    for title, row in table.items():
        print(title, row)
    for outcome in outcomes:
        print(*outcome.mismatches, sep="\n", end="\n" if outcome.mismatches else "")
    store("chaos", began, seed=arguments.seed, jobs=arguments.jobs, table=table)
    sys.exit(any(outcome.mismatches or outcome.orphans for outcome in outcomes))
