"""Measure a trained generator: Fréchet distance to the test images, what can be read, which digits come.

python launch/evaluate.py runs/gan-fast-0

python launch/evaluate.py runs/gan-fashion-mnist-fast-0 --classifier runs/classifier-fashion-mnist-fast-0

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/evaluate.py runs/gan-fast-0
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from cs324dist.command_line import OneOf, Within, parse
from cs324dist.data.images import SHA256, load_images, to_unit_range
from cs324dist.data.streams import Stream
from cs324dist.errors import Refused, errors_as_exit_codes, leave
from cs324dist.evaluation.digits import DigitStatistics, digit_classifier
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.runs.files import write_json
from cs324dist.runs.folder import RunFolder
from cs324dist.sampling.generators import AT_ONCE, load_classifier, load_generator
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

    classifier: Path | None = None
    """A run of launch/classifier.py that judges in place of the digit classifier that the project ships: for
    a run on other images than MNIST's."""

    data_root: Path = Path("data")
    """Folder of the data sets."""

    out: Path | None = None
    """File to write the figures to. Default: evaluation.json in the run folder."""


def run_of(run_or_checkpoint: Path) -> RunFolder:
    """The run that it is, or belongs to as far as can be seen."""
    run, around = RunFolder(run_or_checkpoint), RunFolder(run_or_checkpoint.absolute().parent.parent)
    return around if around.exists and not run.exists else run


def data_set_of(run: RunFolder) -> str:
    """What it was trained on; mnist where that is unknown, or the run is on noise."""
    settings = run.read_config().get("settings") if run.exists else None
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    return dataset if isinstance(dataset, str) and dataset in SHA256 else "mnist"


def digest(classifier: DigitClassifier) -> str:
    """SHA-256 of its file."""
    tensors = {name: tensor.cpu() for name, tensor in classifier.state_dict().items()}
    return hashlib.sha256(save(tensors)).hexdigest()


@torch.no_grad()
def measure(options: Evaluate) -> None:
    """Print the figures, and write them."""
    generator, dataset = load_generator(options.run, options.weights), data_set_of(run_of(options.run))
    classifier = load_classifier(options.classifier) if options.classifier else None
    known = data_set_of(run_of(options.classifier)) if options.classifier else "mnist"
    if dataset != known:
        raise Refused(
            f"{options.run} draws {dataset}, the classifier knows {known}: give --classifier with a run of "
            f"launch/classifier.py --dataset {dataset}"
        )
    test, train = (load_images(dataset, split, options.data_root).images for split in ("test", "train"))
    accelerator = start_accelerator()
    mine = shard(accelerator)
    generator.to(mine.device)
    classifier = classifier.to(mine.device) if classifier else digit_classifier(mine.device)
    stream = Stream(options.seed, "latents/evaluation")

    def draw(indices: Tensor) -> Tensor:
        return generator(stream.normals(indices, generator.config["input_dim"]))

    def statistics(name: str, draw: Callable[[Tensor], Tensor], count: int) -> DigitStatistics:
        parts = mine.samples(0, count).split(AT_ONCE)
        shown = tqdm(parts, name, disable=not (sys.stderr.isatty() and accelerator.is_main_process))
        return DigitStatistics.of(
            map(draw, shown), lambda tensor: accelerator.reduce(tensor, "sum"), classifier
        )

    def of_images(images: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda indices: to_unit_range(images[indices.cpu()].to(mine.device))

    reference = statistics("test images", of_images(test), len(test))
    trained_on = statistics("training images", of_images(train), FLOOR)
    floor = trained_on.compared_with(reference)["frechet_distance"]
    samples = statistics("samples", draw, options.count)
    found, real = (of.compared_with(reference) for of in (samples, reference))
    to_training = samples.compared_with(trained_on)["frechet_distance"]
    if not accelerator.is_main_process:
        return
    distance, shares = found["frechet_distance"], [found[f"share_of_{digit}"] for digit in range(10)]
    print(f"Fréchet distance  {distance:.3f}  ({distance / floor:.2f} times the floor, {floor:.3f})")
    print(f"  to training set {to_training:.3f}")
    print(f"surely of a class {found['sure']:.2%}  (test images: {real['sure']:.2%})")
    print("share of classes  " + "  ".join(f"{digit}: {share:.1%}" for digit, share in enumerate(shares)))
    out = options.out or run_of(options.run).path / "evaluation.json"
    figures = {
        "samples": options.count,
        "seed": options.seed,
        "weights": options.weights,
        "dataset": dataset,
        **found,
        "floor": floor,
        "frechet_distance_to_training_images": to_training,
        "sure_of_test_images": real["sure"],
        "classifier_sha256": digest(classifier),
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
