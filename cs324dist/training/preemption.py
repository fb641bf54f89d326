"""Signals that ask a run to stop, and how all ranks agree on the step to stop after."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

PATIENCE = 3  # signals; a user who asks this often wants out at once
TOGETHER = 1.0  # seconds in which signals count as one: a launcher passes on what Slurm has sent to all
Part = TypeVar("Part")


class StopRequest:
    """SIGTERM and SIGINT set a flag; `agreed` says, the same on every rank, when to stop.

    The ranks vote on the CPU, over gloo, while the next step runs: a request takes effect one step later and
    the device is never waited for.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._signals, self._last_signal = 0, -TOGETHER
        self._cut_short = False
        self._previous: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._vote: torch.Tensor | None = None
        self._pending: dist.Work | None = None

    def listen(self) -> None:
        """From now on, until the context ends, signals set the flag; every rank calls it.

        Before, while there is nothing to lose yet, they end the process at once, whatever it waits for.
        """
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        if self._world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:
            self._pending.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._signals += now - self._last_signal >= TOGETHER
        self._last_signal = now
        if self._signals >= PATIENCE:
            os._exit(128 + number)

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signals > 0

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop; call it once a step on every rank."""
        if self._group is None:
            return self.received
        agreed = False
        if self._pending is not None and self._vote is not None:
            self._pending.wait()
            agreed = bool(self._vote.item())
        self._vote = torch.tensor([self.received], dtype=torch.int32)
        self._pending = dist.all_reduce(self._vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def watching(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts of a long piece of work, of which only the first is given once a signal has come.

        What was cut short on any rank must be thrown away on all: see `cut_short`.
        """
        for number, part in enumerate(parts):
            if number and self.received:
                self._cut_short = True
                return
            yield part

    def cut_short(self) -> bool:
        """Whether `watching` has left out parts on any rank since the last call; every rank calls it."""
        vote = torch.tensor([self._cut_short], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
        self._cut_short = False
        return bool(vote.item())
