"""`make same-bits`: every task on 1 to 8 processes, one and two threads, float32 and bf16, and killed.

All runs of a task and precision must end in the same bits: tensors, the state of the task, and every metric
except the throughput. It prints a line for each run, and exits with 1 at a difference.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos import newest

REPOSITORY = Path(__file__).parents[1]
MICRO_BATCHES = 8
SMALL = ("--dataset", "fake", "--batch-size", "16")
TASKS = {
    "lstm": ("launch/lstm.py", "--length", "12", "--batch-size", "32", "--evaluate-every", "8"),
    "gan": ("launch/gan.py", *SMALL, "--evaluate-every", "12"),
    "classifier": ("launch/classifier.py", *SMALL),
    "mlp": ("examples/mlp.py", "--batch-size", "32"),
}
COMMON = ("--micro-batches", str(MICRO_BATCHES), "--steps", "12", "--log-every", "1",
          "--checkpoint-every", "3", "--wandb", "disabled")  # fmt: skip
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1), (5, 1), (7, 1), (8, 1)]  # processes, threads


def command(task: str, processes: int, run: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [
        sys.executable,
        *(launcher if processes > 1 else []),
        *TASKS[task],
        *COMMON,
        "--run-dir",
        str(run),
    ]


def start(task: str, processes: int, threads: int, precision: str, run: Path) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        "CS324DIST_THREADS": str(threads),
        "ACCELERATE_MIXED_PRECISION": precision,
        "PYTHONPATH": str(REPOSITORY),
    }
    log = run.with_suffix(".log").open("ab")
    return subprocess.Popen(
        command(task, processes, run),
        cwd=REPOSITORY,
        env=environment,
        stderr=log,
        stdout=log,
        start_new_session=True,
    )


def kill_again_and_again(task: str, precision: str, run: Path, rng: random.Random) -> list[int]:
    """Kill the run (-9) at random moments and go on, on 1 to 8 processes; returns how many each time."""
    used = []
    while True:
        processes = rng.randint(1, MICRO_BATCHES)
        used.append(processes)
        process = start(task, processes, rng.choice((1, 2)), precision, run)
        last = len(used) > 4
        while process.poll() is None and not last and lines(run) < len(used) * 3:
            time.sleep(0.02)
        if not last:
            time.sleep(rng.random() / 4)
            subprocess.run(["pkill", "-9", "-f", str(run)], check=False)
        if process.wait() == 0:
            return used


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def digest(run: Path) -> str:
    """Of all tensors of the last checkpoint, of the task's state, and of the metrics."""
    checkpoint = newest(run)
    found = hashlib.sha256()
    for path in sorted(checkpoint.rglob("*.safetensors")):
        found.update(path.relative_to(checkpoint).as_posix().encode() + path.read_bytes())
    found.update(json.dumps(json.loads((checkpoint / "trainer.json").read_text())["task"]).encode())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if "throughput" not in name}
        found.update(json.dumps(row).encode())
    return found.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--precisions", nargs="+", choices=["no", "bf16"], default=["no", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, different = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for task in options.tasks:
            for precision in options.precisions:
                seen = {}
                for processes, threads in LAYOUTS:
                    run = Path(folder) / f"{task}-{precision}-{processes}-{threads}"
                    code = start(task, processes, threads, precision, run).wait()
                    title = f"{processes} processes, {threads} threads"
                    seen[title] = digest(run) if code == 0 else run.with_suffix(".log").read_text()[-2000:]
                    print(f"{task:<10} {precision:<4} {seen[title]}  {title}", flush=True)
                run = Path(folder) / f"{task}-{precision}-killed"
                used = kill_again_and_again(task, precision, run, rng)
                seen["killed"] = digest(run)
                print(f"{task:<10} {precision:<4} {seen['killed']}  killed; processes {used}", flush=True)
                different += len(set(seen.values())) - 1
    print("the same bits" if not different else f"DIFFERENT in {different} cases")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
