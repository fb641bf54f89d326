"""Fetch MNIST before a run, for example if the compute nodes have no network."""

from dataclasses import dataclass
from pathlib import Path

from cs324dist.command_line import parse
from cs324dist.errors import errors_as_exit_codes
from cs324dist.tasks.gan.images import SHA256, fetch


@dataclass(frozen=True)
class FetchData:
    """Fetch the missing files of MNIST, in torchvision's folder layout, and verify all of them."""

    data_root: Path = Path("data")
    """Folder of the data sets; one made by torchvision works too."""


if __name__ == "__main__":
    with errors_as_exit_codes():
        print(fetch(parse(FetchData, FetchData.__doc__ or "").data_root))
        for name, sha256 in SHA256.items():
            print(f"  {name:<23}  sha256 {sha256}  verified")
