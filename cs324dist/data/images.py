"""MNIST and Fashion-MNIST, read from IDX files of known SHA-256, and a data set of noise."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cs324dist.errors import UserError

TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}

# Of the uncompressed files, as .gz headers differ between mirrors. Those of Fashion-MNIST are from Debian's
# package: with the publisher's headers, its .gz files have the MD5s given in torchvision.
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
SIZES = {
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}


@dataclass(frozen=True)
class LabelledImages:
    """Grey images with values from 0 to 255, and their classes from 0 to 9."""

    images: UInt8[Tensor, "count 28 28"]
    labels: Int64[Tensor, " count"]

    def to(self, device: torch.device) -> "LabelledImages":
        """Copy to another device."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


def load_images(dataset: str, split: Literal["train", "test"], data_root: Path) -> LabelledImages:
    """Load one split of a data set, and fetch its files first if they are missing.

    `fake` is noise, 2 048 training and 512 test images, and needs no files. Any number of processes and nodes
    may call this at once. Raises `UserError` if a file is damaged, and where `fetch` does.
    """
    if dataset == "fake":
        return _noise(split)
    prefix = {"train": "train", "test": "t10k"}[split]
    folder = folder_of(dataset, data_root)
    files = [folder / f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    with translate_os_errors(data_root):
        if not all(file.exists() for file in files):
            from cs324dist.data.fetch import fetch

            fetch(dataset, data_root)
        images, labels = (decode_idx(read_verified(dataset, file)) for file in files)
    return LabelledImages(images, labels.long())


def check_fetched(dataset: str, data_root: Path) -> None:
    """Check that a data set can be loaded without fetching.

    Raises:
        UserError: files are missing.
    """
    folder = folder_of(dataset, data_root) if dataset in SHA256 else None
    if folder and (missing := [name for name in SHA256[dataset] if not (folder / name).exists()]):
        raise UserError(f"{folder} lacks {missing[0]}: give --data-root, or run launch/fetch_data.py first")


def to_unit_range(images: UInt8[Tensor, "batch 28 28"]) -> Float[Tensor, "batch 1 28 28"]:
    """Scale bytes to [-1, 1], the range of the generator's tanh, in torch's default dtype."""
    return images.unsqueeze(1).to(torch.get_default_dtype()) / 127.5 - 1


def folder_of(dataset: str, data_root: Path) -> Path:
    """The folder of a data set's files, in torchvision's layout. Raises `UserError` if it has no files."""
    if dataset not in SHA256:
        raise UserError(f"there are no files of data set {dataset!r}, only of {' and '.join(SHA256)}")
    return data_root / TORCHVISION_CLASS[dataset] / "raw"


def read_verified(dataset: str, path: Path) -> bytes:
    """Read one IDX file of a data set. Raises `UserError` if its size or SHA-256 is wrong."""
    data = path.read_bytes()
    try:
        verify(data, SIZES[path.name], SHA256[dataset][path.name])
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; delete it to have it fetched again") from None
    return data


def verify(data: bytes, size: int, sha256: str) -> None:
    """Raise `ValueError` if the data have another size or SHA-256."""
    if len(data) != size:
        raise ValueError(f"expected {size} bytes, found {len(data)}")
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"expected SHA-256 {sha256}, found {found}")


@contextmanager
def translate_os_errors(data_root: Path) -> Iterator[None]:
    """Raise `UserError` in place of `OSError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data root {data_root} is unusable: {error}; give a writable folder") from error


def encode_idx(array: NDArray[np.uint8]) -> bytes:
    """Write an array as an IDX file: two zeros, 8 for uint8, rank, sizes as big-endian uint32, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def decode_idx(data: bytes) -> UInt8[Tensor, "..."]:
    """Read the array of a uint8 IDX file. Raises `ValueError` if the sizes do not match the data."""
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())


def _noise(split: Literal["train", "test"]) -> LabelledImages:
    count, seed = {"train": (2048, 0), "test": (512, 1)}[split]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.randint(10, (count,), generator=generator))
