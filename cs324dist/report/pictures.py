"""Pictures as `data:` addresses: films of sample grids, and walks through the latent space."""

import base64
import io
from dataclasses import dataclass

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from cs324dist.pictures import grid
from cs324dist.report.charts import evenly, number
from cs324dist.report.reading import Run
from cs324dist.tasks.gan import sampling

WALK_FRAMES = 48
LARGEST = 640  # pixels of a sample's longer side on the page
METHODS: tuple[sampling.Method, ...] = ("linear", "spherical")


@dataclass(frozen=True)
class Frame:
    """A picture, or some side by side, at one place of the slider."""

    label: str
    sources: list[str]
    shares: list[float] | None = None


@dataclass(frozen=True)
class Walk:
    """From one image to another, by each method."""

    ends: str
    frames: list[Frame]
    strips: dict[sampling.Method, str]


def film(run: Run, most_frames: int) -> list[Frame]:
    """The run's samples, evenly thinned; those that cannot be read become a problem of the run."""
    frames, damaged = [], []
    for step in evenly(list(run.samples), most_frames):
        shares = [run.series(f"eval/share_of_{digit}").get(step) for digit in range(10)]
        valid = [share for share in shares if share is not None and 0 <= share <= 1]
        try:
            with Image.open(run.samples[step], formats=["PNG"]) as picture:
                picture.thumbnail((LARGEST, LARGEST))
                plain = picture.convert("L" if picture.mode == "L" else "RGB")
                source = encoded(plain, "WEBP", quality=60, method=4)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            damaged.append(f"samples/{run.samples[step].name}")
        else:
            frames.append(Frame(f"step {number(step)}", [source], valid if len(valid) == 10 else None))
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        run.problems.append(f"{damaged[0]}{more} cannot be read: the film goes on without")
    return frames


def walk(run: Run) -> Walk:
    """A walk through the latent space of the run's newest checkpoint; raises as `load_generator` does."""
    generator = sampling.load_generator(run.path)
    start, end, ends = sampling.walk_ends(generator)
    strips, walks = {}, []
    for method in METHODS:
        few = sampling.interpolate(start, end, sampling.STRIP_IMAGES, method)
        many = sampling.interpolate(start, end, WALK_FRAMES, method)
        strips[method] = _as_png(sampling.strip(generator, few))
        walks.append(sampling.generate(generator, many))
    frames = [
        Frame(f"{k} of {WALK_FRAMES}", [_as_png(grid(image[None], 1)) for image in images])
        for k, images in enumerate(zip(*walks, strict=True), 1)
    ]
    return Walk(ends, frames, strips)


def _as_png(tiles: UInt8[Tensor, "1 height width"]) -> str:
    return encoded(Image.fromarray(tiles[0].contiguous().numpy()), "PNG", optimize=True)


def encoded(picture: Image.Image, kind: str, **options: int) -> str:
    """A picture in a `data:` address, which is a third longer than the file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
