"""Measure a trained generator: Fréchet distance to the test images, readable digits, shares of classes.

python launch/evaluate.py runs/gan-fast-0

python launch/evaluate.py runs/gan-fashion-mnist-fast-0 --classifier runs/classifier-fashion-mnist-fast-0

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/evaluate.py runs/gan-fast-0
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from cs324dist.command_line import parse
from cs324dist.config import POSITIONAL, Seed
from cs324dist.errors import UserError, errors_as_exit_codes, exit_process
from cs324dist.metrics.generators import GeneratorQuality, measure
from cs324dist.runs.files import check_writable, write_record
from cs324dist.runs.trained import run_of


@dataclass(frozen=True)
class Evaluate:
    """What to measure."""

    run: Annotated[Path, POSITIONAL]
    """A run folder (its newest checkpoint is taken), or a checkpoint."""

    count: Annotated[int, Interval(ge=1000, le=10**9)] = 10_000
    """Samples to draw; the distance depends on it."""

    seed: Seed = 0
    """Stream that latent vectors are drawn from."""

    weights: Literal["averaged", "raw"] = "averaged"
    """averaged: the averaged generator if there is one; raw: the one being trained."""

    classifier: Path | None = None
    """A run of launch/classifier.py that judges in place of the digit classifier that the project ships: for
    a run on other images than MNIST's."""

    data_root: Path = Path("data")
    """Folder of the data sets."""

    out: Path | None = None
    """File to write the figures to. Without it: evaluation.json in the run folder."""


def show(found: GeneratorQuality) -> None:
    """Print the figures."""
    times = found.frechet_distance / found.floor
    print(f"Fréchet distance  {found.frechet_distance:.3f}  ({times:.2f} times the floor, {found.floor:.3f})")
    print(f"  to training set {found.frechet_distance_to_training_images:.3f}")
    print(f"surely of a class {found.sure:.2%}  (test images: {found.sure_of_test_images:.2%})")
    print("share of classes  " + "  ".join(f"{n}: {share:.1%}" for n, share in enumerate(found.shares)))


if __name__ == "__main__":
    with errors_as_exit_codes():
        options = parse(Evaluate, __doc__)
        if options.out:
            check_writable(options.out)
        found = measure(
            options.run, options.count, options.seed, options.weights, options.classifier, options.data_root
        )
        if found is not None:
            show(found)
            out = options.out or run_of(options.run).path / "evaluation.json"
            try:
                write_record(out, found)
            except OSError as error:
                raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
            print(out)
        exit_process(0)
