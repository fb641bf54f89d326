"""Drawing from a trained generator, and finding latent vectors whose images are the digits one wants."""

import torch
from jaxtyping import Float
from torch import Tensor

from cs324dist.data.streams import Stream
from cs324dist.errors import UserError
from cs324dist.metrics.digits import SURE, read_digits
from cs324dist.models.gan import Generator

AT_ONCE = 500  # images of one forward pass
CANDIDATES = 1000


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
