"""MNIST, and a data set of noise."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from cs324dist.tasks.gan.fetch import fetch


@dataclass(frozen=True)
class LabelledImages:
    """Grey images with values from 0 to 255, and their classes from 0 to 9."""

    images: UInt8[Tensor, "count 28 28"]
    labels: Int64[Tensor, " count"]

    def to(self, device: torch.device) -> "LabelledImages":
        """Copy to another device."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


def load_images(
    dataset: Literal["mnist", "fake"], split: Literal["train", "test"], data_root: Path
) -> LabelledImages:
    """Load one split of a data set, and fetch its files first if they are missing.

    `fake` is noise, 2 048 training and 512 test images, and needs no files. Any number of processes and nodes
    may call this at once. Raises `UserError` where `fetch` does.
    """
    if dataset == "fake":
        count, seed = {"train": (2048, 0), "test": (512, 1)}[split]
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        return LabelledImages(images, torch.randint(10, (count,), generator=generator))
    from torchvision.datasets.mnist import read_image_file, read_label_file  # takes a second to import

    files = fetch(data_root) / {"train": "train", "test": "t10k"}[split]
    return LabelledImages(
        read_image_file(f"{files}-images-idx3-ubyte"), read_label_file(f"{files}-labels-idx1-ubyte")
    )


def to_unit_range(images: UInt8[Tensor, "batch 28 28"]) -> Float[Tensor, "batch 1 28 28"]:
    """Scale bytes to [-1, 1], the range of the generator's tanh, in torch's default dtype."""
    return images.unsqueeze(1).to(torch.get_default_dtype()) / 127.5 - 1
