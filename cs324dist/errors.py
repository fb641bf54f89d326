"""How the project says no: one line for each thing the user must change."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_REFUSED = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: run the same command again to continue


class Refused(Exception):
    """Input that cannot be used. Each line says what was given, what is allowed and what to do."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


@contextmanager
def refusals_as_exit_code() -> Iterator[None]:
    """Turn `Refused` into its lines on stderr, once for all ranks, and exit code 2, without a traceback."""
    try:
        yield
    except Refused as refusal:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.writelines(f"error: {line}\n" for line in refusal.lines)
        sys.exit(EXIT_REFUSED)
