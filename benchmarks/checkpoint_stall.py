"""How long a checkpoint holds the loop up, for the GAN of preset `fast` at its default interval.

    python benchmarks/checkpoint_stall.py

Times the training step and `loop.save` (which checks that all is finite, copies, writes, syncs, hashes and
renames) in turn, on one process with all cores, and takes medians. Beside them the parts of a save, by taking
them one by one over the same tensors. Takes about two minutes on two cores.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cs324dist.distributed.process import start_accelerator
from cs324dist.errors import exit_process
from cs324dist.runs import checkpoints, models
from cs324dist.runs.environment import environment
from cs324dist.runs.files import sha256, sync
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.base import optimizer_tensors
from cs324dist.tasks.gan import PRESETS, GANTask
from cs324dist.trainer import save

REPOSITORY = Path(__file__).parents[1]
WARM_UP = 5  # steps


def seconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def parts(task: GANTask, folder: Path) -> dict[str, float]:
    """The seconds of each part of a save, one after the other."""
    tensors = {f"{n}/{k}": t for n, m in task.models.items() for k, t in m.state_dict().items()}
    tensors |= optimizer_tensors(task)
    path = folder / "all.safetensors"
    taken = {
        "finite check": seconds(lambda: checkpoints._all_finite(tensors.values())),
        "copy and write": seconds(lambda: models.save_tensors(path, tensors)),
        "sync": seconds(lambda: sync(path)),
        "SHA-256": seconds(lambda: sha256(path)),
    }
    path.unlink()
    return taken


def measure(repeats: int, steps: int, dataset: str, folder: Path) -> dict:
    run_dir = folder / "run"
    settings = dataclasses.replace(PRESETS["fast"], dataset=dataset, run_dir=run_dir, keep_last=2)
    accelerator = start_accelerator(settings.batch_size)
    task, run = GANTask(settings, accelerator), RunDir(run_dir)
    run.open("gan", settings.as_json())
    for step in range(WARM_UP):
        task.step(step)
    step_times, save_times, part_times = [], [], []
    for repeat in range(repeats):
        first = WARM_UP + repeat * steps
        step_times += [seconds(lambda step=step: task.step(step)) for step in range(first, first + steps)]
        save_times.append(seconds(lambda done=first + steps: save(task, run, accelerator, done)))
        part_times.append(parts(task, folder))
    newest = run.newest()
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    run.release()
    accelerator.end_training()
    step, stall = statistics.median(step_times), statistics.median(save_times)
    interval = settings.checkpoint_every
    return {
        "hardware": {**environment(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "dataset": dataset,
        "repeats": repeats,
        "megabytes": round(size / 1e6, 1),
        "step_milliseconds": round(1000 * step, 1),
        "save_milliseconds": round(1000 * stall),
        "save_milliseconds_all": sorted(round(1000 * s) for s in save_times),
        "parts_milliseconds": {
            name: round(1000 * statistics.median(taken[name] for taken in part_times))
            for name in part_times[0]
        },
        "interval_steps": interval,
        "share": round(stall / (stall + interval * step), 5),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15, help="checkpoints written")
    parser.add_argument("--steps", type=int, default=60, help="steps before each")
    parser.add_argument(
        "--folder", type=Path, default=REPOSITORY / "runs", help="where to write: the disk that counts"
    )
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "checkpoint_stall.json"
    )
    arguments = parser.parse_args()
    dataset = "mnist" if (REPOSITORY / "data" / "MNIST").is_dir() else "fake"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="stall-", dir=arguments.folder))
    try:
        os.chdir(REPOSITORY)  # where data/ is
        result = measure(arguments.repeats, arguments.steps, dataset, folder.resolve())
    finally:
        shutil.rmtree(folder)
    print(
        f"{result['megabytes']} MB in {result['save_milliseconds']} ms {result['parts_milliseconds']}, "
        f"a step {result['step_milliseconds']} ms: {100 * result['share']:.2f} % of the loop's time "
        f"at one checkpoint in {result['interval_steps']} steps"
    )
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    exit_process(0)
