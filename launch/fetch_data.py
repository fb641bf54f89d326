"""Fetch a data set before a run, for example if the compute nodes have no network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cs324dist.command_line import parse
from cs324dist.data.fetch import fetch
from cs324dist.data.images import SHA256
from cs324dist.errors import errors_as_exit_codes


@dataclass(frozen=True)
class FetchData:
    """Fetch the missing files of a data set, in torchvision's folder layout, and verify all of them."""

    dataset: Literal["mnist", "fashion-mnist"] = "mnist"
    """Data set to fetch."""
    data_root: Path = Path("data")
    """Folder of the data sets; one made by torchvision works too."""


if __name__ == "__main__":
    with errors_as_exit_codes():
        arguments = parse(FetchData, FetchData.__doc__ or "")
        print(fetch(arguments.dataset, arguments.data_root))
        for name, sha256 in SHA256[arguments.dataset].items():
            print(f"  {name:<23}  sha256 {sha256}  verified")
