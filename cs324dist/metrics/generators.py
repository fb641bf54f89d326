"""Measuring a trained generator against real images."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from cs324dist.data.images import load_images, to_unit_range
from cs324dist.data.streams import Stream
from cs324dist.distributed.process import on_main_process, start_accelerator
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import UserError
from cs324dist.metrics.digits import DigitStatistics, digit_classifier
from cs324dist.models.gan import Generator
from cs324dist.runs.models import load_model
from cs324dist.runs.trained import Weights, data_set_of, find_generator, load_classifier

FLOOR = 10_000  # training images, the first of the set, whose distance is the floor


@dataclass(frozen=True)
class GeneratorQuality:
    """What `measure` found; shares are in [0, 1]."""

    samples: int
    seed: int
    weights: Weights
    dataset: str
    frechet_distance: float
    """To the test images."""

    floor: float
    """The distance of 10 000 training images to the test images."""

    frechet_distance_to_training_images: float
    sure: float
    """Share of the samples that the classifier is sure of."""

    sure_of_test_images: float
    shares: list[float]
    """Share of each class among the samples."""

    classifier_sha256: str
    """Of its weights' file."""


@torch.no_grad()
def measure(
    run_or_checkpoint: Path,
    count: int,
    seed: int,
    weights: Weights,
    classifier_run: Path | None,
    data_root: Path,
) -> GeneratorQuality | None:
    """Compare samples of a generator with the test images, by a classifier's features and answers.

    Args:
        run_or_checkpoint: a run folder, or one of its checkpoints.
        count: samples to draw, over all processes.
        seed: of the stream that the latents come from.
        weights: see `load_generator`.
        classifier_run: a run of launch/classifier.py that judges; None for the classifier of digits.
        data_root: folder of the data sets.

    Returns:
        The figures; None on all processes except the first.

    Raises:
        UserError: there is no such generator, or the classifier knows other images.
    """
    accelerator = start_accelerator()
    # found by one process, because a run that is being trained may have a newer one at any moment
    folder = on_main_process(accelerator, lambda: find_generator(run_or_checkpoint, weights))
    generator, dataset = load_model(folder, Generator), data_set_of(run_or_checkpoint)
    classifier = load_classifier(classifier_run) if classifier_run else None
    known = data_set_of(classifier_run) if classifier_run else "mnist"
    if dataset != known:
        raise UserError(
            f"{run_or_checkpoint} draws {dataset}, the classifier knows {known}: give --classifier with a "
            f"run of launch/classifier.py --dataset {dataset}"
        )
    device, stream = accelerator.device, Stream(seed, "latents/evaluation")
    test, train = (load_images(dataset, split, data_root).images.to(device) for split in ("test", "train"))
    classifier = classifier.to(device) if classifier else digit_classifier(device)
    generator.to(device)

    def sampled(indices: Tensor) -> Tensor:
        return generator(stream.normals(indices, generator.config["input_dim"]))

    def statistics(name: str, draw: Callable[[Tensor], Tensor], count: int) -> DigitStatistics:
        show = sys.stderr.isatty() and accelerator.is_main_process
        sum_over = SumOver(accelerator, lambda rounds: tqdm(rounds, name, disable=not show))
        return DigitStatistics.of(draw, count, sum_over, classifier)

    reference = statistics("test images", lambda indices: to_unit_range(test[indices]), len(test))
    trained_on = statistics("training images", lambda indices: to_unit_range(train[indices]), FLOOR)
    samples = statistics("samples", sampled, count)
    if not accelerator.is_main_process:
        return None
    found = samples.compared_with(reference)
    return GeneratorQuality(
        samples=count,
        seed=seed,
        weights="averaged" if folder.name == "generator_ema" else "raw",
        dataset=dataset,
        frechet_distance=found["frechet_distance"],
        sure=found["sure"],
        shares=[found[f"share_of_{digit}"] for digit in range(10)],
        floor=trained_on.compared_with(reference)["frechet_distance"],
        frechet_distance_to_training_images=samples.compared_with(trained_on)["frechet_distance"],
        sure_of_test_images=reference.compared_with(reference)["sure"],
        classifier_sha256=hashlib.sha256(save(classifier.state_dict())).hexdigest(),
    )
