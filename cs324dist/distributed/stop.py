"""Signals that ask a run to stop, and how all ranks agree on the step to stop after."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cs324dist.distributed.failures import PeerWatch, ProcessLost
from cs324dist.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last: of Slurm, with --signal
SIGNALS_TO_END = 3  # then the process ends at once
TOGETHER = 1.0  # seconds in which signals count as one: a launcher passes on what Slurm has sent to all
Part = TypeVar("Part")


class Stopped(SystemExit):
    """A signal has stopped the run, which is saved: run the same command again to go on."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 set a flag; `agreed` says, the same on every rank, when to stop.

    The ranks vote on the CPU, over gloo, while the next step runs: a request takes effect one step later and
    the device is never waited for.
    """

    def __init__(
        self, world_size: int, peer_timeout: int = 600, lost: Callable[[ProcessLost], None] = lambda _: None
    ) -> None:
        """A vote that takes longer than `peer_timeout` seconds fails; for `lost` see `PeerWatch`."""
        self._world_size, self._hung_after, self._lost = world_size, peer_timeout, lost
        self._watch: PeerWatch | None = None
        self.received_before_the_last_vote = False
        self._signals, self._last_signal = 0, -TOGETHER
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._ballot: tuple[bool, torch.Tensor, dist.Work] | None = None

    def listen(self) -> None:
        """From now on, until the context ends, signals set the flag; every rank calls it.

        Before that, there is nothing to lose, and a signal ends the process at once.
        """
        self._previous = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        arrivals, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._count, args=(arrivals,), daemon=True).start()
        if self._world_size > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._hung_after))
            self._group = cast(dist.ProcessGroup, group)
            self._watch = PeerWatch(self._hung_after, self._lost)
        self.received_before_the_last_vote = self.received

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous:
            os.close(signal.set_wakeup_fd(-1))
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        together = kind is None or issubclass(kind, SystemExit)
        if self._watch is not None:
            self._watch.leave(together=together)
        if self._group is not None and together:
            with suppress(RuntimeError):  # of a process that has ended
                if self._ballot is not None:
                    self._ballot[2].wait()
                dist.destroy_process_group(self._group)
            self._group = self._ballot = None

    def _count(self, arrivals: int) -> None:
        """Count signals in a thread: a handler would wait until torch returns to Python."""
        while number := os.read(arrivals, 1):
            if number[0] in self._previous:  # others, such as SIGCHLD, arrive here too
                self._note(number[0])
        os.close(arrivals)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        self._signals += now - self._last_signal >= TOGETHER
        self._last_signal = now
        if self._signals >= SIGNALS_TO_END:
            os._exit(128 + number)

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signals > 0

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop; call it once a step on every rank."""
        asked = self.received
        if self._group is None:
            self.received_before_the_last_vote = asked
            return asked
        agreed = False
        if self._ballot is not None:
            asked_then, vote, pending = self._ballot
            pending.wait()
            agreed = bool(vote.item())
            self.received_before_the_last_vote = asked_then
        vote = torch.tensor([asked], dtype=torch.int32)
        self._ballot = asked, vote, dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def until_stopped(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts of a long piece of work, until a signal arrives; the first is always given.

        If any rank was interrupted, all ranks must discard the result: see `interrupted`.
        """
        for number, part in enumerate(parts):
            if number and self.received:
                self._interrupted = True
                return
            yield part

    def interrupted(self) -> bool:
        """Whether `until_stopped` left out parts on any rank since the last call; every rank calls it."""
        interrupted, self._interrupted = self._interrupted, False
        return self.on_any_rank(interrupted)

    def on_any_rank(self, said: bool) -> bool:
        """Whether any rank says so; every rank calls it."""
        vote = torch.tensor([said], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
        return bool(vote.item())
