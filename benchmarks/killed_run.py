"""The picture on the front page: a run that is killed and continued on other numbers of processes.

    python benchmarks/killed_run.py

Four runs of the LSTM: with --micro-batches, one that is never stopped and one that is killed twice; without
it, one on a single process and one on two. Losses and SHA-256 sums go to benchmarks/results/killed_run.json.
"""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from common import REPOSITORY, Row, store

COMMAND = "launch/lstm.py --length 23 --seed 5 --log-every 1 --checkpoint-every 10 --wandb disabled"
PARTS = ("--micro-batches", "4")
KILLED = ((1, 40), (3, 90), (2, None))  # processes, and the checkpoint after which they are killed


def train(run: Path, processes: int, options: tuple[str, ...] = (), until: int | None = None) -> None:
    """Train to the end, or kill every process when there is a checkpoint of step `until`."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *(launcher if processes > 1 else ()), *COMMAND.split(), *options]
    process = subprocess.Popen(
        [*command, "--run-dir", str(run)], cwd=REPOSITORY, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        if until is not None and any(run.glob(f"checkpoints/{until:09d}*")):
            subprocess.run(["pkill", "-KILL", "-f", str(run)], check=False)
        time.sleep(0.01)
    if process.returncode and until is None:
        sys.exit(f"{run.name} ended with exit code {process.returncode}")
    if until is not None and process.returncode != -signal.SIGKILL and processes == 1:
        sys.exit(f"{run.name} was not killed")


def looked_at(run: Path) -> Row:
    """The losses; after which step each owner began, on how many processes; the last model's SHA-256."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    files = sorted((run / "owners").glob("*.json"), key=lambda file: int(file.stem))
    owners = [json.loads(file.read_text()) for file in files]
    newest = max(run.glob("checkpoints/*/lstm/model.safetensors"))
    return {
        "curve": [{"step": row["step"], "loss": row["train/loss"]} for row in rows if "train/loss" in row],
        "owners": [{"step": o["from_step"], "processes": o["environment"]["processes"]} for o in owners],
        "sha256": hashlib.sha256(newest.read_bytes()).hexdigest(),
    }


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in ("whole", "killed", "ddp 1", "ddp 2")}
        train(runs["whole"], 1, PARTS)
        for processes, until in KILLED:
            train(runs["killed"], processes, PARTS, until)
        for processes in (1, 2):
            train(runs[f"ddp {processes}"], processes)
        found = {name: looked_at(run) for name, run in runs.items()}
        store("killed_run", {"runs": found})
        for name, run in found.items():
            print(f"{name:8} {run['sha256']} processes: {[owner['processes'] for owner in run['owners']]}")
