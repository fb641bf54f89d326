"""The GAN's results: train, measure, and store what docs/results.md is written from.

    python benchmarks/gan_results.py               # everything: about four hours on two cores
    python benchmarks/gan_results.py report fast   # some of it

Each part is runs of `launch/gan.py` in `runs/results/`, measured by `launch/evaluate.py`; a part that was
stopped goes on where it was. It writes `benchmarks/results/gan/PART.json`, and pictures to `docs/images/`;
`python benchmarks/results_page.py` then writes the page. Parts `fast`, `bf16`, `quick` and `pace` hold
times: nothing else may run then.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import parts
import torch

from cs324dist.data.images import load_images, to_unit_range
from cs324dist.metrics.digits import read_digits
from cs324dist.runs.run_dir import RunDir
from cs324dist.sampling.generators import generate, latents, load_generator
from cs324dist.sampling.grids import grid, save_png

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "gan"
IMAGES = REPOSITORY / "docs" / "images"
RUNS = REPOSITORY / "runs" / "results"
REPORTS_STEPS = 20_000
COMPARED = 1000  # samples whose nearest training images are looked for


def run(script: str, *arguments: str | Path, precision: str = "no") -> float:
    """Run a script of launch/ as a user does; the seconds it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, f"launch/{script}.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "ACCELERATE_MIXED_PRECISION": precision},
        check=False,
    )
    if done.returncode:
        sys.exit(f"launch/{script}.py {' '.join(map(str, arguments))} ended with exit code {done.returncode}")
    return time.monotonic() - began


def trained(name: str, options: str = "", script: str = "gan", precision: str = "no") -> RunDir:
    """The finished run of these options; `seconds` of it, if it was made in one go, is stored beside it."""
    folder = RunDir(RUNS / name)
    new = not folder.exists
    here = ("--wandb", "disabled", "--run-dir", folder.path)
    seconds = run(script, *options.split(), *here, precision=precision)
    if new:
        (folder.path / "seconds").write_text(str(round(seconds)))
    return folder


def measured(name: str, options: str = "", *evaluation: str | Path, precision: str = "no") -> dict[str, Any]:
    """What a run of these options achieves, and its curve: steps, distance, sure share."""
    folder = trained(name, options, precision=precision)
    run("evaluate", folder.path, *evaluation)
    config = folder.read_config()
    curve = [
        [row["step"], round(row["eval/frechet_distance"], 2), round(row["eval/sure"], 4)]
        for row in folder.read_metrics()
        if "eval/frechet_distance" in row
    ]
    whole = folder.path / "seconds"
    return {
        "options": options,
        "steps": config["settings"]["steps"],
        "seconds": int(whole.read_text()) if whole.exists() else None,
        "environment": {**config["environment"], "cores": os.cpu_count()},
        "curve": curve,
        **json.loads((folder.path / "evaluation.json").read_text()),
    }


def pictures(name: str, prefix: str, *steps: int) -> None:
    """The grids of some steps, and the walk from a 4 to a 1."""
    folder = RunDir(RUNS / name)
    for step in steps:
        shutil.copy(folder.sample(step), IMAGES / f"{prefix}-{step}.png")
    walk = ("interpolate", folder.path, "--start-digit", 4, "--end-digit", 1)
    run("sample", *map(str, walk), "--out", IMAGES / f"{prefix}-strip.png")


def report() -> list[dict[str, Any]]:
    """The report's recipe in both readings of "every two epochs", and the one everyone copies."""
    recipes = {
        "every second step": "",
        "every second epoch": "--discriminator-unit epoch",
        "every step, Adam (0.5, 0.999)": "--discriminator-every 1 --beta1 0.5",
    }
    trials = []
    for name, options in recipes.items():
        folder = f"report {name}".replace(" ", "-").translate({ord(c): None for c in "(),"})
        common = f"--preset course --steps {REPORTS_STEPS} --evaluate-every 500 --checkpoint-every 1000"
        trials.append({"recipe": name, **measured(folder, f"{common} {options}")})
        if name == "every second step":
            pictures(folder, "gan-report", 500, 10_000, 20_000)
    return trials


def fast() -> list[dict[str, Any]]:
    """Preset `fast`, five seeds."""
    trials = []
    for seed in range(5):
        trials.append({"trial": seed, **measured(f"fast-{seed}", f"--seed {seed} --evaluate-every 250")})
    pictures("fast-0", "gan-fast", trials[0]["steps"])
    return trials


def bf16() -> list[dict[str, Any]]:
    """Preset `fast` in bf16, five seeds."""
    return [
        {"trial": seed, **measured(f"bf16-{seed}", f"--seed {seed} --evaluate-every 250", precision="bf16")}
        for seed in range(5)
    ]


def quick() -> list[dict[str, Any]]:
    """Preset `fast` over 1 000 steps in bf16, 20 seeds: as near as the report's recipe ever comes."""
    options = "--steps 1000 --evaluate-every 1000"
    return [
        {"trial": seed, **measured(f"quick-{seed}", f"--seed {seed} {options}", precision="bf16")}
        for seed in range(20)
    ]


def pace() -> list[dict[str, Any]]:
    """How long a step of each recipe takes."""
    trials = []
    for recipe in ("report", "fast"):
        folder = trained(f"pace-{recipe}", f"--preset {recipe} --steps 400 --evaluate-every 1000")
        config, rows = folder.read_config(), folder.read_metrics()
        rates = [
            row["throughput/samples_per_second"]
            for row in rows
            if row["step"] > 100 and "train/generator_loss" in row
        ]
        milliseconds = 1000 * config["settings"]["batch_size"] / statistics.median(rates)
        trials.append({"recipe": recipe, "milliseconds": milliseconds, "environment": config["environment"]})
    return trials


def ablation() -> list[dict[str, Any]]:
    """Preset `fast` at half its steps, each ingredient left out in turn, three seeds, in bf16."""
    variants = {
        "preset fast": "",
        "no averaging": "--ema-decay 0",
        "no decay of the step sizes": "--lr-decay none",
        "no penalty": "--gradient-penalty 0",
        "equal step sizes, 1e-3": "--generator-lr 1e-3",
        "Adam's beta1 0.5": "--beta1 0.5",
    }
    trials = []
    for name, options in variants.items():
        for seed in range(3):
            folder = f"ablation-{options.replace(' ', '')}-{seed}"
            found = measured(
                folder, f"{options} --seed {seed} --steps 1250 --evaluate-every 1250", precision="bf16"
            )
            trials.append({"variant": name, **found, "options": options})
    return trials


@torch.no_grad()
def memorised() -> list[dict[str, Any]]:
    """The surest sample of each digit above its nearest training image; how near samples are to those."""
    generator = load_generator(trained("fast-0", "--seed 0 --evaluate-every 250").path)
    train, test = (load_images("mnist", split, Path("data")).images for split in ("train", "test"))
    known = to_unit_range(train).flatten(1)

    def nearest(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [torch.cdist(part.flatten(1), known).min(1) for part in images.split(100)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    images = generate(generator, latents(generator, 0, 0, 10_000))
    read = [read_digits(part) for part in images.split(500)]
    digits, confidence = (torch.cat(parts) for parts in list(zip(*read, strict=True))[:2])
    surest = torch.stack(
        [images[torch.where(digits == digit, confidence, 0).argmax()] for digit in range(10)]
    )
    twins = known[nearest(surest)[1]].view_as(surest)
    save_png(grid(torch.cat([surest, twins]), 10), IMAGES / "gan-neighbours.png")
    return [
        {"images": name, "to_nearest_training_image": nearest(some)[0].median().item()}
        for name, some in (("samples", images[:COMPARED]), ("test images", to_unit_range(test[:COMPARED])))
    ]


def fashion() -> list[dict[str, Any]]:
    """Preset `fast`, untouched, on Fashion-MNIST."""
    data = "--dataset fashion-mnist"
    classifier = trained("classifier-fashion-mnist", data, "classifier")
    accuracy = [row["eval/accuracy"] for row in classifier.read_metrics() if "eval/accuracy" in row][-1]
    found = measured("fashion-mnist-0", data, "--classifier", classifier.path)
    run("sample", "grid", RUNS / "fashion-mnist-0", "--out", IMAGES / "gan-fashion-mnist.png")
    return [{"classifier_accuracy": accuracy, **found}]


PARTS = {part.__name__: part for part in (report, fast, bf16, quick, pace, ablation, memorised, fashion)}

if __name__ == "__main__":
    parts.make(__doc__, PARTS, RESULTS)
