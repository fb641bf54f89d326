"""Measure a trained generator: Fréchet distance to MNIST's test images, what can be read, which digits come.

python launch/evaluate.py runs/gan-fast-0

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/evaluate.py runs/gan-fast-0
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from cs324dist.command_line import OneOf, Within, parse
from cs324dist.data.images import load_images, to_unit_range
from cs324dist.data.streams import Stream
from cs324dist.errors import Refused, errors_as_exit_codes, leave
from cs324dist.evaluation.digits import WEIGHTS, DigitStatistics
from cs324dist.runs.files import sha256, write_json
from cs324dist.sampling.generators import AT_ONCE, load_generator
from cs324dist.training.process import shard, start_accelerator

FLOOR = 10_000  # training images, the first of the set, whose distance is what chance allows


@dataclass(frozen=True)
class Evaluate:
    """What to measure."""

    run: Positional[Path]
    """A run folder (its newest checkpoint is taken), or a checkpoint."""

    count: Annotated[int, Within(1000, 10**9)] = 10_000
    """Samples to draw; the distance depends on it."""

    seed: Annotated[int, Within(0)] = 0
    """Stream that latent vectors are drawn from."""

    weights: Annotated[str, OneOf("averaged", "raw")] = "averaged"
    """averaged: the averaged generator where there is one; raw: the one being trained."""

    data_root: Path = Path("data")
    """Folder of the data sets."""

    out: Path | None = None
    """File to write the figures to. Default: evaluation.json in RUN."""


@torch.no_grad()
def measure(options: Evaluate) -> None:
    """Print the figures, and write them."""
    generator = load_generator(options.run, options.weights)
    test, train = (load_images("mnist", split, options.data_root).images for split in ("test", "train"))
    accelerator = start_accelerator()
    mine = shard(accelerator)
    generator.to(mine.device)
    stream = Stream(options.seed, "latents/evaluation")

    def draw(indices: Tensor) -> Tensor:
        return generator(stream.normals(indices, generator.config["input_dim"]))

    def statistics(name: str, draw: Callable[[Tensor], Tensor], count: int) -> DigitStatistics:
        parts = mine.samples(0, count).split(AT_ONCE)
        shown = tqdm(parts, name, disable=not (sys.stderr.isatty() and accelerator.is_main_process))
        return DigitStatistics.of(map(draw, shown), lambda tensor: accelerator.reduce(tensor, "sum"))

    def of_images(images: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda indices: to_unit_range(images[indices.cpu()].to(mine.device))

    reference = statistics("test images", of_images(test), len(test))
    floor = statistics("training images", of_images(train), FLOOR).compared_with(reference)
    found = statistics("samples", draw, options.count).compared_with(reference)
    real = reference.compared_with(reference)
    if not accelerator.is_main_process:
        return
    shares = [found[f"share_of_{digit}"] for digit in range(10)]
    distances = (found["frechet_distance"], floor["frechet_distance"])
    print("Fréchet distance  {:.3f}  (training images: {:.3f})".format(*distances))
    print(f"surely a digit    {found['sure']:.2%}  (test images: {real['sure']:.2%})")
    print("share of digits   " + "  ".join(f"{digit}: {share:.1%}" for digit, share in enumerate(shares)))
    out = options.out or options.run / "evaluation.json"
    figures = {
        "samples": options.count,
        "seed": options.seed,
        "weights": options.weights,
        **found,
        "floor": floor["frechet_distance"],
        "sure_of_test_images": real["sure"],
        "classifier_sha256": sha256(WEIGHTS),
    }
    try:
        write_json(out, figures)
    except OSError as error:
        raise Refused(f"--out {out} cannot be written: {error.strerror}") from None
    print(out)


if __name__ == "__main__":
    with errors_as_exit_codes():
        measure(parse(Evaluate, __doc__))
        leave(0)
