"""Fixtures of more than one test module."""

import os
from pathlib import Path

import pytest

from cs324dist.data.images import fetch


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """A data root that holds MNIST: the environment's CS324DIST_TEST_DATA, or the repository's data/."""
    root = Path(os.environ.get("CS324DIST_TEST_DATA") or Path(__file__).parents[1] / "data")
    fetch("mnist", root)
    return root
