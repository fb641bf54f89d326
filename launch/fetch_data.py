"""Fetch a data set before a run, say where the compute nodes have no network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cs324dist.command_line import OneOf, parse
from cs324dist.data.images import SHA256, fetch
from cs324dist.errors import errors_as_exit_codes


@dataclass(frozen=True)
class FetchData:
    """Fetch a data set into torchvision's folder layout, or verify the files that are there."""

    dataset: Annotated[str, OneOf(*SHA256)] = "mnist"
    """mnist or fashion-mnist"""
    data_root: Path = Path("data")
    """Folder of the data sets; an existing one of torchvision's will do"""


if __name__ == "__main__":
    with errors_as_exit_codes():
        arguments = parse(FetchData, FetchData.__doc__ or "")
        print(fetch(arguments.dataset, arguments.data_root))
        for name, sha256 in SHA256[arguments.dataset].items():
            print(f"  {name:<23}  sha256 {sha256}  verified")
