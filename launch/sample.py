"""Draw from a trained generator.

python launch/sample.py grid RUN --rows 8 --columns 8 --out grid.png

python launch/sample.py grid RUN --digit 7

python launch/sample.py tensor RUN --count 10000 --out samples.safetensors

python launch/sample.py interpolate RUN --start-digit 4 --end-digit 1 --between 8 --out strip.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from cs324dist.command_line import parse_command
from cs324dist.config import POSITIONAL, Seed
from cs324dist.errors import UserError, errors_as_exit_codes
from cs324dist.pictures import grid, save_gif, save_png
from cs324dist.runs.files import check_writable, replaced
from cs324dist.runs.models import save_tensors
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.sampling import generate, interpolate, latents, load_generator, strip, surest

FRAMES = 60  # of the film from one end to the other
Digit = Annotated[int, Interval(ge=0, le=9)] | None


@dataclass(frozen=True)
class Drawing:
    """What every command has."""

    run: Annotated[Path, POSITIONAL]
    """A run folder (its newest checkpoint is taken), or a checkpoint."""

    best: bool = False
    """Of a run that was trained with --keep-best: take its best checkpoint."""

    seed: Seed = 0
    """Stream that latent vectors are drawn from."""

    weights: Literal["averaged", "raw"] = "averaged"
    """averaged: the averaged generator if there is one; raw: the one being trained."""

    def generator(self) -> Generator:
        """The one to draw from."""
        return load_generator(self.run, self.weights, best=self.best)


@dataclass(frozen=True)
class Grid(Drawing):
    """Images side by side."""

    rows: Annotated[int, Interval(ge=1, le=1000)] = 8
    """Images from top to bottom."""

    columns: Annotated[int, Interval(ge=1, le=1000)] = 8
    """Images from left to right."""

    digit: Digit = None
    """Only this digit, 0 to 9, as the classifier reads it, the surest first. Default: whatever comes."""

    out: Path = Path("grid.png")
    """Picture to write."""

    def draw(self) -> None:
        """Write the picture."""
        generator, count = self.generator(), self.rows * self.columns
        if self.digit is None:
            z = latents(generator, self.seed, count)
        else:
            z = surest(generator, self.digit, count, self.seed)
        save_png(grid(generate(generator, z), self.columns), self.out)


@dataclass(frozen=True)
class TensorFile(Drawing):
    """Images as one tensor: `images`, float32 in [-1, 1], (count, 1, 28, 28)."""

    count: Annotated[int, Interval(ge=1, le=10**6)] = 10_000
    """Images to draw."""

    out: Path = Path("samples.safetensors")
    """File to write."""

    def draw(self) -> None:
        """Write the file."""
        generator = self.generator()
        images = generate(generator, latents(generator, self.seed, self.count))
        with replaced(self.out) as temporary:
            save_tensors(temporary, {"images": images})


@dataclass(frozen=True)
class Interpolation(Drawing):
    """A walk from one image to another, as the report shows it: the two ends and what lies between."""

    start_digit: Digit = None
    """Digit to start from, 0 to 9; the surest that is found."""

    end_digit: Digit = None
    """Digit to end with, 0 to 9."""

    start_seed: Seed | None = None
    """In place of --start-digit: start from the first image of this seed."""

    end_seed: Seed | None = None
    """In place of --end-digit: end with the first image of this seed."""

    between: Annotated[int, Interval(ge=0, le=1000)] = 8
    """Images between the ends."""

    method: Literal["linear", "spherical"] = "spherical"
    """linear: the straight way; spherical: on an arc, through latents of usual length."""

    out: Path = Path("strip.png")
    """Picture to write."""

    gif: Path | None = None
    """Film to write as well, there and back."""

    def draw(self) -> None:
        """Write the strip, and the film if it is wanted."""
        ends = {"start": (self.start_digit, self.start_seed), "end": (self.end_digit, self.end_seed)}
        if lines := [
            f"give either --{end}-digit or --{end}-seed"
            for end, given in ends.items()
            if given.count(None) != 1
        ]:
            raise UserError(*lines)
        generator = self.generator()

        def latent(digit: int, seed: int | None) -> torch.Tensor:
            if seed is not None:
                return latents(generator, seed, 1)[0]
            return surest(generator, digit, 1, self.seed)[0]

        start = latent(self.start_digit, self.start_seed)
        end = latent(self.end_digit, self.end_seed)
        save_png(strip(generator, interpolate(start, end, self.between + 2, self.method)), self.out)
        if self.gif:
            save_gif(generate(generator, interpolate(start, end, FRAMES, self.method)), self.gif)
            print(self.gif)


COMMANDS: dict[str, type[Drawing]] = {"grid": Grid, "tensor": TensorFile, "interpolate": Interpolation}


if __name__ == "__main__":
    with errors_as_exit_codes():
        command = parse_command(COMMANDS, __doc__)
        for path in (command.out, getattr(command, "gif", None)):
            if path:
                check_writable(path)
        command.draw()
        print(command.out)
