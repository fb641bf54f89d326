from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def set_default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """torch.set_default_dtype, undone after the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)
