"""Measure a trained generator: Fréchet distance to the test images, what can be read, which digits come.

python launch/evaluate.py runs/gan-fast-0

python launch/evaluate.py runs/gan-fashion-mnist-fast-0 --classifier runs/classifier-fashion-mnist-fast-0

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/evaluate.py runs/gan-fast-0
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from cs324dist.command_line import OneOf, Within, parse
from cs324dist.errors import UserError, errors_as_exit_codes, exit_process
from cs324dist.metrics.generators import measure
from cs324dist.runs.files import check_writable, write_json
from cs324dist.sampling.generators import run_of


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


def show(found: Mapping[str, Any]) -> None:
    """Print the figures."""
    distance, floor = found["frechet_distance"], found["floor"]
    print(f"Fréchet distance  {distance:.3f}  ({distance / floor:.2f} times the floor, {floor:.3f})")
    print(f"  to training set {found['frechet_distance_to_training_images']:.3f}")
    print(f"surely of a class {found['sure']:.2%}  (test images: {found['sure_of_test_images']:.2%})")
    print("share of classes  " + "  ".join(f"{n}: {found[f'share_of_{n}']:.1%}" for n in range(10)))


def store(found: Mapping[str, Any], out: Path) -> None:
    """Write the figures to `out`."""
    try:
        write_json(out, found)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    print(out)


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
            store(found, options.out or run_of(options.run).path / "evaluation.json")
        exit_process(0)
