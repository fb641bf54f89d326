"""Measure a trained generator: Fréchet distance to the test images, clear digits, the share of each digit.

    python benchmarks/measure_gan.py runs/gan-fast-0

It prints a line of JSON. `frechet_distance` is between the samples and the test images, `floor` between the
first 10 000 training images and the test images; `sure` is the share of samples that the digit classifier is
sure of, `shares` that of each digit.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from common import REPOSITORY, Row, command_line
from torch import Tensor

from cs324dist.data.streams import Stream
from cs324dist.distributed.process import start_accelerator
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import errors_as_exit_codes
from cs324dist.runs.models import load_model
from cs324dist.runs.trained import find_network
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.statistics import WEIGHTS, DigitStatistics

FLOOR = 10_000  # training images, the first of the set, whose distance is the floor


def measure(run: Path, count: int, seed: int, data_root: Path) -> Row:
    """Compare `count` samples with the test images, by the classifier's features and answers."""
    accelerator, stream = start_accelerator(), Stream(seed, "latents/evaluation")
    folder = find_network(run, ("generator_ema", "generator"))
    generator = load_model(folder, Generator).to(accelerator.device)
    test, train = (
        load_images("mnist", split, data_root).images.to(accelerator.device) for split in ("test", "train")
    )

    def statistics(draw: Callable[[Tensor], Tensor], count: int) -> DigitStatistics:
        return DigitStatistics.of(draw, count, SumOver(accelerator))

    of_test = statistics(lambda indices: to_unit_range(test[indices]), len(test))
    of_train = statistics(lambda indices: to_unit_range(train[indices]), FLOOR)
    of_samples = statistics(
        lambda indices: generator(stream.normals(indices, generator.config["input_dim"])), count
    )
    found = of_samples.compared_with(of_test)
    return {
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


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint")
    parser.add_argument("--count", type=int, default=10_000, help="samples; the distance depends on it")
    parser.add_argument("--seed", type=int, default=0, help="of the latents")
    parser.add_argument("--data-root", type=Path, default=REPOSITORY / "data")
    with errors_as_exit_codes():
        print(json.dumps(measure(**vars(parser.parse_args()))))
