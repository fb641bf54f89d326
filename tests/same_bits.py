"""`make same-bits`: every task on 1 to 8 processes, in float32 and bf16, and killed.

All runs of a task and precision must end in the same bits: tensors, the state of the task, and every metric
except the throughput. It prints a line for each, and exits with 1 at a difference. If nothing was left out,
it stores them for docs/results.md.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos import EXAMPLES, TASKS, Cell, Outcome, Start, Whole, content_of, differences, store, trial

PROCESSES = tuple(range(1, 9))
LAYOUTS = [(1, 1), (1, 2), *((processes, 1) for processes in PROCESSES[1:])]
"""Processes, and the threads that each is given: it uses one."""

KILLS = 4
JOBS = 2


def compare(cell: Cell, layouts: list[tuple[int, int]], rng: random.Random, folder: Path) -> dict:
    """The first layout's end, and what ends otherwise: the other layouts, and a run that is killed."""
    began = time.monotonic()
    whole = Whole.of(cell, layouts[0], folder / "whole")

    def mismatches(layout: tuple[int, int]) -> list[str]:
        title = "{} processes of {} threads".format(*layout)
        start = Start(cell, layout, run := folder / title.replace(" ", "-"))
        if code := start.end():
            return [f"{title}: exit code {code}: {''.join(start.lines[-20:])}"]
        return [f"{title}: {difference}" for difference in differences(content_of(run), whole.content)]

    with ThreadPoolExecutor(JOBS) as pool:
        found = [line for lines in pool.map(mismatches, layouts[1:]) for line in lines]
    killed = Outcome(cell)
    trial(killed, whole, KILLS, rng, folder / "killed")
    return {
        "task": cell.task,
        "precision": cell.precision,
        "sha256": hashlib.sha256(json.dumps(whole.content, sort_keys=True).encode()).hexdigest(),
        "layouts": layouts,
        "killed_on": [kill.processes for kill in killed.kills],
        "mismatches": [*found, *killed.mismatches],
        "seconds": round(time.monotonic() - began),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS | EXAMPLES, default=list(TASKS | EXAMPLES))
    parser.add_argument("--precisions", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    parser.add_argument("--processes", nargs="+", type=int, choices=PROCESSES, default=PROCESSES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, began, rows = random.Random(options.seed), time.monotonic(), []
    layouts = [layout for layout in LAYOUTS if layout[0] in options.processes]
    for task in options.tasks:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
                rows.append(compare(Cell(task, PROCESSES, precision), layouts, rng, Path(folder)))
            print(rows[-1], flush=True)
    if len(rows) == 2 * len(TASKS | EXAMPLES) and layouts == LAYOUTS:
        store("same_bits", began, rows=rows)
    return int(any(row["mismatches"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
