"""Strong and weak scaling of the GAN's step: one process against two, in turn, one thread each.

    python benchmarks/scaling.py && python benchmarks/results_page.py

Takes about eight minutes on two cores, and writes `benchmarks/results/scaling.json`, of which the second
command makes the tables and the picture of docs/distributed.md. The step is that of preset `report` with the
discriminator training in every step, BatchNorm over the global batch.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from cs324dist.runs.environment import environment

STEP = Path(__file__).parent / "gan_step.py"
RESULT = Path(__file__).parent / "results" / "scaling.json"
CELLS = [(1, 64), (2, 64), (2, 128), (1, 256), (2, 256), (2, 512)]  # processes, global batch
COMPARISONS = {
    "strong scaling at global batch 64": ((1, 64), (2, 64)),
    "strong scaling at global batch 256": ((1, 256), (2, 256)),
    "weak scaling at 64 a process": ((1, 64), (2, 128)),
    "weak scaling at 256 a process": ((1, 256), (2, 512)),
}


def milliseconds(processes: int, batch: int) -> float:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(processes), str(STEP), "--batch-size", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{processes} x {batch // processes} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["milliseconds"]


def measure(rounds: int) -> dict:
    times: dict[tuple[int, int], list[float]] = {cell: [] for cell in CELLS}
    for number in range(rounds):
        for cell in CELLS:
            times[cell].append(milliseconds(*cell))
        newest = [round(times[cell][-1]) for cell in CELLS]
        print(f"round {number + 1} of {rounds}: {newest} ms", file=sys.stderr)
    ratios = {}
    for name, (one, two) in COMPARISONS.items():
        ratios[name] = sorted(round(a / b, 3) for a, b in zip(times[one], times[two], strict=True))
    return {
        "hardware": {**environment(), "threads": 1, "cores": os.cpu_count()},
        "milliseconds": {f"{p} x {b // p}": sorted(round(t, 1) for t in ts) for (p, b), ts in times.items()},
        "ratios": ratios,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="times each cell is measured (default: 5)")
    arguments = parser.parse_args()
    RESULT.write_text(json.dumps(measure(arguments.rounds), indent=2) + "\n")
    print(RESULT)
