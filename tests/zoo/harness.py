"""Trains a habit on one process and on three, kills it and goes on, and compares how the runs end.

It trains it once more without --micro-batches, as plain torch does, and compares the metrics within rounding.

Each process is a fork of one that has imported torch and has made no tensor: threads do not survive a fork.
"""

import atexit
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from entry import Finding, Habit

import cs324dist
from cs324dist import errors

HERE = Path(__file__).parent
PROCESSES = {"one": 1, "three": 3, "killed": 3, "plain": 3, "whole": 1}
PLAIN = ("plain", "whole")  # have no --micro-batches
ROUNDING = 1e-3  # of a metric after twelve steps
KILL_AT = 6  # two steps after a checkpoint
LIMIT = 60  # seconds for a start; on a quiet machine it takes less than one
GRACE = 2  # seconds in which the other processes say what they met, when one has failed
ENDS = {0: "ended", -signal.SIGKILL: "killed", -signal.SIGALRM: "hang"}
FAILED = ("hang", "traceback", "crash")


class Start(NamedTuple):
    word: str
    said: str
    errors: str = ""


def judge(habit: Habit) -> Finding:
    """Make all starts, until one of them hangs or crashes, and compare how they end."""
    folder = Path(tempfile.mkdtemp(prefix="zoo-", dir="/dev/shm"))
    try:
        starts = dict(starts_of(habit, folder))
        said = {name: made.said for name, made in starts.items() if made.word == "ended"}
        ends = {
            name: end_of(folder / name.replace("continued", "killed")) for name in said if name not in PLAIN
        }
        unlike = unlike_whole(folder / "one", folder / "whole") if {"one", "whole"} <= said.keys() else []
    finally:
        shutil.rmtree(folder)
    for made in starts.values():
        if made.word in FAILED:
            return Finding(made.word, made.said.strip().rpartition("\n")[2])
    refused = {name: made.errors for name, made in starts.items() if made.word == "refused"}
    differing = [
        f"{key} of {one} and {other}"
        for (one, of_one), (other, of_other) in pairwise(ends.items())
        for key in of_one | of_other
        if of_one.get(key) != of_other.get(key)
    ] + unlike
    word = "silent" if differing else "refused" if refused else "equal"
    said.pop("whole", None)
    return Finding(word, ", ".join(differing), said, refused)


def starts_of(habit: Habit, folder: Path) -> Iterator[tuple[str, Start]]:
    """A run that was killed goes on with one process or two."""
    for name in habit.starts:
        yield name, (made := start(habit, folder / name, name, PROCESSES[name]))
        if made.word == "killed":
            again = 1 + len(habit.task.__name__) % 2
            yield "continued", (made := start(habit, folder / name, "continued", again))
        if made.word in FAILED:
            return


def end_of(run: Path) -> dict[str, object]:
    """What has to be the same: the tensors, the task's own state, every metric but speeds."""
    checkpoint = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: path.name)
    state = json.loads((checkpoint / "trainer.json").read_text())
    files = sorted(checkpoint.rglob("*.safetensors"))
    digests = {str(f.relative_to(checkpoint)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    metrics = re.sub(r', "throughput/\w+": [^,}]+', "", (run / "metrics.jsonl").read_text())
    return {"step": state["step"], "state": state["task"], "metrics": metrics, **digests}


def unlike_whole(one: Path, whole: Path) -> list[str]:
    """The metrics in which training by parts is not like training by whole batches."""
    rows = zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (one, whole)), strict=True)
    return [
        f"{name} of one and whole"
        for parts, together in (map(json.loads, row) for row in rows)
        for name, value in parts.items()
        if not name.startswith("throughput")
        and not math.isclose(value, together[name], rel_tol=ROUNDING, abs_tol=ROUNDING / 100)
    ]


def start(habit: Habit, run: Path, name: str, processes: int) -> Start:
    """Start all processes, and wait for their end; when one has failed, end the others, as launchers do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--run-dir", str(run), *(() if name in PLAIN else ("--micro-batches", "4"))]
    variables = {
        "ACCELERATE_MIXED_PRECISION": habit.precision,
        "ACCELERATE_USE_CPU": "true",
        "CS324DIST_THREADS": str(habit.threads if name == "one" else 1),
        "ZOO_DYING": str(run.with_name("dying")) if name == "killed" else "",
    }
    if name in (habit.hash_seeds or {}):
        variables["PYTHONHASHSEED"] = habit.hash_seeds[name]
    if processes > 1:
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    files, waiting = [run.with_name(f"{name}-{rank}") for rank in range(processes)], set()
    for rank, file in enumerate(files):
        if child := os.fork():
            waiting.add(child)
        else:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            become(habit, words, variables | place, file)
    codes, deadline = [], float("inf")
    while waiting:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            waiting.remove(child)
            if code := os.waitstatus_to_exitcode(status):
                codes.append(code)
                deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            deadline = float("inf")
            for child in waiting:
                os.kill(child, signal.SIGKILL)
        else:
            time.sleep(0.002)
    code, said = (codes or [0])[0], "".join(file.read_text(errors="replace") for file in files)
    lines = re.findall(r"^error(?: on rank \d+)?: (.*)", said, re.MULTILINE)
    if code != -signal.SIGALRM and "Traceback (most recent call last)" in said:
        return Start("traceback", said)
    return Start("refused" if code in (1, 2) and lines else ENDS.get(code, "crash"), said, "\n".join(lines))


def become(habit: Habit, words: Sequence[str], variables: Mapping[str, str], said: Path) -> NoReturn:
    """Make this fork a process of a run."""
    try:
        signal.alarm(LIMIT)
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        for descriptor, path in enumerate((os.devnull, os.devnull, said)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
        os.environ.pop("PYTHONHASHSEED", None)
        os.environ.update(variables)
        if habit.hash_seeds is not None:
            os.execv(sys.executable, [sys.executable, str(HERE), "--train", habit.task.__name__, *words])
        torch.seed()  # or forks would draw alike
        np.random.seed()
        train(habit, words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def train(habit: Habit, words: Sequence[str]) -> NoReturn:
    """Run the command, and end the process."""
    for module in [module for name, module in sys.modules.items() if name.startswith("cs324dist")]:
        for constant, kind in (("RANK", str), ("WORLD_SIZE", int)):  # were read at the import
            if constant in vars(module):
                setattr(module, constant, kind(os.environ.get(constant, getattr(errors, constant))))
    errors.FIRST_RANK_SECONDS = GRACE / 2
    sys.argv = [f"{habit.task.__name__}.py", *words]
    code = 0
    try:
        cs324dist.main(dying(habit.task) if os.environ["ZOO_DYING"] else habit.task, habit.task.__doc__)
    except SystemExit as end:
        code = end.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


def dying(task: type) -> type:
    """The task; its processes are killed when each of them has come to a step."""

    def step(self, step, trainer):
        if step == KILL_AT:
            folder = Path(os.environ["ZOO_DYING"])
            folder.mkdir(exist_ok=True)
            (folder / os.environ["RANK"]).touch()
            while len(list(folder.iterdir())) < PROCESSES["killed"]:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        super(killed, self).step(step, trainer)

    killed = type(task.__name__, (task,), {"step": step})
    return killed


class Keeper:
    """A process that judges habits: it reads their names and writes findings."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE), "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def judge(self, name: str) -> Finding:
        print(name, file=self._process.stdin, flush=True)
        return Finding(*json.loads(self._process.stdout.readline()))

    def end(self) -> None:
        self._process.communicate()
