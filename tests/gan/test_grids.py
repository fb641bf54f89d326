from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from torch import Tensor

from cs324dist.pictures import grid, save_gif, save_png


def constant(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tiles_lie_row_by_row_two_pixels_apart(dtype: torch.dtype) -> None:
    expected = np.zeros((62, 92), np.uint8)  # 2 + 2 rows of 28 + 2, 2 + 3 columns of 28 + 2
    expected[2:30, 2:30] = 0
    expected[2:30, 32:60] = 255
    expected[2:30, 62:90] = 64
    expected[32:60, 2:30] = 191
    expected[32:60, 32:60] = 128  # and the sixth place stays black
    picture = grid(constant(-1, 1, -0.5, 0.5, 0).to(dtype), columns=3)
    assert picture.dtype == torch.uint8
    assert np.array_equal(picture[0].numpy(), expected)


def test_a_picture_is_read_back_to_the_pixel(tmp_path: Path) -> None:
    picture = torch.arange(256, dtype=torch.uint8).repeat(4).view(1, 32, 32)
    save_png(picture, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert (image.format, image.mode) == ("PNG", "L")
        assert np.array_equal(np.asarray(image), picture[0].numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@settings(deadline=None, max_examples=8)
@given(frames=st.integers(2, 12))
def test_a_film_goes_there_and_back_for_ever(tmp_path_factory, frames: int) -> None:
    path = tmp_path_factory.mktemp("film") / "walk.gif"
    greys = [round(255 * k / (frames - 1)) for k in range(frames)]
    save_gif(constant(*(grey / 127.5 - 1 for grey in greys)), path)
    with Image.open(path) as film:
        assert film.format == "GIF"
        assert film.size == (168, 168)
        assert film.info["loop"] == 0
        assert film.n_frames == 2 * frames - 2
        shown = [
            (frame.convert("L").getextrema(), frame.info["duration"])
            for frame in ImageSequence.Iterator(film)
        ]
    there_and_back = greys + greys[-2:0:-1]
    assert shown == [((grey, grey), 50) for grey in there_and_back]
    assert [file.name for file in path.parent.iterdir()] == ["walk.gif"]
