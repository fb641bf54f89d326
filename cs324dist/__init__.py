"""Two small classics, an LSTM and a GAN, trained the same at any world size."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

PARENT = os.getppid()  # at the start, before the seconds that torch's import takes

if TYPE_CHECKING:
    from cs324dist.models.gan import Generator


def load_generator(
    run_or_checkpoint: str | Path, weights: Literal["averaged", "raw"] = "averaged"
) -> "Generator":
    """A trained generator, in eval mode on the CPU; see `cs324dist.sampling.generators`."""
    from cs324dist.sampling.generators import load_generator

    return load_generator(run_or_checkpoint, weights)
