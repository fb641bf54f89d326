"""What a trained generator is worth: its samples held against real images, the work shared out over ranks."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from cs324dist.data.images import load_images, to_unit_range
from cs324dist.data.streams import Stream
from cs324dist.distributed.process import on_main_process, shard, start_accelerator
from cs324dist.errors import UserError
from cs324dist.metrics.digits import DigitStatistics, digit_classifier
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.models.gan import Generator
from cs324dist.runs.models import load_model
from cs324dist.sampling.generators import AT_ONCE, data_set_of, find_generator, load_classifier

FLOOR = 10_000  # training images, the first of the set, whose distance is what chance allows


@torch.no_grad()
def measure(
    run_or_checkpoint: Path,
    count: int,
    seed: int,
    weights: Literal["averaged", "raw"],
    classifier_run: Path | None,
    data_root: Path,
) -> dict[str, Any] | None:
    """Samples of a generator against the test images, in the eyes of a classifier.

    Args:
        run_or_checkpoint: a run folder, or one of its checkpoints.
        count: samples to draw, over all ranks.
        seed: of the stream that the latents come from.
        weights: see `load_generator`.
        classifier_run: a run of launch/classifier.py that judges; None for the classifier of digits.
        data_root: folder of the data sets.

    Returns:
        The figures by name, shares in [0, 1]; None on all ranks but the first.

    Raises:
        UserError: there is no such generator, or the classifier knows other images.
    """
    accelerator = start_accelerator()
    # found by one, as a run that is trained meanwhile has a newer one at any moment
    folder = on_main_process(accelerator, lambda: find_generator(run_or_checkpoint, weights))
    generator, dataset = load_model(folder, Generator), data_set_of(run_or_checkpoint)
    classifier = load_classifier(classifier_run) if classifier_run else None
    known = data_set_of(classifier_run) if classifier_run else "mnist"
    if dataset != known:
        raise UserError(
            f"{run_or_checkpoint} draws {dataset}, the classifier knows {known}: give --classifier with a "
            f"run of launch/classifier.py --dataset {dataset}"
        )
    test, train = (load_images(dataset, split, data_root).images for split in ("test", "train"))
    mine = shard(accelerator)
    generator.to(mine.device)
    classifier = classifier.to(mine.device) if classifier else digit_classifier(mine.device)
    stream = Stream(seed, "latents/evaluation")

    def sampled(indices: Tensor) -> Tensor:
        return generator(stream.normals(indices, generator.config["input_dim"]))

    def of_images(images: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda indices: to_unit_range(images[indices.cpu()].to(mine.device))

    def statistics(name: str, draw: Callable[[Tensor], Tensor], count: int) -> DigitStatistics:
        parts = mine.samples(0, count).split(AT_ONCE)
        shown = tqdm(parts, name, disable=not (sys.stderr.isatty() and accelerator.is_main_process))
        return DigitStatistics.of(
            map(draw, shown), lambda tensor: accelerator.reduce(tensor, "sum"), classifier
        )

    reference = statistics("test images", of_images(test), len(test))
    trained_on = statistics("training images", of_images(train), FLOOR)
    samples = statistics("samples", sampled, count)
    if not accelerator.is_main_process:
        return None
    return {
        "samples": count,
        "seed": seed,
        "weights": "averaged" if folder.name == "generator_ema" else "raw",
        "dataset": dataset,
        **samples.compared_with(reference),
        "floor": trained_on.compared_with(reference)["frechet_distance"],
        "frechet_distance_to_training_images": samples.compared_with(trained_on)["frechet_distance"],
        "sure_of_test_images": reference.compared_with(reference)["sure"],
        "classifier_sha256": digest(classifier),
    }


def digest(classifier: DigitClassifier) -> str:
    """SHA-256 of its file."""
    tensors = {name: tensor.cpu() for name, tensor in classifier.state_dict().items()}
    return hashlib.sha256(save(tensors)).hexdigest()
