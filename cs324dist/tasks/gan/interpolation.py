"""Walks through the latent space: the course report's Part II, Task 3."""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cs324dist.errors import UserError
from cs324dist.pictures import grid
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.sampling import generate, latents, surest

START, END, STRIP_IMAGES = 4, 1, 10  # two digits and the images of the walk, as in the course report
Method = Literal["linear", "spherical"]


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


def strip(
    generator: Generator,
    start: Float[Tensor, " latent"],
    end: Float[Tensor, " latent"],
    points: int,
    method: Method,
) -> UInt8[Tensor, "1 height width"]:
    """The images of a walk side by side."""
    return grid(generate(generator, interpolate(start, end, points, method)), points)
