"""Walks through the latent space: the report's Part II, Task 3."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Method = Literal["linear", "spherical"]


def interpolate(
    start: Float[Tensor, " latent"], end: Float[Tensor, " latent"], points: int, method: Method
) -> Float[Tensor, "points latent"]:
    """`points` latents from `start` to `end`, both included.

    `linear` goes straight; on its way the norm falls below what the generator was trained on. `spherical`
    turns at constant speed and changes the norm evenly (Shoemake 1985; White 2016); where the ends are
    parallel, opposite or zero, it is the straight way.
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
