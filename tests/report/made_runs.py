"""Runs to report on, made without training."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from launched import holding

from cs324dist.loop import run_record
from cs324dist.pictures import grid, save_png
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.environment import environment
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks import find_task
from cs324dist.tasks.gan.networks import Generator

HOSTILE = "<img src=x onerror=alert(1)>&amp;"  # a name that a folder can have
ENDS_SCRIPT = "</script><script>window.hacked = 1</script>"
environment_of = cache(environment)


@contextmanager
def started(path: Path, task: str, preset: str, processes: int = 1, **changes: object) -> Iterator[RunDir]:
    """A run that has begun, as the script of its task writes it."""
    task_type = find_task(task)
    config = replace(task_type.presets[preset], preset=preset, run_dir=path, **changes)
    record = replace(run_record(task_type, config), script=f"launch/{task}.py")
    run = RunDir(path)
    with run.claimed(lambda: None, lambda work: work()):
        run.start(record, environment_of(processes), 0, 0)
        yield run


def edit(path: Path, **changes: object) -> None:
    """Change values of a JSON file, those of nested objects too."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


def add_owner(run: Path, number: int, **changes: object) -> None:
    """Another owner of a run, like its first but for these changes."""
    new = run / "owners" / f"{number}.json"
    shutil.copy(run / "owners" / "1.json", new)
    edit(new, **changes)


def accuracy(step: int, length: int) -> float:
    """Rises to 1, later for longer palindromes."""
    return min(1.0, 0.1 + step / (40 * length))


def make_lstm(path: Path, length: int = 5, steps: int = 300, state: str = "finished", **changes) -> Path:
    """A run of `steps` steps, logged every 10 and evaluated every 100."""
    with started(path, "lstm", "course", length=length, steps=steps, **changes) as run:
        for step in range(10, steps + 1, 10):
            value = accuracy(step, length)
            loss = 2.3 * math.exp(-step / 100)
            row = {"train/loss": loss, "train/accuracy": value, "throughput/samples_per_second": 1000.0}
            row["throughput/steps_per_second"] = 1000 / 128
            run.append_metrics(step, row)
            if step % 100 == 0:
                run.append_metrics(step, {"eval/accuracy": value})
        run.write_status(state, steps)
    return path


def make_gan(
    path: Path, frames: int = 4, checkpoint: bool = True, distance: float = 5000.0, **changes
) -> Path:
    """A run of two processes with a picture and an evaluation every 100 steps, and a small generator."""
    steps = 100 * frames
    noise = torch.Generator().manual_seed(0)
    with started(path, "gan", "fast", processes=2, steps=steps, **changes) as run:
        for step in range(50, steps + 1, 50):
            run.append_metrics(step, {"train/generator_loss": 1.0, "train/discriminator_loss": 0.5})
            if step % 100 == 0:
                save_png(grid(torch.rand(25, 1, 28, 28, generator=noise) * 2 - 1, 5), run.sample(step))
                shares = {f"eval/share_of_{digit}": 0.1 for digit in range(10)}
                shares |= {"eval/share_of_0": 0.1 + step / 1e5, "eval/share_of_1": 0.1 - step / 1e5}
                found = {"eval/frechet_distance": distance / step, "eval/sure": 0.5, **shares}
                run.append_metrics(step, found)
        if checkpoint:
            save_generator(run.checkpoint(steps), TrainerState(steps, processes=2))
        run.write_status("finished", steps)
    return path


def save_generator(checkpoint: Path, state: TrainerState) -> None:
    torch.manual_seed(0)
    write_checkpoint(checkpoint, holding(generator=Generator(input_dim=8)), state)


def make_damaged(path: Path) -> Path:
    """A run whose files hold what no run writes, as far as it can be read."""
    make_lstm(path, length=7)
    values = {"encoding": ENDS_SCRIPT, "steps": "\x00\u202e" * 1000, "curriculum": [[[]]]}
    edit(path / "config.json", config=values, changed={"encoding": ENDS_SCRIPT})
    edit(path / "owners" / "1.json", host=ENDS_SCRIPT, environment={"packages": {ENDS_SCRIPT: "\x00" * 5000}})
    with (path / "metrics.jsonl").open("a") as file:
        rows = [
            '{"step": 310, "train/loss": null, "train/accuracy": NaN}',
            '{"step": 320, "train/loss": null, "train/accuracy": 1e300}',
            f'{{"step": 330, "train/loss": 0.01, "{ENDS_SCRIPT}": 3}}',
            '{"step": -5, "train/loss": 1}',
            "[]",
            '{"step": 340, "train/lo',
        ]
        file.write("\n".join(rows))
    edit(path / "status.json", state="failed", why=f"RuntimeError: {ENDS_SCRIPT}\nand more")
    (path / "owners" / "2.json").write_text('{"host": {"a": "<b>"}}')
    (path / "owners" / "3.json").write_text("[")
    return path


def leave(path: Path) -> None:
    """Make the heartbeats of all owners old."""
    for owner in (path / "owners").glob("*.json"):
        os.utime(owner, (0, 0))
