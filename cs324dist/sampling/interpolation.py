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
    turns at constant speed and changes the norm evenly (Shoemake 1985; White 2016).
    """
    t = torch.linspace(0, 1, points, dtype=start.dtype)[:, None]
    straight = (1 - t) * start + t * end
    if method == "linear":
        return straight
    lengths = (1 - t) * start.norm() + t * end.norm()
    a, b = start / start.norm(), end / end.norm()
    angle = torch.arccos((a @ b).clamp(-1, 1))
    if angle.sin() < 1e-4:  # parallel: a plane to turn in is not defined, or not needed
        return straight
    return lengths * (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
