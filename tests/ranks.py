"""The processes of a run as threads of a test: what each of them finds over its share."""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from cs324dist.distributed import sum_over
from cs324dist.distributed.sum_over import SumOver

Found = TypeVar("Found")


class Rank(Accelerator):
    """One of `count` processes, as far as `SumOver` asks."""

    process_index = num_processes = device = None

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes, self.device = index, count, torch.device("cpu")


def on_ranks(
    count: int,
    work: Callable[[SumOver], Found],
    until_stopped: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> list[Found]:
    """What `work` returns on each rank; they gather their rows from each other."""
    barrier, rows_of = threading.Barrier(count, timeout=60), {}

    def gather_rows(rows: Mapping[int, Tensor], rows_in_all: int) -> Tensor:
        assert rows_in_all == count
        rows_of.update(rows)
        barrier.wait()
        gathered = torch.stack([rows_of[rank] for rank in range(count)])
        barrier.wait()
        return gathered

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(sum_over, "gather_rows", gather_rows)
        ranks = [SumOver(Rank(rank, count), until_stopped) for rank in range(count)]
        return list(pool.map(work, ranks))
