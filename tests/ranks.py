"""The processes of a run as threads of a test, with real numbers and without a launcher."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from cs324dist.distributed import micro_batches
from cs324dist.distributed.sum_over import SumOver

Found = TypeVar("Found")
_here = threading.local()


class Rank(Accelerator):
    """One of `count` processes, as far as the package asks."""

    process_index = num_processes = device = None

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes, self.device = index, count, torch.device("cpu")


class World:
    """In place of torch.distributed: a thread for each process."""

    def __init__(self, count: int) -> None:
        self._count, self._barrier = count, threading.Barrier(count, timeout=60)
        self._given: dict[int, Tensor] = {}
        self._sum = torch.empty(0)

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return _here.rank

    def get_world_size(self) -> int:
        return self._count

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        """Those of the last ranks first, as sums may not depend on it."""
        combine = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MAX: torch.maximum}[op]
        self._given[_here.rank] = tensor.detach()
        if self._barrier.wait() == 0:
            self._sum = self._given[self._count - 1].clone()
            for rank in reversed(range(self._count - 1)):
                combine(self._sum, self._given[rank], out=self._sum)
        self._barrier.wait()
        tensor.detach().copy_(self._sum)
        return Done() if async_op else None

    def abort(self) -> None:
        """Fail the ranks that would wait for one that has failed."""
        self._barrier.abort()


class Done:
    def wait(self) -> None: ...


class Pool(ThreadPoolExecutor):
    """Threads of the rank that makes it."""

    def __init__(self, count: int, name: str, prepare: Any, arguments: Any) -> None:
        rank = _here.rank

        def prepared(*given: Any) -> None:
            _here.rank = rank
            prepare(*given)

        super().__init__(count, name, prepared, arguments)


def as_ranks(count: int, work: Callable[[Rank], Found]) -> list[Found]:
    """What `work` returns on each of `count` ranks."""

    def on_rank(index: int) -> Found:
        _here.rank = index
        try:
            return work(Rank(index, count))
        except BaseException:
            world.abort()
            raise

    world = World(count)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        for name in ("is_initialized", "get_rank", "get_world_size", "all_reduce"):
            patch.setattr(dist, name, getattr(world, name))
        patch.setattr(micro_batches, "ThreadPoolExecutor", Pool)
        return list(pool.map(on_rank, range(count)))


def on_ranks(
    count: int,
    work: Callable[[SumOver], Found],
    until_stopped: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> list[Found]:
    """What `work` returns on each rank, of which each has a `SumOver`."""
    return as_ranks(count, lambda rank: work(SumOver(rank, until_stopped)))
