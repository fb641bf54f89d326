"""Strong and weak scaling of the GAN's step: one process against two, in turn, one thread each.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json --plot docs/images/scaling.png

Takes about eight minutes on two cores. The step is that of preset `report` with the discriminator training in
every step, BatchNorm over the global batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from cs324dist.runs.environment import environment

STEP = Path(__file__).parent / "gan_step.py"
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


def model(result: dict) -> dict[str, float]:
    """Milliseconds a step as `fixed + per_sample x samples of a process + moved, if there are two`.

    Both cells of one process and the smallest of two give the three numbers; the other cells check them.
    """
    median = {cell: statistics.median(times) for cell, times in result["milliseconds"].items()}
    per_sample = (median["1 x 256"] - median["1 x 64"]) / (256 - 64)
    fixed = median["1 x 64"] - 64 * per_sample
    moved = median["2 x 32"] - fixed - 32 * per_sample
    predicted = {"fixed": fixed, "per_sample": per_sample, "moved": moved}
    for cell in median:
        processes, samples = (int(word) for word in cell.split(" x "))
        predicted[cell] = fixed + per_sample * samples + (moved if processes > 1 else 0)
    return predicted


def table(result: dict) -> str:
    lines = ["| comparison | median | least | most |", "|---|---|---|---|"]
    for name, ratios in result["ratios"].items():
        lines.append(f"| {name} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f} |")
    lines += [
        "",
        "| processes x samples of each | ms a step, median | least | most | model |",
        "|---|---|---|---|---|",
    ]
    predicted = model(result)
    for cell, times in result["milliseconds"].items():
        row = [statistics.median(times), times[0], times[-1], predicted[cell]]
        lines.append(f"| {cell} | " + " | ".join(f"{value:.0f}" for value in row) + " |")
    constants = ", ".join(f"{name} {predicted[name]:.2f}" for name in ("fixed", "per_sample", "moved"))
    return "\n".join([*lines, "", f"model, in ms: {constants}"])


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(result["ratios"])
    medians = [statistics.median(result["ratios"][name]) for name in names]
    spread = [
        [m - min(result["ratios"][n]) for m, n in zip(medians, names, strict=True)],
        [max(result["ratios"][n]) - m for m, n in zip(medians, names, strict=True)],
    ]
    colours = ["#0072b2" if "strong" in name else "#e69f00" for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, capsize=3)
    axes.axvline(1, color="grey", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("two processes over one: speed-up (strong), efficiency (weak)")
    for row, median in enumerate(medians):
        axes.text(0.03, row, f"{median:.2f}", color="white", va="center", weight="bold")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times each cell is measured (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--read", type=Path, help="read this JSON file instead of measuring")
    arguments = parser.parse_args()
    result = json.loads(arguments.read.read_text()) if arguments.read else measure(arguments.rounds)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)
    print(table(result))
