"""Measure a trained generator: Fréchet distance to the test images, clear digits, the share of each digit.

    python benchmarks/measure_gan.py runs/gan-fast-0

It prints a line of JSON. `frechet_distance` is between the samples and the test images, `floor` between the
first 10 000 training images and the test images; `sure` is the share of samples that the digit classifier is
sure of, `shares` that of each digit.

Precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991) are held against those
10 000 training images: precision is the share of samples that lie among them, recall their share that lies
among the samples. `nearest` is the median distance, in the classifier's features, to the nearest of all
training images: copies would be nearer than test images are.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import REPOSITORY, Row, command_line
from jaxtyping import Bool, Float
from torch import Tensor

from cs324dist.data.streams import Stream
from cs324dist.distributed.process import start_accelerator
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import errors_as_exit_codes
from cs324dist.runs.models import load_model
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.sampling import find_generator
from cs324dist.tasks.gan.statistics import WEIGHTS, DigitStatistics, read_digits

FLOOR = 10_000  # training images, the first of the set, whose distance is the floor
NEIGHBOUR = 3  # that says how far a point reaches, as in the paper
AT_ONCE = 500  # images

Features = Float[Tensor, "images features"]


def lies_among(points: Features, known: Features) -> Bool[Tensor, " images"]:
    """Which points are as near to a known one as its third neighbour is."""
    reach = torch.cat([some.kthvalue(NEIGHBOUR + 1).values for some in distances(known, known)])  # 0: itself
    return torch.cat([(some <= reach).any(1) for some in distances(points, known)])


def to_nearest(points: Features, known: Features) -> float:
    """The median distance of points to the nearest known one."""
    return torch.cat([some.amin(1) for some in distances(points, known)]).median().item()


@torch.no_grad()
def features(draw: Callable[[Tensor], Tensor], count: int) -> Features:
    """The classifier's, of the images that are drawn for the indices [0, count)."""
    return torch.cat([read_digits(draw(some))[2] for some in torch.arange(count).split(AT_ONCE)])


def share(of: Bool[Tensor, " images"]) -> float:
    return of.double().mean().item()


def distances(points: Features, known: Features) -> Iterator[Tensor]:
    """Distances of some points after others to all known ones."""
    return (torch.cdist(some, known) for some in points.split(AT_ONCE))


def measure(run: Path, count: int, seed: int, data_root: Path) -> Row:
    """Compare `count` samples with the test images, by the classifier's features and answers."""
    accelerator, stream = start_accelerator(), Stream(seed, "latents/evaluation")
    folder = find_generator(run, "averaged")
    generator = load_model(folder, Generator).to(accelerator.device)
    test, train = (
        load_images("mnist", split, data_root).images.to(accelerator.device) for split in ("test", "train")
    )

    draws: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
        "samples": (lambda indices: generator(stream.normals(indices, generator.config["input_dim"])), count),
        "test": (lambda indices: to_unit_range(test[indices]), len(test)),
        "train": (lambda indices: to_unit_range(train[indices]), FLOOR),
    }
    of_samples, of_test, of_train = (
        DigitStatistics.of(*draw, SumOver(accelerator)) for draw in draws.values()
    )
    found = of_samples.compared_with(of_test)
    row = {
        "samples": count,
        "seed": seed,
        "weights": "averaged" if folder.name == "generator_ema" else "raw",
        "dataset": "mnist",
        "frechet_distance": found["frechet_distance"],
        "floor": of_train.compared_with(of_test)["frechet_distance"],
        "frechet_distance_to_training_images": of_samples.compared_with(of_train)["frechet_distance"],
        "sure": found["sure"],
        "sure_of_test_images": of_test.compared_with(of_test)["sure"],
        "shares": [found[f"share_of_{digit}"] for digit in range(10)],
        "classifier_sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
    }
    known = features(draws["train"][0], len(train))
    for name, suffix in (("samples", ""), ("test", "_of_test_images")):
        points = features(*draws[name])
        row[f"precision{suffix}"] = share(lies_among(points, known[:FLOOR]))
        row[f"recall{suffix}"] = share(lies_among(known[:FLOOR], points))
        row[f"nearest{suffix}"] = to_nearest(points, known)
    return row


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint")
    parser.add_argument("--count", type=int, default=10_000, help="samples; the distance depends on it")
    parser.add_argument("--seed", type=int, default=0, help="of the latents")
    parser.add_argument("--data-root", type=Path, default=REPOSITORY / "data")
    with errors_as_exit_codes():
        print(json.dumps(measure(**vars(parser.parse_args()))))
