"""Fetch a data set before a run, say where the compute nodes have no network."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from cs324dist.data.images import SHA256, fetch
from cs324dist.errors import refusals_as_exit_code


@dataclass(frozen=True)
class FetchData:
    """Fetch a data set into torchvision's folder layout, or verify the files that are there."""

    dataset: str = "mnist"
    """mnist or fashion-mnist"""
    data_root: Path = Path("data")
    """Folder of the data sets; an existing one of torchvision's will do"""


def main() -> None:
    """Print the folder, and each file with its verified SHA-256."""
    with refusals_as_exit_code():
        arguments = tyro.cli(FetchData)
        print(fetch(arguments.dataset, arguments.data_root))
        for name, sha256 in SHA256[arguments.dataset].items():
            print(f"  {name:<23}  sha256 {sha256}  verified")


if __name__ == "__main__":
    main()
