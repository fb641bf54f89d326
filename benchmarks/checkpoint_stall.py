"""How long a checkpoint holds the loop up, for the GAN of preset `fast` at its default interval.

    python benchmarks/checkpoint_stall.py

Times the training step and `Run._write` (which checks that all is finite, copies, writes, syncs, hashes and
renames) in turn, on one process with all cores, and takes medians. Takes about two minutes on two cores.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from common import REPOSITORY, Row, command_line, store, trainer_of

from cs324dist.errors import exit_process
from cs324dist.loop import TaskRun
from cs324dist.runs.run_dir import RunDir

WARM_UP = 5  # steps


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def measure(folder: Path, repeats: int, steps: int = 60) -> Row:
    run_dir, dataset = RunDir(folder / "run"), "mnist" if Path("data/MNIST").is_dir() else "fake"
    trainer = trainer_of("gan", "fast", dataset=dataset, run_dir=run_dir.path, keep_last=2)
    config = trainer.config
    step_times, save_times = [], []
    with TaskRun(trainer) as run:
        run._start(WARM_UP + repeats * steps)
        for step in range(WARM_UP):
            trainer.step(step, is_logged=False)
        for first in range(WARM_UP, WARM_UP + repeats * steps, steps):
            for step in range(first, first + steps):
                step_times.append(milliseconds(lambda step=step: trainer.step(step, is_logged=False)))
            run.step = first + steps
            save_times.append(milliseconds(run._write))
        size = sum(path.stat().st_size for path in run_dir.newest().rglob("*") if path.is_file())
    step, stall = statistics.median(step_times), statistics.median(save_times)
    interval = config.checkpoint_every
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


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="checkpoints written")
    options = parser.parse_args()
    os.chdir(REPOSITORY)  # where data/ is
    Path("runs").mkdir(exist_ok=True)  # on the disk that counts
    with TemporaryDirectory(prefix="stall-", dir="runs") as temporary:
        result = measure(Path(temporary).resolve(), options.repeats)
    print(result)
    store("checkpoint_stall", result, load=round(os.getloadavg()[0], 2))
    exit_process(0)
