"""Signals that ask a run to stop, and how all ranks agree on the step to stop after."""

import os
import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

PATIENCE = 3  # signals; a user who presses Ctrl-C this often wants out at once


class StopRequest:
    """SIGTERM and SIGINT set a flag; `agreed` says, the same on every rank, when to stop.

    The ranks vote on the CPU, over gloo, while the next step runs: a request takes effect one step later and
    the device is never waited for.
    """

    def __init__(self, world_size: int) -> None:
        self.signals = 0
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._vote: torch.Tensor | None = None
        self._pending: dist.Work | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:
            self._pending.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.signals >= PATIENCE and number == signal.SIGINT:
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop; call it once a step on every rank."""
        if self._group is None:
            return self.signals > 0
        agreed = False
        if self._pending is not None and self._vote is not None:
            self._pending.wait()
            agreed = bool(self._vote.item())
        self._vote = torch.tensor([self.signals > 0], dtype=torch.int32)
        self._pending = dist.all_reduce(self._vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed
