"""Images to pictures."""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cs324dist.runs.files import Writer, replaced


def grid(images: Float[Tensor, "count 1 28 28"], columns: int) -> UInt8[Tensor, "1 height width"]:
    """Images in [-1, 1] side by side, row by row, two pixels apart."""
    from torchvision.utils import make_grid

    tiles = make_grid(images.float().cpu(), columns, padding=2, pad_value=-1.0)[:1]
    return ((tiles + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(picture: UInt8[Tensor, "1 height width"], path: Path, writer: Writer | None = None) -> None:
    """Write a grey picture, under its name only when it is complete; see `replaced`."""
    with replaced(path, writer) as temporary:
        Image.fromarray(picture[0].numpy()).save(temporary, format="png")


def save_gif(
    images: Float[Tensor, "frames 1 28 28"], path: Path, scale: int = 6, frames_per_second: int = 20
) -> None:
    """Write images in [-1, 1] as a film that goes there and back, for ever."""
    film = [Image.fromarray(grid(image[None], 1)[0].numpy()) for image in images]
    film = [
        frame.resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST) for frame in film
    ]
    with replaced(path) as temporary:
        film[0].save(
            temporary,
            format="gif",
            save_all=True,
            append_images=film[1:] + film[-2:0:-1],
            duration=1000 // frames_per_second,
            loop=0,
        )
