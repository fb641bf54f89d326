"""What the benchmarks share: stored results, runs of the package's scripts, and tasks to train."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
IMAGES = REPOSITORY / "docs" / "images"

Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """A stored result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def store(name: str, result: dict[str, Any], **environment: object) -> None:
    """Write a result to results/NAME.json, with the environment it was made in."""
    from cs324dist.runs.environment import environment as here

    path = RESULTS / f"{name}.json"
    whole = {"environment": {**asdict(here()), "cores": os.cpu_count(), **environment}, **result}
    path.write_text(json.dumps(whole) + "\n")
    print(path.relative_to(REPOSITORY))


def where(rows: Iterable[Row], **values: object) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


Part = Callable[[], list[Row]]


def run_parts(description: str, folder: str, *parts: Part, **more: Part) -> None:
    """Run the parts that the command line names, all by default, and store each as FOLDER/PART.

    Several parts have a process each: some change their number of threads.
    """
    by_name = {**{part.__name__: part for part in parts}, **more}
    parser = command_line(description)
    choices = [*by_name, []]  # argparse checks the empty list as well
    parser.add_argument("parts", nargs="*", choices=choices, metavar="PART", help=", ".join(by_name))
    names = parser.parse_args().parts or list(by_name)
    if len(names) > 1:
        for name in names:
            print(run_python(sys.argv[0], name), end="")
        return
    began = time.monotonic()
    rows = by_name[names[0]]()
    store(f"{folder}/{names[0]}", {"minutes": round((time.monotonic() - began) / 60, 1), "rows": rows})


def on_each_core(work: Callable[..., Row], *values: Iterable[Any]) -> list[Row]:
    """`map` in as many processes as there are cores, of one thread each."""
    import torch

    torch.set_num_threads(1)  # for `store`
    os.environ["CS324DIST_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(work, *values))


def command_line(description: str | None) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=style, allow_abbrev=False)


def run_python(*arguments: object, **environment: str) -> str:
    """What Python prints when run with these arguments in the repository; exit if it fails."""
    command, environ = [sys.executable, *map(str, arguments)], {**os.environ, **environment}
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def trainer_of(task: str, preset: str, **changes: Any) -> Any:
    """A `Trainer` in this process, of a task with the options of a preset and some changes."""
    from cs324dist.distributed.process import start_accelerator
    from cs324dist.tasks import find_task
    from cs324dist.trainer import Trainer

    task_type = find_task(task)
    config = replace(task_type.presets[preset], preset=preset, **changes)
    accelerator = start_accelerator(config.batch_size, config.micro_batches, precision=config.precision)
    return Trainer(task_type(config, accelerator.device), accelerator)
