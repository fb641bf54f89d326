"""Errors of torch and the system in the user's words."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cs324dist.errors import RunFailed

NO_MEMORY = ("can't allocate memory", "out of memory", "bad allocation")
LOADER_GONE = ("dataloader worker (pid",)
UNUSED = ("expected to have finished reduction",)
NOT_DETERMINISTIC = ("does not have a deterministic implementation",)
PEER_SILENT = ("timed out", "timeout")
PEER_GONE = ("connection closed by peer", "connection reset", "broken pipe", "connection refused")


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
