"""Errors of torch and the system in the user's words, and processes that have ended or are silent."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cs324dist.errors import RunFailed

NO_MEMORY = (
    *("can't allocate memory", "out of memory", "bad allocation"),
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
)
LOADER_GONE = ("dataloader worker (pid",)
UNUSED = ("expected to have finished reduction",)
NOT_DETERMINISTIC = ("does not have a deterministic implementation",)
PEER_SILENT = ("timed out", "timeout")
PEER_GONE = ("connection closed by peer", "connection reset", "broken pipe", "connection refused",
             "remote process exited", "nccl communicator was aborted")  # fmt: skip
BETWEEN_MEETINGS = 1.0  # seconds
TO_SAY_IT_ITSELF = 5.0  # seconds that the main thread has, which may have found the same


class OneProcessFailed(RunFailed):
    """An error of this process alone: the first rank cannot report it."""

    same_on_all_ranks = False


class ProcessLost(OneProcessFailed):
    """Another process of the run does not answer."""


@contextmanager
def translate_errors(peer_timeout: int) -> Iterator[None]:
    """Turn errors of torch and the system into `RunFailed`: memory, disks, other processes.

    Raises:
        RunFailed: saying what happened and which option helps.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        text = str(error).lower()
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(text, NO_MEMORY):
            raise OneProcessFailed("out of memory: lower the batch size (--batch-size)") from error
        if isinstance(error, OSError) and error.strerror:
            raise OneProcessFailed(f"{error.filename or 'a file'}: {error.strerror}") from error
        if _says(text, LOADER_GONE):
            raise OneProcessFailed(
                "a worker that loads data was killed, perhaps as memory ran out: "
                "use fewer workers, then run the same command again"
            ) from error
        if _says(text, UNUSED):
            raise RunFailed(
                "on several processes, a loss has to use every parameter of its networks that is not frozen: "
                "freeze the others with requires_grad_(False), or give --micro-batches"
            ) from error
        if _says(text, NOT_DETERMINISTIC):
            raise RunFailed(
                f"{str(error).partition(',')[0]} on this device, and with micro-batches all operations need "
                f"one: use another operation"
            ) from error
        if dist.is_initialized() and _says(text, PEER_SILENT):
            raise ProcessLost(
                f"another process did not answer within {peer_timeout} s (--peer-timeout): "
                f"find out what holds it up, then run the same command again"
            ) from error
        if dist.is_initialized() and _says(text, PEER_GONE):
            raise ProcessLost("another process of the run has ended: see what it said") from error
        raise


def _says(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


class PeerWatch:
    """Ends this process when another has ended or is silent, even while the main thread waits in C.

    A process would wait on for NCCL, whose watchdog then aborts it without a word. So a thread of each
    process meets those of the others every second, over gloo, and says how many collectives its process has
    begun. A process that has ended or was stopped does not come. Where the numbers differ, some wait for the
    others. Work that all do at the same time may take as long as it likes.
    """

    def __init__(self, peer_timeout: int, lost: Callable[[ProcessLost], None]) -> None:
        """Every process calls it; `lost` is called in the thread, and ends the process."""
        self._peer_timeout, self._lost = peer_timeout, lost
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=peer_timeout))
        self._leaving, self._together = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def leave(self, *, together: bool) -> None:
        """Watch no more; `together`: all processes do, and meet once more."""
        self._together = together
        self._leaving.set()
        self._thread.join(None if together else 2 * BETWEEN_MEETINGS)
        if together:
            with suppress(RuntimeError):  # of a process that has ended
                dist.destroy_process_group(self._group)

    def _watch(self) -> None:
        try:
            with translate_errors(self._peer_timeout):
                self._meet()
        except ProcessLost as lost:
            if not self._leaving.wait(TO_SAY_IT_ITSELF):
                self._lost(lost)

    def _meet(self) -> None:
        """Meet until all leave.

        Raises:
            ProcessLost: some processes have waited for the others for too long.
        """
        world: Any = dist.group.WORLD
        before: list[int] = []
        unchanged = 0  # meetings, which all count alike
        while not (leaving := self._leaving.wait(BETWEEN_MEETINGS)) or self._together:
            own = torch.tensor([world._get_sequence_number_for_group(), leaving])
            rows = [torch.empty_like(own) for _ in range(self._group.size())]
            dist.all_gather(rows, own, group=self._group)
            counts = [int(row[0]) for row in rows]
            if any(row[1] for row in rows):
                return
            unchanged = unchanged + 1 if counts == before else 0
            before = counts
            if min(counts) < max(counts) and unchanged * BETWEEN_MEETINGS > self._peer_timeout:
                raise ProcessLost(
                    f"rank {counts.index(min(counts))} kept others waiting for {self._peer_timeout} s "
                    f"(--peer-timeout): find out what holds it up, then run the same command again"
                )
