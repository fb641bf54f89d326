"""Write one HTML page about runs, which opens from disk and needs nothing else.

python launch/report.py runs/gan-fast-0 runs/lstm-length50-fast-0 --out report.html
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cs324dist.command_line import parse
from cs324dist.config import POSITIONAL
from cs324dist.errors import errors_as_exit_codes, warn
from cs324dist.report.page import write_report
from cs324dist.runs.files import check_writable


@dataclass(frozen=True)
class Report:
    """What to report on."""

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    """Run folders: finished, running, stopped or failed."""

    out: Path = Path("report.html")
    """Page to write."""


if __name__ == "__main__":
    with errors_as_exit_codes():
        options = parse(Report, __doc__)
        check_writable(options.out)
        for line in write_report(options.runs, options.out):
            warn(line)
        print(options.out)
