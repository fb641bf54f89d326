"""Drawing from a trained generator: images, the digits that one wants, and walks through the latent space."""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cs324dist.data.streams import Stream
from cs324dist.errors import UserError
from cs324dist.pictures import grid
from cs324dist.runs.models import load_model
from cs324dist.runs.trained import find_network
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.statistics import SURE, read_digits

AT_ONCE = 500  # images of one forward pass
CANDIDATES = 1000
START, END, STRIP_IMAGES = 4, 1, 10  # two digits and the images of the walk, as in the course report
Weights = Literal["averaged", "raw"]
Method = Literal["linear", "spherical"]


def load_generator(
    run_or_checkpoint: str | Path, weights: Weights = "averaged", *, best: bool = False
) -> Generator:
    """The generator of a GAN; see `load_network`.

    Args:
        run_or_checkpoint: a run folder, one of its `checkpoints/STEP-OWNER`, or a network's folder.
        weights: `averaged` takes the averaged generator if there is one; `raw` the one being trained.
        best: take the run's best checkpoint, as its --keep-best says, in place of the newest.
    """
    names = ("generator_ema", "generator")[weights == "raw" :]
    return load_model(find_network(run_or_checkpoint, names, best=best), Generator)


def latents(generator: Generator, seed: int, count: int) -> Float[Tensor, "count latent"]:
    """Standard normal latents: the first of the seed's stream for sampling."""
    return Stream(seed, "latents/sampling").normals(torch.arange(count), generator.config["input_dim"])


@torch.no_grad()
def generate(generator: Generator, z: Float[Tensor, "count latent"]) -> Float[Tensor, "count 1 28 28"]:
    """Images in [-1, 1]."""
    return torch.cat([generator(part) for part in z.split(AT_ONCE)])


def surest(generator: Generator, digit: int, count: int, seed: int) -> Float[Tensor, "count latent"]:
    """Those of 1 000 candidates (20 times `count`, if that is more) whose images are most surely this digit.

    A `UserError` says where fewer are surely (confidence above 0.95) this digit.
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


def interpolate(
    start: Float[Tensor, " latent"], end: Float[Tensor, " latent"], points: int, method: Method
) -> Float[Tensor, "points latent"]:
    """`points` latents from `start` to `end`, both included.

    `linear` takes the straight line, on which the norm falls below what the generator was trained on.
    `spherical` turns at constant speed and changes the norm evenly (Shoemake 1985; White 2016); if the ends
    are parallel, opposite or zero, it takes the straight line too.
    """
    a, b = start.double(), end.double()
    t = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    if method == "spherical" and a.any() and b.any():
        from_a, to_b = a / a.norm(), b / b.norm()
        # half angles by their tangent: an arccos has no digits left near 0 and π
        angle = 2 * torch.atan2((from_a - to_b).norm(), (from_a + to_b).norm())
        if angle.sin() > 1e-6:  # else parallel, or opposite: no plane to turn in
            directions = (((1 - t) * angle).sin() * from_a + (t * angle).sin() * to_b) / angle.sin()
            return (((1 - t) * a.norm() + t * b.norm()) * directions).to(start.dtype)
    return ((1 - t) * a + t * b).to(start.dtype)


def walk_ends(generator: Generator) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"], str]:
    """Two latents to walk between, and what they show: a 4 and a 1, or any two images."""
    try:
        start, end = (surest(generator, digit, 1, seed=0)[0] for digit in (START, END))
    except UserError:  # it draws no such digits, or not yet
        start, end = latents(generator, 0, 2)
        return start, end, "from one image to another"
    return start, end, f"from a {START} to a {END}"


def strip(generator: Generator, walk: Float[Tensor, "points latent"]) -> UInt8[Tensor, "1 height width"]:
    """The images of a walk side by side."""
    return grid(generate(generator, walk), len(walk))
