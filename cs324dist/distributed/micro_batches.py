"""The micro-batches of a process: threads of one core each, which meet where statistics span the batch."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

Item = TypeVar("Item")
Answer = TypeVar("Answer")
_here = threading.local()


def gather_rows(rows: Mapping[int, Shaped[Tensor, "*row"]], count: int) -> Shaped[Tensor, "count *row"]:
    """`count` rows in order, of which each process has some; every process gets all.

    Each process adds its rows to zeros in place of the others, and adding zero is exact.
    """
    like = next(iter(rows.values()))
    gathered = like.new_zeros(count, *like.shape)
    for index, row in rows.items():
        gathered[index] += row
    if dist.is_initialized():
        dist.all_reduce(gathered)
    return gathered


def add_in_order(rows: Shaped[Tensor, "count *row"]) -> Shaped[Tensor, "*row"]:
    """The sum of rows, one after the other: sums of floating-point numbers depend on the order."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


class Meeting:
    """Where threads put together a row of each micro-batch; the last to come gathers for all."""

    def __init__(self, threads: int, count: int) -> None:
        """`threads` of this process meet, of `count` micro-batches in all."""
        self._barrier, self._count = threading.Barrier(threads), count
        self._rows: dict[int, Tensor] = {}
        self._gathered = torch.empty(0)

    def gather(self, index: int, row: Tensor) -> Tensor:
        """The rows of all micro-batches in order."""
        self._rows[index] = row
        if self._barrier.wait() == 0:
            rows, self._rows = self._rows, {}
            self._gathered = gather_rows(rows, self._count)
        self._barrier.wait()
        return self._gathered

    def abort(self) -> None:
        """Fail the threads that would wait for one that has failed."""
        self._barrier.abort()


@dataclass(frozen=True)
class Place:
    """Which micro-batch is being computed."""

    index: int
    is_first: bool
    """Whether it is the first of its process."""

    meeting: Meeting

    def gather(self, row: Shaped[Tensor, "*row"]) -> Shaped[Tensor, "count *row"]:
        """The rows of all micro-batches in order; all of them take part."""
        return self.meeting.gather(self.index, row)


def current_place() -> Place:
    """The micro-batch that this thread computes; where none was said, the process is one."""
    place: Place | None = getattr(_here, "place", None)
    if place is not None:
        return place
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Place(rank, True, Meeting(1, processes))


class Threads:
    """Threads in which torch uses one core each."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "micro-batch", _prepare, (device,))

    def map(
        self, work: Callable[[Item], Answer], items: Mapping[int, Item], micro_batches: int, *, meet: bool
    ) -> list[Answer]:
        """The answers for the micro-batches of this process, by index, in order.

        With `meet` they all run at the same time, and there must be a thread for each. The first error of one
        is raised when all have ended.
        """
        meeting = Meeting(len(items) if meet else 1, micro_batches)
        first = next(iter(items))

        def attempt(index: int, item: Item) -> Answer:
            _here.place = Place(index, index == first, meeting)
            try:
                return work(item)
            except BaseException:
                meeting.abort()
                raise

        futures = [self._pool.submit(attempt, index, item) for index, item in items.items()]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def map_ahead(self, work: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
        """The answers in order, while later items are being worked on."""
        waiting: deque[Future[Answer]] = deque()
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) > self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _prepare(device: torch.device) -> None:
    torch.set_num_threads(1)  # each thread has a number of its own
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
