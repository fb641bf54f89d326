"""User-facing errors: one line each, printed once across ranks, and the exit codes."""

import os
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: run the same command again to continue

RANK = os.environ.get("RANK", "0")
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LIBRARIES = (
    *(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
    *(os.path.realpath(Path(__file__).parent / folder) for folder in (".", "launch")),
)
COLOURS = {"error": 31, "warning": 33}  # red and yellow, of a terminal
FIRST_RANK_SECONDS = 10  # that other ranks leave the first to print an error


class ReportedError(Exception):
    """An error that the user sees as lines, without a traceback."""

    exit_code: int
    same_on_all_ranks = True  # then only the first rank prints it

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class UserError(ReportedError):
    """Input that cannot be used. Each line says what was given, what is allowed and what to do."""

    exit_code = EXIT_REFUSED


class RunFailed(ReportedError):
    """A run that cannot go on although its input is valid. Each line says why and what to do."""

    exit_code = EXIT_FAILED


def printable(value: object, length: int | None = 200) -> str:
    """A path, or a value from an untrusted file, as part of a line: at most `length` printable characters."""
    return "".join(character for character in str(value)[:length] if character.isprintable())


def say(text: str) -> None:
    """Print a line to stderr; paths in it may hold anything."""
    with tqdm.external_write_mode(file=sys.stderr):  # a progress bar makes room for it
        print(_coloured(printable(text, None)), file=sys.stderr, flush=True)


def _coloured(line: str) -> str:
    """A line with its first word in colour, if a person reads it at a terminal; see https://no-color.org."""
    word = line.partition(":")[0].partition(" ")[0]
    if word not in COLOURS or not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        return line
    return f"\033[1;{COLOURS[word]}m{word}\033[0m{line.removeprefix(word)}"


def warn(text: str) -> None:
    """Print a warning to stderr."""
    say(f"warning: {text}")


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Turn errors and Ctrl-C into lines on stderr and an exit code; mistakes in code have a traceback too."""
    stderr = sys.stderr
    sys.stderr = _StderrThatMayFail(stderr)
    try:
        yield
        sys.stdout.flush()
    except ReportedError as error:
        end_with(error)
    except KeyboardInterrupt:
        if RANK == "0":
            say("stopped by a signal")
        exit_process(EXIT_STOPPED)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_process(EXIT_FAILED)
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            end_with(RunFailed(f"{error.filename or 'a file'}: {error.strerror}"))
        _wait_for_the_first_rank()
        traceback.print_exception(error)
        say(f"error: {in_words(error)}")
        exit_process(EXIT_FAILED)
    finally:
        sys.stderr = stderr


def in_words(error: BaseException) -> str:
    """A mistake in code as one line, with the last place that is neither in a library nor in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not is_of_a_library(frame.filename)]
    where = "".join(f" in {frame.filename}, line {frame.lineno}" for frame in users[-1:])
    when = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}{where}{when}: {str(error).partition(chr(10))[0]}"


@cache
def is_of_a_library(file: str) -> bool:
    """Whether a file is of a library, or of this package."""
    return file.startswith("<") or os.path.realpath(file).startswith(LIBRARIES)


def show_errors_as_lines() -> None:
    """From now on, an error that nobody catches ends the process as `errors_as_exit_codes` does."""
    before = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ReportedError):
            sys.stderr = sys.__stderr__  # torch's own hook around this one collects what is said in a string
            end_with(error)
        before(kind, error, trace)
        if sys.excepthook is hook:  # once, and not in the string
            say(f"error: {in_words(error)}")

    if getattr(before, "__name__", "") != hook.__name__ or before.__module__ != __name__:
        sys.excepthook = hook


def end_with(error: ReportedError) -> NoReturn:
    """Print the lines of an error, and end the process with its exit code."""
    if error.same_on_all_ranks:
        _wait_for_the_first_rank()
        place = "" if RANK == "0" else f" on rank {RANK}"
    else:
        place = f" on rank {RANK}" if WORLD_SIZE > 1 else ""
    sys.stderr.writelines(_coloured(f"error{place}: {printable(line, None)}") + "\n" for line in error.lines)
    exit_process(error.exit_code)


def exit_process(exit_code: int) -> NoReturn:
    """End the process.

    With several processes, skip the interpreter's shutdown: gloo's threads live as long as anything refers to
    the process group, and abort the process if they release a tensor during shutdown (pytorch #179291).
    """
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _wait_for_the_first_rank() -> None:
    """Give rank 0 time to print: the launcher ends all ranks as soon as one exits.

    A rank that is still there afterwards met an error that rank 0 did not, and prints it.
    """
    if RANK != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST_RANK_SECONDS)


class _StderrThatMayFail:
    """A run goes on when the reader of its messages, such as `head`, has gone, or their disk is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
