"""Draws photos of four shapes, in a folder for each, to try examples/photos.py on.

python examples/shapes.py FOLDER [COUNT]
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 40  # pixels
SHAPES = ("circle", "cross", "square", "triangle")


def draw(shape: str, rng: random.Random) -> Image.Image:
    """A shape somewhere, in some size and colour, before a noisy background."""
    image = Image.frombytes("RGB", (SIZE, SIZE), rng.randbytes(3 * SIZE * SIZE)).point(
        lambda value: value // 3
    )
    colour = tuple(rng.randrange(100, 256) for _ in range(3))
    radius = rng.uniform(7, 13)
    x, y = (rng.uniform(radius, SIZE - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    pencil = ImageDraw.Draw(image)
    if shape == "circle":
        pencil.ellipse(box, colour)
    elif shape == "square":
        pencil.rectangle(box, colour)
    elif shape == "triangle":
        pencil.regular_polygon((x, y, radius), 3, rng.uniform(-20, 20), colour)
    else:
        pencil.line(box, colour, 4)
        pencil.line((box[0], box[3], box[2], box[1]), colour, 4)
    return image


def main(folder: Path, count: int) -> None:
    """Draw `count` photos."""
    rng = random.Random(0)
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        (folder / shape).mkdir(parents=True, exist_ok=True)
        draw(shape, rng).save(folder / shape / f"{number:05d}.png")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [folder] if not folder.startswith("-"):
            main(Path(folder), 1200)
        case [folder, count] if count.isdecimal():
            main(Path(folder), int(count))
        case _:
            sys.exit("error: give a folder, and a number of photos if not 1200: shapes.py FOLDER [COUNT]")
