"""How the project says no: one line for each thing the user must know, once for all ranks."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: run the same command again to continue

RANK = os.environ.get("RANK", "0")
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
SECONDS_FOR_THE_FIRST_RANK = 10


class UserError(Exception):
    """Input that cannot be used. Each line says what was given, what is allowed and what to do."""

    exit_code = EXIT_REFUSED
    alike_on_all_ranks = True  # as far as is known, and so said by the first

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class RunFailed(UserError):
    """Work that cannot go on, through no fault of the input's form. Each line says why and what to do."""

    exit_code = EXIT_FAILED


def printable(value: object) -> str:
    """A value from a file that anybody may have written, as part of a line."""
    return "".join(character for character in str(value)[:200] if character.isprintable())


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Turn `UserError`, `RunFailed` and Ctrl-C into lines on stderr and an exit code, without a traceback."""
    try:
        yield
        sys.stdout.flush()
    except UserError as refusal:
        if refusal.alike_on_all_ranks:
            _let_the_first_rank_speak()
            place = "" if RANK == "0" else f" on rank {RANK}"
        else:
            place = f" on rank {RANK}" if WORLD_SIZE > 1 else ""
        sys.stderr.writelines(f"error{place}: {line}\n" for line in refusal.lines)
        exit_process(refusal.exit_code)
    except KeyboardInterrupt:
        if RANK == "0":
            print("stopped by a signal", file=sys.stderr)
        exit_process(EXIT_STOPPED)
    except BrokenPipeError:  # who read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_process(EXIT_FAILED)


def exit_process(exit_code: int) -> NoReturn:
    """End the process.

    Gloo's threads live on while anything refers to the process group, and one that lets go of a tensor while
    the interpreter shuts down aborts the process (pytorch #179291): one of several leaves without a shutdown.
    """
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _let_the_first_rank_speak() -> None:
    """The launcher ends all ranks as soon as one has left: the first must not be ended in mid-word.

    Who is still there after a while met something that the first did not.
    """
    if RANK != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
