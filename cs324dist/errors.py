"""How the project says no: one line for each thing the user must change."""

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
    """Turn `Refused` into its lines on stderr and exit code 2, without a traceback."""
    try:
        yield
    except Refused as refusal:
        for line in refusal.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
