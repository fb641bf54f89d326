"""Finding a trained generator, and latent vectors whose images are the digits one wants."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cs324dist.data.images import SHA256
from cs324dist.data.streams import Stream
from cs324dist.errors import UserError
from cs324dist.metrics.digits import SURE, read_digits
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.models.gan import Generator
from cs324dist.runs.checkpoints import TRAINER, WEIGHTS, checkpoints_in, verify_checkpoint
from cs324dist.runs.models import load_model
from cs324dist.runs.run_dir import RunDir

AT_ONCE = 500  # images of one forward pass
CANDIDATES = 1000


def load_generator(
    run_or_checkpoint: str | Path, weights: Literal["averaged", "raw"] = "averaged"
) -> Generator:
    """The generator of a run's newest checkpoint, or of a checkpoint, in eval mode on the CPU.

    Args:
        run_or_checkpoint: a run folder, or one of its `checkpoints/NNNNNNNNN`.
        weights: `averaged` takes the averaged generator where there is one; `raw` the one being trained.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it is not a GAN's.
    """
    return load_model(find_generator(run_or_checkpoint, weights), Generator)


def find_generator(run_or_checkpoint: str | Path, weights: Literal["averaged", "raw"]) -> Path:
    """The folder of the generator that `load_generator` loads; raises as it does."""
    return _find(run_or_checkpoint, ("generator_ema", "generator")[weights == "raw" :], "gan")


def load_classifier(run_or_checkpoint: str | Path) -> DigitClassifier:
    """The classifier of a run's newest checkpoint, or of a checkpoint, in eval mode on the CPU.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it is not a classifier's.
    """
    return load_model(_find(run_or_checkpoint, ("classifier",), "classifier"), DigitClassifier)


def run_of(run_or_checkpoint: Path) -> RunDir:
    """The run that it is, or belongs to as far as can be seen."""
    run, around = RunDir(run_or_checkpoint), RunDir(run_or_checkpoint.absolute().parent.parent)
    return around if around.exists and not run.exists else run


def data_set_of(run_or_checkpoint: Path) -> str:
    """What it was trained on; mnist where that is unknown, or the run is on noise."""
    run = run_of(run_or_checkpoint)
    settings = run.read_config().get("settings") if run.exists else None
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    return dataset if isinstance(dataset, str) and dataset in SHA256 else "mnist"


def _find(run_or_checkpoint: str | Path, names: Sequence[str], script: str) -> Path:
    checkpoint = _checkpoint(Path(run_or_checkpoint))
    name = next((name for name in names if (checkpoint / name).is_dir()), None)
    if name is None:
        raise UserError(f"{checkpoint} holds no {names[-1]}: give a run of launch/{script}.py")
    verify_checkpoint(checkpoint, [f"{name}/config.json", f"{name}/{WEIGHTS}"])
    return checkpoint / name


def _checkpoint(path: Path) -> Path:
    if (path / TRAINER).is_file():
        return path
    run = RunDir(path)
    if not run.exists:
        raise UserError(
            f"{path} is neither a run nor a checkpoint: give a run folder, such as runs/gan-fast-0"
        )
    checkpoints = checkpoints_in(run.checkpoints)
    if not checkpoints:
        raise UserError(f"{path} has no checkpoint yet: train it for longer, or lower its --checkpoint-every")
    return checkpoints[0]


def latents(generator: Generator, seed: int, start: int, count: int) -> Float[Tensor, "count latent"]:
    """Standard normal latents: samples [start, start + count) of the seed's stream for sampling."""
    indices = torch.arange(start, start + count)
    return Stream(seed, "latents/sampling").normals(indices, generator.config["input_dim"])


@torch.no_grad()
def generate(generator: Generator, z: Float[Tensor, "count latent"]) -> Float[Tensor, "count 1 28 28"]:
    """Images in [-1, 1]."""
    return torch.cat([generator(part) for part in z.split(AT_ONCE)])


def surest(generator: Generator, digit: int, count: int, seed: int) -> Float[Tensor, "count latent"]:
    """Those of 1 000 candidates (20 times `count`, if that is more) whose images are most surely this digit.

    Raises:
        UserError: fewer than `count` candidates are surely (confidence above 0.95) this digit.
    """
    candidates = latents(generator, seed, 0, max(CANDIDATES, 20 * count))
    digits, confidence, _ = read_digits(generate(generator, candidates))
    of_digit = torch.where(digits == digit, confidence, 0.0)
    best = of_digit.argsort(descending=True, stable=True)[:count]
    if (found := int((of_digit[best] > SURE).sum())) < count:
        raise UserError(
            f"of {len(candidates)} samples, {found} are surely a {digit} where {count} are needed: "
            f"give another --seed, or train for longer"
        )
    return candidates[best]
