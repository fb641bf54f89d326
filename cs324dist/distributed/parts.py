"""The parts of the global batch that a process computes, one at a time.

Part `i` of `count` belongs to process `i mod N`. A layer that spans the batch, such as BatchNorm, is a
barrier: it needs a row of numbers from every part. Each part of a process then has a thread, of which only
one runs. It runs to its next barrier, then the next part's thread runs. So no two parts run at once, and
nothing interrupts what a loss does between two barriers.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from cs324dist.errors import RunFailed, UserError

if TYPE_CHECKING:
    from cs324dist.distributed.belongings import PartBelongings

Answer = TypeVar("Answer")
FORWARD, BACKWARD, END = "forward", "backward", "end"
HEADER = 4  # numbers before a row: the layer, the pass, the number of barriers so far, and their hash
_here = threading.local()


def rank_and_processes() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_rows(
    rows: Mapping[int, Shaped[Tensor, "*row"]], count: int, shift: int = 0
) -> Shaped[Tensor, "count *row"]:
    """`count` rows in order, of which each process has some; every process gets all.

    Process `r` has the rows of the parts of process `r + shift`.
    """
    like = next(iter(rows.values()))
    _, processes = rank_and_processes()
    own = like.new_zeros(-(-count // processes), *like.shape)
    for index, row in rows.items():
        own[index // processes] = row
    if processes == 1:
        return own
    gathered = like.new_empty(processes, *own.shape)
    dist.all_gather(list(gathered.unbind(0)), own)
    return gathered.roll(shift, 0).transpose(0, 1).reshape(-1, *like.shape)[:count]


def add_in_order(rows: Shaped[Tensor, "count *row"]) -> Shaped[Tensor, "*row"]:
    """The sum of rows, one after the other: sums of floating-point numbers depend on the order."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


@dataclass(frozen=True)
class Place:
    """Which part this thread computes."""

    index: int
    is_first: bool
    """Whether it is the first of its process."""

    barrier: "_Barrier"

    def gather(self, layer: int, passed: str, row: Shaped[Tensor, "*row"]) -> Shaped[Tensor, "count *row"]:
        """The rows of all parts in order; all of them take part.

        Raises:
            UserError: they came to different layers.
        """
        return self.barrier.gather(self.index, layer, passed, row)


def current_place() -> Place | None:
    """The part that this thread computes; None outside of a loss."""
    return getattr(_here, "place", None)


class Parts:
    """Which process computes which part, and what the parts of a process have in common."""

    def __init__(self, count: int, device: torch.device, patience: float | int = 600) -> None:
        """Of `count` parts; one that keeps others waiting for more than `patience` seconds is an error."""
        self.count, self.device, self.patience = count, device, patience
        self.rank, self.processes = rank_and_processes()
        self.layers: list[str] = []
        """Names of the layers that span the batch."""
        self.widest = 0
        """Numbers in the longest row that such a layer gathers."""

    def of(self, shift: int = 0) -> range:
        """The parts of the process `shift` after this one."""
        return range((self.rank + shift) % self.processes, self.count, self.processes)

    def each(
        self,
        work: Callable[[int], Answer],
        indices: Sequence[int],
        belongings: "PartBelongings | None" = None,
        *,
        shift: int = 0,
    ) -> Iterator[Answer]:
        """What `work` answers for each of these parts, in their order.

        Without a layer that spans the batch, a part begins when the answer before it has been used.

        Args:
            work: computes a part.
            indices: all parts of the process `shift` after this one; where no layer spans the batch, any.
            belongings: of a part; the end leaves what the beginning found. None: there is only one part.
            shift: see `indices`.

        Raises:
            UserError: parts came to different layers that span the batch.
            RunFailed: a part waits for too long.
        """
        barrier = _Barrier(self, work, list(indices), shift, belongings)
        restored = belongings.restored if belongings else nullcontext
        if not self.layers:
            for index in indices:
                with restored(index):
                    answer = barrier.compute(index)
                yield answer
            return
        with restored(indices[0] if len(indices) == 1 else None) as kept:
            answers = barrier.compute_all(kept)
        for index in indices:
            yield answers.pop(index)


class _Barrier:
    """Where the parts of one pass wait for each other, and each gets a row of numbers from all."""

    def __init__(
        self,
        parts: Parts,
        work: Callable[[int], Any],
        indices: list[int],
        shift: int,
        belongings: "PartBelongings | None",
    ) -> None:
        self._parts, self._work, self._indices, self._shift = parts, work, indices, shift
        self._belongings = belongings
        self._headers = dict.fromkeys(indices, (0, 0, 0, 0))
        self._rows: dict[int, Tensor] = {}
        self._gathered = torch.empty(0)
        self._turns = {index: threading.Semaphore(0) for index in indices}
        self._kept: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._last_switch = time.monotonic()

    def compute(self, index: int) -> Any:
        """Compute a part to its end."""
        _here.place = Place(index, index == self._indices[0], self)
        try:
            return self._work(index)
        finally:
            _here.place = None

    def compute_all(self, kept: Any) -> dict[int, Any]:
        """Compute all parts in turn, from barrier to barrier; each begins with the belongings `kept`."""
        if len(self._indices) == 1:
            self._compute_to_the_end(self._indices[0])
            return self._answers
        self._kept = dict.fromkeys(self._indices, kept)
        enter = _thread_state(self._parts.device)
        threads = []
        for index in self._indices:
            run = contextvars.copy_context().run
            threads.append(threading.Thread(target=run, args=(self._in_thread, index, enter), daemon=True))
            threads[-1].start()
        self._turns[self._indices[0]].release()
        for thread in threads:
            while thread.is_alive() and self._error is None:  # one that hangs does not end after an error
                thread.join(timeout=1)
        if self._error is not None:
            raise self._error
        return self._answers

    def _compute_to_the_end(self, index: int) -> None:
        self._answers[index] = self.compute(index)
        # A part that has ended may not be waited for elsewhere.
        self.gather(index, 0, END, torch.zeros(0, device=self._parts.device))

    def _in_thread(self, index: int, enter: Callable[[], AbstractContextManager[None]]) -> None:
        try:
            with enter():
                self._wait_for_turn(index)
                self._compute_to_the_end(index)
            self._hand_on(index)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
            for turn in self._turns.values():
                turn.release()

    def gather(self, index: int, layer: int, passed: str, row: Tensor) -> Tensor:
        """See `Place`."""
        number = (FORWARD, BACKWARD, END).index(passed)
        *_, barriers, known = self._headers[index]
        self._headers[index] = layer, number, barriers + 1, (31 * known + 3 * layer + number) % (1 << 40)
        self._rows[index] = row
        if index == self._indices[-1]:
            self._exchange(passed)
        if len(self._indices) > 1:
            assert self._belongings is not None
            self._kept[index] = self._belongings.put_away(index)
            self._hand_on(index)
            self._wait_for_turn(index)
        rows = self._gathered[:, HEADER : HEADER + row.numel()]
        return rows.view(self._parts.count, *row.shape).to(row.dtype)

    def _exchange(self, passed: str) -> None:
        """Put the rows of all parts together: one buffer of one size, wherever the parts are."""
        sent = {}
        for index, row in self._rows.items():
            like: dict[str, Any] = {
                "dtype": torch.float64,
                "device": row.device,
            }  # a copy to the device would wait for it
            numbers = [torch.full((1,), number, **like) for number in self._headers[index]]
            rest = torch.zeros(self._parts.widest - row.numel(), **like)
            sent[index] = torch.cat([*numbers, row.flatten().double(), rest])
        self._rows = {}
        self._gathered = gather_rows(sent, self._parts.count, self._shift)
        # To read them waits for a GPU: there it is done once, as the hash tells what happened before.
        if self._parts.device.type == "cpu" or passed == END:
            headers = self._gathered[:, :HEADER].long().tolist()
            for other, header in enumerate(headers):
                if header != headers[0]:
                    raise UserError(
                        f"part 0 of the batch came {self._at(headers[0])}, part {other} {self._at(header)}: "
                        f"every part has to pass the same BatchNorm layers in training mode, in the same "
                        f"order; move a branch that depends on the data behind them"
                    )

    def _at(self, header: Sequence[int]) -> str:
        layer, number, barriers, _ = header
        passed = (FORWARD, BACKWARD, END)[number]
        at = "its end" if passed == END else f"{self._parts.layers[layer]} in the {passed} pass"
        return f"to {at} (barrier {barriers})"

    def _hand_on(self, index: int) -> None:
        place = self._indices.index(index) + 1
        self._last_switch = time.monotonic()
        self._turns[self._indices[place % len(self._indices)]].release()

    def _wait_for_turn(self, index: int) -> None:
        patience = self._parts.patience
        while not self._turns[index].acquire(timeout=patience):
            if time.monotonic() - self._last_switch > patience:
                raise RunFailed(
                    f"a part of the batch has not come to its next BatchNorm layer within {patience:g} s "
                    f"(--peer-timeout): find out what it waits for"
                )
        if self._error is not None:
            raise _Abandoned
        assert self._belongings is not None
        self._belongings.take_out(self._kept[index], none_changed=True)


class _Abandoned(Exception):
    """Another part has failed."""


def _thread_state(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """What enters, in another thread, the state of torch that each thread has for itself."""
    threads, grad, default_device = (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_device(),
    )
    current = torch.cuda.current_device() if device.type == "cuda" else None  # `device` may have no index
    kinds = dict.fromkeys(("cpu", device.type))
    autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
    is_cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def enter() -> Iterator[None]:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        torch.set_autocast_cache_enabled(is_cached)
        if current is not None:
            torch.cuda.set_device(current)
        with ExitStack() as stack, torch.set_grad_enabled(grad):
            for kind, dtype, enabled in autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            if default_device.type != "cpu":
                stack.enter_context(default_device)
            yield

    return enter
