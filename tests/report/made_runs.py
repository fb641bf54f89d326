"""Runs to report on, made without training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from cs324dist.models.gan import Generator
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.run_dir import RunDir
from cs324dist.sampling.grids import grid, save_png
from cs324dist.tasks import gan, lstm

HOSTILE = "<img src=x onerror=alert(1)>&amp;"  # a name that a folder can have
ENDS_SCRIPT = "</script><script>window.hacked = 1</script>"


def accuracy(step: int, length: int) -> float:
    """Rises to 1, later for longer palindromes."""
    return min(1.0, 0.1 + step / (40 * length))


def make_lstm(path: Path, length: int = 5, steps: int = 300, state: str = "finished", **changes) -> Path:
    """A run of `steps` steps, logged every 10 and evaluated every 100."""
    settings = replace(lstm.PRESETS["course"], length=length, steps=steps, **changes)
    run = RunDir(path)
    run.open("lstm", settings.as_json())
    for step in range(10, steps + 1, 10):
        value = accuracy(step, length)
        loss = 2.3 * math.exp(-step / 100)
        row = {"train/loss": loss, "train/accuracy": value, "throughput/samples_per_second": 1000.0}
        run.append_metrics(step, row)
        if step % 100 == 0:
            run.append_metrics(step, {"eval/accuracy": value})
    run.write_status(state, steps)
    run.release()
    return path


def make_gan(
    path: Path, frames: int = 4, checkpoint: bool = True, distance: float = 5000.0, **changes
) -> Path:
    """A run with a picture and an evaluation every 100 steps, and a small generator."""
    run, steps = RunDir(path), 100 * frames
    run.open("gan", replace(gan.PRESETS["fast"], steps=steps, **changes).as_json())
    noise = torch.Generator().manual_seed(0)
    for step in range(50, steps + 1, 50):
        run.append_metrics(step, {"train/generator_loss": 1.0, "train/discriminator_loss": 0.5})
        if step % 100 == 0:
            save_png(grid(torch.rand(25, 1, 28, 28, generator=noise) * 2 - 1, 5), run.sample(step))
            shares = {f"eval/share_of_{digit}": 0.1 for digit in range(10)}
            shares |= {"eval/share_of_0": 0.1 + step / 1e5, "eval/share_of_1": 0.1 - step / 1e5}
            run.append_metrics(step, {"eval/frechet_distance": distance / step, "eval/sure": 0.5, **shares})
    if checkpoint:
        torch.manual_seed(0)
        models = {"generator": Generator(input_dim=8)}
        write_checkpoint(run.checkpoint(steps), models, {}, TrainerState(steps, world_size=2))
    run.write_status("finished", steps)
    run.release()
    return path


def make_damaged(path: Path) -> Path:
    """A run whose files hold what no run writes, as far as it can be read."""
    make_lstm(path, length=7)
    config = json.loads((path / "config.json").read_text())
    config["settings"] |= {"encoding": ENDS_SCRIPT, "steps": "\x00\u202e" * 1000, "curriculum": [[[]]]}
    config["environment"]["packages"] = {ENDS_SCRIPT: 10**4000}
    (path / "config.json").write_text(json.dumps(config))
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
    why = f"RuntimeError: {ENDS_SCRIPT}\nand more"
    (path / "status.json").write_text(json.dumps({"state": "failed", "step": 300, "why": why}))
    (path / "owners" / "2.json").write_text('{"host": {"a": "<b>"}}')
    (path / "owners" / "3.json").write_text("[")
    return path
