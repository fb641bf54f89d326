"""Images to pictures."""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from cs324dist.runs.files import Writer, replaced


def grid(images: Float[Tensor, "count 1 28 28"], columns: int) -> UInt8[Tensor, "1 height width"]:
    """Images in [-1, 1] side by side, row by row, two pixels apart."""
    from torchvision.utils import make_grid

    tiles = make_grid(images.float().cpu(), columns, padding=2, pad_value=-1.0)[:1]
    return ((tiles + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(
    picture: UInt8[Tensor, "channels height width"], path: Path, writer: Writer | None = None
) -> None:
    """Write a picture in grey or RGB, under its name only when it is complete; see `replaced`."""
    pixels = picture.cpu().permute(1, 2, 0).numpy()
    with replaced(path, writer) as temporary:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(temporary, format="png")


def save_gif(images: Float[Tensor, "frames 1 28 28"], path: Path) -> None:
    """Write images in [-1, 1] as a film, six times as large, that goes there and back, for ever."""
    frames = (Image.fromarray(grid(image[None], 1)[0].numpy()) for image in images)
    film = [ImageOps.scale(frame, 6, Image.Resampling.NEAREST) for frame in frames]
    rest = film[1:] + film[-2:0:-1]
    with replaced(path) as temporary:
        film[0].save(temporary, "gif", save_all=True, append_images=rest, duration=50, loop=0)
