"""Every speed that is claimed, as a ratio of two sides measured in turn on one machine.

    make bench
    python benchmarks/speed.py ablation   # what each measure brings

Each side is a process of its own, so that nothing of one reaches the other; the sides take turns, and a ratio
is that of two measurements of one round. Written: benchmarks/results/speed.json and ablation.json;
docs/performance.md is made from them by `python benchmarks/results_page.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results_page import compared
from tqdm import tqdm

from cs324dist.runs.environment import environment

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
SMOKE = "launch/gan.py --preset smoke --dataset fake --wandb disabled --log-every 1"
IMPORTS = "import torch, accelerate"


class Comparison(NamedTuple):
    """`slower` over `faster` is the ratio; `goal` is what it is to reach, or to stay under."""

    what: str
    slower: str
    faster: str
    goal: str = ""


COMPARISONS = (
    Comparison("GAN step against the notebook's loop", "gan_notebook", "gan_ours", "at least 1.9"),
    Comparison("the same, its images in memory", "gan_notebook_in_memory", "gan_ours", "at least 1.4"),
    Comparison(
        "the same, in the style of Accelerate's examples", "gan_accelerate", "gan_ours", "at least 1.9"
    ),
    Comparison("GAN step against its floor", "gan_ours", "gan_floor", "at most 1.35"),
    Comparison("GAN loop against the bare step", "gan_loop", "gan_bare", "at most 1.02"),
    Comparison(
        "LSTM step, fused, 50 digits, against torch.nn.LSTM", "lstm_fused_50", "lstm_torch_50", "at most 1.03"
    ),
    Comparison("the same, 1000 digits", "lstm_fused_1000", "lstm_torch_1000", "at most 1.03"),
    Comparison("LSTM step, equations, 50 digits", "lstm_equations_50", "lstm_torch_50", "at most 1.5"),
    Comparison("the same, 1000 digits", "lstm_equations_1000", "lstm_torch_1000", "at most 1.5"),
    Comparison("LSTM loop, 10 digits, against the bare step", "lstm_loop", "lstm_fused_10", "at most 1.1"),
    Comparison("start to first step against the imports", "start", "imports", "at most 1.3"),
    Comparison(
        "samples to a file against the forward pass", "samples_file", "samples_forward", "at most 1.15"
    ),
    Comparison("GAN step in float32 against bf16", "gan_ours", "gan_bf16"),
)

ABLATION = (  # one measure left out, against all of them
    Comparison("channels_last", "gan_without_channels_last", "gan_bare"),
    Comparison("fused Adam", "gan_without_fused_adam", "gan_bare"),
    Comparison(
        "discriminator frozen in the generator's step", "gan_without_frozen_discriminator", "gan_bare"
    ),
    Comparison("one discriminator forward", "gan_without_one_forward", "gan_bare"),
    Comparison("pooling before the LeakyReLU", "gan_without_pooling_first", "gan_bare"),
    Comparison("allocator thresholds, LSTM of 50 digits", "lstm_without_allocator", "lstm_fused_50"),
    Comparison("denormals flushed, LSTM of 1000 digits", "lstm_without_flushing", "lstm_fused_1000"),
)
GROUPS = {"speed": COMPARISONS, "ablation": ABLATION}


def side(name: str) -> float:
    """One measurement, in milliseconds."""
    if name == "imports":
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        return 1000 * (time.perf_counter() - began)
    if name == "start":
        return until_the_first_step()
    command = [sys.executable, "benchmarks/sides.py", name]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def until_the_first_step() -> float:
    """From the command to the first step's line."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, *SMOKE.split(), "--run-dir", f"{folder}/run"]
        with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("step 1/"):
                    break
            seconds = time.perf_counter() - began
            process.kill()
    return 1000 * seconds


def compare(chosen: Sequence[Comparison], rounds: int) -> dict[str, Any]:
    names = list(dict.fromkeys(name for c in chosen for name in (c.slower, c.faster)))
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.monotonic()
    for number, (_, name) in enumerate(tqdm([(r, n) for r in range(rounds) for n in names], disable=None)):
        times[name].append(side(name))
        if not sys.stderr.isatty() and (number + 1) % len(names) == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"round {(number + 1) // len(names)} of {rounds} after {minutes:.1f} min", file=sys.stderr)
    rows = []
    for c in chosen:
        ratios = sorted(a / b for a, b in zip(times[c.slower], times[c.faster], strict=True))
        rows.append({**c._asdict(), "ratios": [round(ratio, 3) for ratio in ratios],
                     "slower_ms": round(statistics.median(times[c.slower]), 2),
                     "faster_ms": round(statistics.median(times[c.faster]), 2)})  # fmt: skip
    here = {**environment(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return {"environment": here, "rounds": rounds, "comparisons": rows}


if __name__ == "__main__":
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("group", nargs="?", default="speed", choices=GROUPS, help="default: speed")
    parser.add_argument("--rounds", type=int, default=5, help="times each side is measured (default: 5)")
    arguments = parser.parse_args()
    result = compare(GROUPS[arguments.group], arguments.rounds)
    print(compared(result["comparisons"]))
    (RESULTS / f"{arguments.group}.json").write_text(json.dumps(result, indent=1) + "\n")
