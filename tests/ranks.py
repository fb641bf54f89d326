"""The processes of a run as threads of a test, with real numbers and without a launcher."""

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from cs324dist.data.streams import CPU, generators, set_generators
from cs324dist.distributed.sum_over import SumOver

Found = TypeVar("Found")
_rank: ContextVar[int] = ContextVar("rank", default=0)  # threads that a rank starts inherit it


class Rank(Accelerator):
    """One of `count` processes, as far as the package asks."""

    process_index = num_processes = device = scaler = None
    mixed_precision, is_main_process = "no", False
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value="NO")))

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes, self.device = index, count, CPU

    def prepare_model(self, network: nn.Module, **_: Any) -> nn.Module:
        return network


class World:
    """In place of torch.distributed: a thread for each process, of which one runs at a time.

    Each has its own generators, as a process does. One that comes to another collective than the others, or
    to its end, is an error at once.
    """

    def __init__(self, count: int) -> None:
        self._count, self._barrier = count, threading.Barrier(count, timeout=60)
        self._turn = threading.Lock()
        self._given: dict[int, tuple[object, Any]] = {}
        self.errors: list[BaseException] = []

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return _rank.get()

    def get_world_size(self) -> int:
        return self._count

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        """Those of the last ranks first, as nothing may depend on it."""
        combine = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MAX: torch.maximum}[op]
        *others, total = self._all_give(tensor, op)
        for of_rank in reversed(others):
            total = combine(total, of_rank)
        tensor.detach().copy_(total)
        return SimpleNamespace(wait=lambda: None) if async_op else None

    def all_gather(self, found: Sequence[Tensor], own: Tensor) -> None:
        for place, of_rank in zip(found, self._all_give(own, "all_gather"), strict=True):
            place.copy_(of_rank)

    def all_to_all_single(self, received: Tensor, sent: Tensor) -> None:
        of_all = self._all_give(sent, "all_to_all")
        received.copy_(torch.cat([of_rank.chunk(self._count)[_rank.get()] for of_rank in of_all]))

    def all_gather_object(self, found: list[Any], own: Any) -> None:
        found[:] = self._all_give(own, "all_gather_object")

    def broadcast(self, tensor: Tensor, src: int, async_op: bool = False) -> Any:
        tensor.detach().copy_(self._all_give(tensor, f"broadcast {src}")[src])
        return SimpleNamespace(wait=lambda: None) if async_op else None

    def _all_give(self, own: Any, collective: object) -> list[Any]:
        """What each rank gives; the others run until they do."""
        rank, kept = _rank.get(), generators(CPU)
        is_tensor = isinstance(own, Tensor)
        kind = (collective, own.shape, own.dtype) if is_tensor else collective
        self._given[rank] = kind, own.detach().clone() if is_tensor else own
        self._turn.release()
        try:
            self._barrier.wait()
            kinds, given = zip(*(self._given[rank] for rank in range(self._count)), strict=True)
            self._barrier.wait()
        finally:
            self._turn.acquire()
            set_generators(CPU, kept)
        assert len(set(kinds)) == 1, f"the ranks came to {kinds}"
        return list(given)

    def run(self, index: int, work: Callable[[Rank], Found]) -> Found | None:
        """What `work` returns on a rank."""
        _rank.set(index)
        with self._turn:
            try:
                found = work(Rank(index, self._count))
                self._all_give(None, "the end")
            except BaseException as error:
                self.errors.append(error)
                self._barrier.abort()  # others would wait for it
                return None
        return found


COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single", "all_gather_object", "broadcast")


def as_ranks(count: int, work: Callable[[Rank], Found]) -> list[Found]:
    """What `work` returns on each of `count` ranks.

    Raises:
        Exception: what the first of those that failed has raised.
    """
    world, found = World(count), {}

    def run(index: int) -> None:
        found[index] = world.run(index, work)

    # No ThreadPoolExecutor: a process that is forked in its threads, as by a DataLoader, ends with code 1.
    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_initialized", "get_rank", "get_world_size", *COLLECTIVES):
            patch.setattr(dist, name, getattr(world, name))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if world.errors:
        raise world.errors[0]
    return [found[index] for index in range(count)]


def on_ranks(
    count: int,
    work: Callable[[SumOver], Found],
    stop: Any = None,
) -> list[Found]:
    """What `work` returns on each rank, of which each has a `SumOver`."""
    return as_ranks(count, lambda rank: work(SumOver(rank, stop)))
