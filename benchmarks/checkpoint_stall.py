"""How long a checkpoint holds the loop up, for the GAN of preset `fast` at its default interval.

    python benchmarks/checkpoint_stall.py

Times the training step and `trainer.save` (which checks that all is finite, copies, writes, syncs, hashes and
renames) in turn, on one process with all cores, and takes medians. Takes about two minutes on two cores.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from common import REPOSITORY, Row, gan_task, store

from cs324dist.errors import exit_process
from cs324dist.runs.run_dir import RunDir
from cs324dist.trainer import save

WARM_UP = 5  # steps


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def measure(folder: Path, repeats: int, steps: int) -> Row:
    run, dataset = RunDir(folder / "run"), "mnist" if Path("data/MNIST").is_dir() else "fake"
    task, accelerator = gan_task("fast", dataset=dataset, run_dir=run.path, keep_last=2)
    run.open("gan", task.settings.as_json())
    for step in range(WARM_UP):
        task.step(step)
    step_times, save_times = [], []
    for first in range(WARM_UP, WARM_UP + repeats * steps, steps):
        last = first + steps
        step_times += [milliseconds(lambda step=step: task.step(step)) for step in range(first, last)]
        save_times.append(milliseconds(lambda last=last: save(task, run, accelerator, last)))
    size = sum(path.stat().st_size for path in run.newest().rglob("*") if path.is_file())
    run.release()
    accelerator.end_training()
    step, stall = statistics.median(step_times), statistics.median(save_times)
    interval = task.settings.checkpoint_every
    return {
        "dataset": dataset,
        "repeats": repeats,
        "megabytes": round(size / 1e6, 1),
        "step_milliseconds": round(step, 1),
        "save_milliseconds": round(stall),
        "save_milliseconds_all": sorted(map(round, save_times)),
        "interval_steps": interval,
        "share": round(stall / (stall + interval * step), 5),
    }


def main(repeats: int = 15, steps: int = 60, folder: Path = REPOSITORY / "runs") -> None:
    """Measure and store.

    Args:
        repeats: checkpoints written.
        steps: steps before each.
        folder: where to write them: the disk that counts.
    """
    os.chdir(REPOSITORY)  # where data/ is
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="stall-", dir=folder) as temporary:
        result = measure(Path(temporary).resolve(), repeats, steps)
    print(result)
    store("checkpoint_stall", result, load=round(os.getloadavg()[0], 2))
    exit_process(0)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
