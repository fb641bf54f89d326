"""`metrics.jsonl` of a run: one JSON object a line."""

import errno
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from cs324dist.errors import UserError, warn
from cs324dist.runs.files import Writer, content_of, replaced


class MetricsFile(Writer):
    """The metrics of one run; `Writer` says who may write them."""

    path: Path
    """The run folder."""

    def __init__(self) -> None:
        self._metrics: FileIO | None = None
        self._metrics_lines = 0
        self._size = 0  # of the metrics that are surely on the disk
        self._unsynced = b""  # the lines after those
        self._written = 0  # how much of them is in the file

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line; `step` is the number of completed steps. Values that are not finite become null.

        Raises:
            OSError: it cannot be written; it will be, together with the next.
        """
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self._unsynced += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._metrics_lines += 1
        self.write_metrics()

    def write_metrics(self, *, sync: bool = False) -> int:
        """Write the lines that are not yet written, with `sync` to the disk itself.

        Returns:
            How many lines there are.

        Raises:
            OSError: it cannot be done; no part of a line is left behind, and the next call tries again.
        """
        self.check_owned()
        if self._metrics is not None:
            try:
                _append(self._metrics, self._unsynced[self._written :])
                self._written = len(self._unsynced)
                if sync:
                    self._written = 0  # if it fails, nobody knows what is on the disk
                    os.fsync(self._metrics.fileno())
                    self._size, self._unsynced = self._size + len(self._unsynced), b""
            except OSError:
                self._metrics.truncate(self._size + self._written)
                raise
        return self._metrics_lines

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The rows so far; lines that are none, such as one that is just being written, are skipped."""
        return (row for _, row in self._lines_of_metrics() if row is not None)

    def read_evaluations(self, until: int) -> list[dict[str, float]]:
        """The metrics of the evaluations after at most `until` steps."""
        rows = (row for row in self.read_metrics() if row["step"] <= until)
        named = (
            {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")} for row in rows
        )
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in named if row]

    def has_evaluation(self, step: int, lines: int) -> bool:
        """Whether the evaluation after `step` is among the first lines; if not, it was cut off.

        Raises:
            UserError: one of the lines is damaged.
        """
        found = False
        for number, (_, row) in enumerate(itertools.islice(self._lines_of_metrics(), lines), 1):
            if row is None:
                raise UserError(
                    f"{self.path}/metrics.jsonl: line {number} is damaged: mend or delete it, "
                    f"then run the same command again"
                )
            names = row.keys() - {"step"}  # none: an evaluation that measured nothing
            found |= row["step"] == step and (not names or any(name.startswith("eval/") for name in names))
        return found

    def _lines_of_metrics(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """The whole lines, and what they say."""
        with suppress(UserError):
            *lines, _ = content_of(self.path / "metrics.jsonl").split(b"\n")
            yield from ((line + b"\n", _row(line)) for line in lines)

    def _rewind(self, step: int, metrics_lines: int) -> int:
        """Drop the metrics past the checkpoint of `step`; returns how many steps had been logged past it."""
        last, kept = step, 0
        if self._metrics is not None:
            self._metrics.close()
        # A new file, which stays open: an earlier owner that still runs writes to the one that it has open.
        with replaced(self.path / "metrics.jsonl", self) as temporary:
            self._metrics = FileIO(temporary, "a")
            for number, (line, row) in enumerate(self._lines_of_metrics()):
                last = max(last, row["step"] if row else 0)
                if number < metrics_lines and row and row["step"] <= step:
                    _append(self._metrics, line)
                    kept += 1
        if kept < metrics_lines:
            warn(f"{self.path}/metrics.jsonl lacks {metrics_lines - kept} lines up to step {step}")
        self._size = os.fstat(self._metrics.fileno()).st_size
        self._metrics_lines, self._unsynced, self._written = kept, b"", 0
        return last - step


def _append(file: FileIO, data: bytes) -> None:
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    well_formed = (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(value is None or type(value) in (int, float) for value in row.values())
    )
    return row if well_formed else None
