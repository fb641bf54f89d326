"""The GAN's results: train, measure, and store what docs/results.md is written from.

    python benchmarks/gan_results.py               # everything: about four hours on two cores
    python benchmarks/gan_results.py course fast   # some of it

Each part is runs of `launch/gan.py` in `runs/results/`, measured by `measure_gan.py`; a part that was
stopped continues where it was. It writes `benchmarks/results/gan/PART.json`, and pictures to `docs/images/`;
`python benchmarks/results_page.py` then writes the page. Parts `fast`, `bf16`, `best` and `pace` hold
times: nothing else may run then.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from common import IMAGES, REPOSITORY, Row, on_each_core, run_parts, run_python
from jaxtyping import Float
from torch import Tensor

from cs324dist.pictures import grid, save_png
from cs324dist.report.reading import read_run
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.sampling import generate, latents, load_generator
from cs324dist.tasks.gan.statistics import read_digits

RUNS = REPOSITORY / "runs" / "results"
COURSE = {  # the discriminator is trained: name, options
    "every second step": ("course-steps", ""),
    "every second epoch": ("course-epochs", "--discriminator-unit epoch"),
    "every step, Adam (0.5, 0.999)": ("copied", "--discriminator-every 1 --betas 0.5 0.999"),
}
COURSE_SEEDS = 3
FAST = "--evaluate-every 250"
BEST = "--preset best --evaluate-every 4000 --precision bf16"
SEEDS = 5
DRAWS = 5  # of latents
COMPARED = 1000  # samples whose nearest training images are looked for

Images = Float[Tensor, "images 1 28 28"]
Points = Float[Tensor, "points components"]


def trained(name: str, options: str = "") -> Path:
    """The finished run of these options; `seconds` of it, if it was made in one go, is stored beside it."""
    run, began = RUNS / name, time.monotonic()
    new = not run.exists()
    arguments = (*options.split(), "--wandb", "disabled", "--run-dir", run)
    run_python("launch/gan.py", *arguments, ACCELERATE_MIXED_PRECISION="no")
    if new:
        (run / "seconds").write_text(str(round(time.monotonic() - began)))
    return run


def quality(run: Path, seed: int = 0) -> Row:
    """What `measure_gan.py` finds."""
    return json.loads(run_python("benchmarks/measure_gan.py", run, "--seed", seed))


def measured(name: str, options: str = "") -> Row:
    """What a run of these options achieves, and its curve: steps, distance, sure share."""
    run = trained(name, options)
    made, seconds, found = read_run(run, name), run / "seconds", quality(run)
    shares = {f"share_of_{digit}": share for digit, share in enumerate(found.pop("shares"))}
    distances, sure = made.series("eval/frechet_distance"), made.series("eval/sure")
    return {
        "options": options,
        "steps": made.steps,
        "seconds": int(seconds.read_text()) if seconds.exists() else None,
        "environment": {**asdict(made.environment), "cores": os.cpu_count()},
        "curve": [[step, round(distance, 2), round(sure[step], 4)] for step, distance in distances.items()],
        **found,
        **shares,
    }


def seeds(name: str, count: int, options: str) -> list[Row]:
    """Runs that differ in their seed."""
    return [{"trial": n, **measured(f"{name}-{n}", f"--seed {n} {options}")} for n in range(count)]


def pictures(run: Path, step: int) -> None:
    """The grid of a step, and the walk from a 4 to a 1."""
    shutil.copy(run / "samples" / f"{step:09d}.png", IMAGES / f"gan-best-{step}.png")
    walk = ("interpolate", run, "--start-digit", 4, "--end-digit", 1)
    run_python("launch/sample.py", *walk, "--out", IMAGES / "gan-best-strip.png")


def course_run(recipe: str, seed: int) -> Row:
    """What 20 000 steps of a recipe achieve."""
    name, options = COURSE[recipe]
    common = f"--preset course --seed {seed} --steps 20000 --evaluate-every 500 --checkpoint-every 1000"
    return {"recipe": recipe, "trial": seed, **measured(f"{name}-{seed}", f"{common} {options}")}


def course() -> list[Row]:
    """The course recipe in both readings of "every two epochs", and the recipe of most tutorials."""
    recipes, trials = zip(*product(COURSE, range(COURSE_SEEDS)), strict=True)
    return on_each_core(course_run, recipes, trials)


def fast() -> list[Row]:
    """Preset `fast`, five seeds."""
    return seeds("fast", SEEDS, FAST)


def bf16() -> list[Row]:
    """Preset `fast` in bf16, five seeds."""
    return seeds("bf16", SEEDS, f"{FAST} --precision bf16")


def best() -> list[Row]:
    """Preset `best` in bf16, five seeds."""
    rows = seeds("best", SEEDS, BEST)
    pictures(RUNS / "best-0", rows[0]["steps"])
    return rows


def draws() -> list[Row]:
    """The runs of part `best`, each measured on several draws of latents."""
    runs = [trained(f"best-{seed}", f"--seed {seed} {BEST}") for seed in range(SEEDS)]
    pairs = product(enumerate(runs), range(DRAWS))
    return [{"trial": trial, **quality(run, seed)} for (trial, run), seed in pairs]


def pace() -> list[Row]:
    """How long a step of each recipe takes."""
    rows = []
    for recipe in ("course", "fast"):
        run = trained(f"pace-{recipe}", f"--preset {recipe} --steps 400 --evaluate-every 1000")
        made = read_run(run, recipe)
        rates = made.series("throughput/samples_per_second").items()
        rate = statistics.median(rate for step, rate in rates if step > 100)
        milliseconds = 1000 * made.options.batch_size / rate
        rows.append({"recipe": recipe, "milliseconds": milliseconds, "environment": asdict(made.environment)})
    return rows


def ablation() -> list[Row]:
    """Preset `fast` over 1 250 steps, each ingredient left out in turn, three seeds, in bf16."""
    variants = {
        "preset fast": "",
        "no labels": "--label-weight 0",
        "no averaging": "--ema-decay 0",
        "constant learning rates": "--schedule constant",
        "no gradient penalty": "--gradient-penalty 0",
        "equal learning rates, 1e-3": "--generator-lr 1e-3",
        "Adam's beta1 0.5": "--betas 0.5 0.99",
    }
    rows = []
    for variant, options in variants.items():
        name, short = f"ablation-{options.replace(' ', '')}", "--steps 1250 --evaluate-every 1250"
        for row in seeds(name, 3, f"{options} {short} --precision bf16"):
            rows.append({"variant": variant, **row, "options": options})
    return rows


def real_images(split: str) -> Images:
    return to_unit_range(load_images("mnist", split, REPOSITORY / "data").images)


def distances(points: Points, known: Points) -> Iterator[Tensor]:
    """Of some points after others to all known ones."""
    return (torch.cdist(some, known) for some in points.split(500))


def nearest(points: Points, known: Points) -> tuple[Tensor, Tensor]:
    """The distance of each point to the nearest known one, and the place of that one."""
    found = [some.min(1) for some in distances(points, known)]
    return torch.cat([some.values for some in found]), torch.cat([some.indices for some in found])


def lies_among(points: Points, known: Points) -> float:
    """The share of points that are as near to a known one as its third neighbour is."""
    reach = torch.cat([some.kthvalue(4).values for some in distances(known, known)])  # the first is itself
    return torch.cat([(some <= reach).any(1) for some in distances(points, known)]).double().mean().item()


def read_all(images: Images) -> list[Tensor]:
    """The digit of each image, how sure the classifier is, and its features."""
    parts = zip(*(read_digits(some) for some in images.split(500)), strict=True)
    return [torch.cat(part) for part in parts]


def surest_beside_nearest(images: Images, known: Images) -> Images:
    """The surest image of each digit, and the training image that is nearest to it, pixel by pixel."""
    digits, confidence, _ = read_all(images)
    surest = images[[int(torch.where(digits == digit, confidence, 0).argmax()) for digit in range(10)]]
    return torch.cat([surest, known[nearest(surest.flatten(1), known.flatten(1))[1]]])


def neighbours() -> list[Row]:
    """Precision, recall and the way to the nearest training image, of the runs of parts `fast` and `best`.

    Precision is the share of images that lie among as many training images, recall the share of those that
    lie among the images, in the classifier's features (Kynkäänniemi et al. 2019,
    https://arxiv.org/abs/1904.06991). Test images show what can be reached.
    """
    known, sets = real_images("train"), {("test images", None): real_images("test")}
    for (name, options), seed in product((("fast", FAST), ("best", BEST)), range(SEEDS)):
        generator = load_generator(trained(f"{name}-{seed}", f"--seed {seed} {options}"))
        sets[name, seed] = generate(generator, latents(generator, 0, len(sets["test images", None])))
    save_png(grid(surest_beside_nearest(sets["best", 0], known), 10), IMAGES / "gan-neighbours.png")
    known_features, rows = read_all(known)[2], []
    for (name, seed), images in sets.items():
        features, some = read_all(images)[2], known_features[: len(images)]
        row = {"precision": lies_among(features, some), "recall": lies_among(some, features)}
        for space, points, others in (
            ("features", features, known_features),
            ("pixels", images[:COMPARED].flatten(1), known.flatten(1)),
        ):
            row[f"nearest_in_{space}"] = nearest(points, others)[0].median().item()
        rows.append({"images": name, "seed": seed, **row})
    return rows


if __name__ == "__main__":
    run_parts(__doc__, "gan", course, fast, bf16, best, draws, pace, ablation, neighbours)
