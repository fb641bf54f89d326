"""Drawing from a trained generator, and finding latent vectors whose images are the digits one wants."""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cs324dist.data.streams import Stream
from cs324dist.errors import UserError
from cs324dist.runs.models import load_model
from cs324dist.runs.trained import find_network
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.statistics import SURE, read_digits

AT_ONCE = 500  # images of one forward pass
CANDIDATES = 1000
Weights = Literal["averaged", "raw"]


def load_generator(
    run_or_checkpoint: str | Path, weights: Weights = "averaged", *, best: bool = False
) -> Generator:
    """The generator of a GAN; see `load_network`.

    Args:
        run_or_checkpoint: a run folder, one of its `checkpoints/STEP-OWNER`, or a network's folder.
        weights: `averaged` takes the averaged generator if there is one; `raw` the one being trained.
        best: take the run's best checkpoint, as its --keep-best says, in place of the newest.
    """
    return load_model(find_generator(run_or_checkpoint, weights, best=best), Generator)


def find_generator(run_or_checkpoint: str | Path, weights: Weights, *, best: bool = False) -> Path:
    """The folder of the generator that `load_generator` loads; raises as it does."""
    names = ("generator_ema", "generator")[weights == "raw" :]
    return find_network(run_or_checkpoint, names, best=best)


def latents(generator: Generator, seed: int, count: int) -> Float[Tensor, "count latent"]:
    """Standard normal latents: the first of the seed's stream for sampling."""
    return Stream(seed, "latents/sampling").normals(torch.arange(count), generator.config["input_dim"])


@torch.no_grad()
def generate(generator: Generator, z: Float[Tensor, "count latent"]) -> Float[Tensor, "count 1 28 28"]:
    """Images in [-1, 1]."""
    return torch.cat([generator(part) for part in z.split(AT_ONCE)])


def surest(generator: Generator, digit: int, count: int, seed: int) -> Float[Tensor, "count latent"]:
    """Those of 1 000 candidates (20 times `count`, if that is more) whose images are most surely this digit.

    Raises:
        UserError: fewer than `count` candidates are surely (confidence above 0.95) this digit.
    """
    candidates = latents(generator, seed, max(CANDIDATES, 20 * count))
    digits, confidence, _ = read_digits(generate(generator, candidates))
    of_digit = torch.where(digits == digit, confidence, 0.0)
    best = of_digit.argsort(descending=True, stable=True)[:count]
    if (found := int((of_digit[best] > SURE).sum())) < count:
        raise UserError(
            f"of {len(candidates)} samples, {found} are surely a {digit} where {count} are needed: "
            f"give another --seed, or train for longer"
        )
    return candidates[best]
