"""Errors of torch and the system in the user's words, and processes that have ended or are silent."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cs324dist.errors import RANK, RunFailed
from cs324dist.runs.files import replaced

HEARTBEAT = 1.0  # seconds
TO_SAY_IT_ITSELF = 5.0  # seconds in which the main thread may report the same error


class OneProcessFailed(RunFailed):
    """An error of this process alone: the first rank cannot report it."""

    same_on_all_ranks = False


class ProcessLost(OneProcessFailed):
    """Another process of the run does not answer."""


AGAIN = "then run the same command again"
FIND_OUT = f"find out what holds it up, {AGAIN}"
KNOWN: tuple[tuple[type[RunFailed], str, str], ...] = (  # what torch and its libraries say, and how we do
    (OneProcessFailed, "can't allocate memory|out of memory|bad allocation|_STATUS_ALLOC_FAILED",
     "out of memory: lower the batch size (--batch-size)"),
    (OneProcessFailed, r"DataLoader worker \(pid",
     f"a worker that loads data was killed, perhaps as memory ran out: use fewer workers, {AGAIN}"),
    (RunFailed, "Expected to have finished reduction",
     "on several processes, a loss has to use every parameter of its networks that is not frozen: freeze the "
     "others with requires_grad_(False), or give --micro-batches"),
    (RunFailed, "does not have a deterministic implementation",
     "{said} on this device, and with micro-batches all operations need one: use another operation"),
    (ProcessLost, "timed out|timeout",
     f"another process did not answer within {{timeout}} s (--peer-timeout): {FIND_OUT}"),
    (ProcessLost, "connection (closed by peer|reset|refused)|broken pipe|remote process exited|"
     "NCCL communicator was aborted", "another process of the run has ended: see what it said"),
)  # fmt: skip


@contextmanager
def translate_errors(peer_timeout: int) -> Iterator[None]:
    """Turn errors of torch and the system into `RunFailed`: memory, disks, other processes.

    Raises:
        RunFailed: saying what happened and which option helps.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        said = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            said = "out of memory"
        if isinstance(error, ConnectionResetError):  # of a pipe to a worker: torch has other types of its own
            said = "DataLoader worker (pid"
        elif isinstance(error, OSError) and error.strerror:
            raise OneProcessFailed(f"{error.filename or 'a file'}: {error.strerror}") from error
        for kind, pattern, text in KNOWN:
            is_possible = kind is not ProcessLost or dist.is_initialized()
            if is_possible and re.search(pattern, said, re.IGNORECASE):
                raise kind(text.format(said=said.partition(",")[0], timeout=peer_timeout)) from error
        raise


def keep_collectives(folder: Path) -> None:
    """Write down the last collectives of this process: which one it waits in, which others have begun.

    torch's flight recorder has them, of gloo and of NCCL.
    """
    if record := getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None):
        with suppress(Exception), replaced(folder / f"collectives-rank-{RANK}.json") as file:
            file.write_bytes(record())


class PeerWatch:
    """Ends this process when another has ended or is silent, even while the main thread waits in C.

    Otherwise NCCL's watchdog would abort it without a word. So a thread of each process sends a heartbeat to
    the others every second, over gloo: how many collectives its process has begun. Where the numbers differ,
    some processes wait for others. What all processes do at the same time may take as long as it likes.
    """

    def __init__(self, peer_timeout: int, lost: Callable[[ProcessLost], None]) -> None:
        """Every process calls it; `lost` is called in the thread, and ends the process."""
        self._peer_timeout, self._lost = peer_timeout, lost
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=peer_timeout))
        self._leaving, self._together = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def leave(self, *, together: bool) -> None:
        """Watch no more; `together`: all processes stop watching, after one more heartbeat."""
        self._together = together
        self._leaving.set()
        self._thread.join(None if together else 2 * HEARTBEAT)
        if together:
            with suppress(RuntimeError):  # of a process that has ended
                dist.destroy_process_group(self._group)

    def _watch(self) -> None:
        try:
            with translate_errors(self._peer_timeout):
                self._compare_progress()
        except ProcessLost as lost:
            if not self._leaving.wait(TO_SAY_IT_ITSELF):
                self._lost(lost)

    def _compare_progress(self) -> None:
        """Exchange heartbeats until all leave, or some have waited for the others for too long."""
        world: Any = dist.group.WORLD
        before, unchanged = [0], 0  # heartbeats, which all processes count alike
        while not (leaving := self._leaving.wait(HEARTBEAT)) or self._together:
            own = torch.tensor([world._get_sequence_number_for_group(), leaving])
            rows = [torch.empty_like(own) for _ in range(self._group.size())]
            dist.all_gather(rows, own, group=self._group)
            if any(row[1] for row in rows):
                return
            counts = [int(row[0]) for row in rows]
            unchanged, before = unchanged + 1 if counts == before else 0, counts
            if min(counts) < max(counts) and unchanged * HEARTBEAT > self._peer_timeout:
                raise ProcessLost(
                    f"rank {counts.index(min(counts))} kept others waiting for {self._peer_timeout} s "
                    f"(--peer-timeout): {FIND_OUT}"
                )
