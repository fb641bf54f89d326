"""The LSTM's results: train, count, and store what docs/results.md is written from.

    python benchmarks/lstm_results.py                    # everything: over an hour on two cores
    python benchmarks/lstm_results.py ablation certain   # some of it

Each part writes `benchmarks/results/lstm/PART.json`; `python benchmarks/results_page.py` then writes the
page. A model counts as solved at the first step after which every trial of the evaluation stream is right:
all palindromes there are where those are at most 10 000 (up to 7 digits), 10 000 beyond, 1 000 beyond 2 000
digits. Every second or twentieth step is tried, if its batch was entirely right.
"""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import REPOSITORY, Row, on_each_core, run_parts, trainer_of
from torch import Tensor, nn
from tqdm import tqdm

from cs324dist.data.streams import Stream
from cs324dist.report.reading import read_run
from cs324dist.tasks.lstm.networks import LSTM
from cs324dist.tasks.lstm.palindromes import DIGITS, all_palindromes, free_digits, palindromes
from cs324dist.tasks.lstm.task import LSTMTask
from cs324dist.trainer import Trainer

FAST, COURSE = LSTMTask.presets["fast"], LSTMTask.presets["course"]
LENGTHS = (5, 10, 15, 20, 50)  # the course report's
UNSEEN_LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 1500, 2000, 3000, 5000,
                  10_000, 20_000, 50_000, 100_000)  # fmt: skip
FINAL_LENGTHS = (13, 50, 200, 1000, 4100, 10_000)
SEEDS = range(5)
FIXED = 2048  # palindromes of a fixed training set
CURVE_EVERY = 25  # steps
MOST_SURE = 1000  # digits that boxes are followed for
TRY_EVERY = {"course": 20, "fast": 2}  # steps from one trial of a hopeful model to the next
UNSEEN = Stream(0, "palindromes/generalisation")

Batches = Iterable[tuple[Tensor, Tensor]]  # of digits, and the last digit


class FixedSet(Stream):
    """A training set of `FIXED` palindromes, over and over, in place of an endless stream."""

    def integers(self, indices: Tensor, components: int, below: int) -> Tensor:
        return super().integers(indices % FIXED, components, below)


def new_trainer(preset: str, **options: Any) -> Trainer:
    """A trainer of a task with these options.

    The learning rate is constant unless an option says otherwise: what a model needs is found by training on.
    """
    return trainer_of("lstm", preset, **{"schedule": "constant", **options})


def accuracy_of(trainer: Trainer) -> float:
    with trainer.evaluating():
        return trainer.task.evaluate(trainer.sum_over()).metrics["accuracy"]


def train(trainer: Trainer, most: int, least: int = 0) -> Row:
    """Train until solved, at least `least` and at most `most` steps."""
    task, config, solved, curve = trainer.task, trainer.config, None, []
    for step in tqdm(range(1, most + 1), LSTMTask.run_name(config), disable=None):
        trainer.step(step - 1, is_logged=False)
        metrics = trainer.read_metrics()
        right = metrics["train/accuracy"]
        if step % CURVE_EVERY == 0:
            curve.append([step, round(metrics["train/loss"], 4), round(right, 4)])
        is_tried = step % TRY_EVERY[config.preset] == 0 and right == 1 and task.length == config.length
        if solved is None and is_tried and accuracy_of(trainer) == 1:
            solved = step
        if solved and step >= least:
            break
    accuracy = accuracy_of(trainer)
    return {"seed": config.seed, "solved": solved, "accuracy": accuracy, "steps": step, "curve": curve}


def finished(task: str, **options: Any) -> LSTM:
    """The model of a task's preset `fast`, after all its steps."""
    trainer = trainer_of(task, "fast", **options)
    for step in tqdm(range(trainer.config.steps), task, disable=None):
        trainer.step(step, is_logged=False)
    return trainer.task.model.eval().requires_grad_(False)


@torch.no_grad()
def count(model: nn.Module, length: int, batches: Batches) -> Row:
    """How many palindromes the model gets right, of how many."""
    right = trials = 0
    for digits, last in tqdm(batches, f"length {length}", disable=None):
        right += int((model(digits).argmax(dim=1) == last).sum())
        trials += len(last)
    return {"length": length, "right": right, "trials": trials}


def all_of(length: int) -> Batches:
    """All palindromes there are."""
    return (all_palindromes(length, i) for i in torch.arange(DIGITS ** free_digits(length)).split(1 << 14))


def course() -> list[Row]:
    """The course report's lengths, by the LSTM and the Elman network, on endless data and on a fixed set."""
    cells = [(model, length, "endless") for model in ("lstm", "rnn") for length in LENGTHS]
    rows = []
    for (model, length, data), seed in product([*cells, ("lstm", 50, "fixed")], SEEDS):
        trainer = new_trainer("course", length=length, model=model, seed=seed)
        task = trainer.task
        if data == "fixed":
            task.data = FixedSet(**asdict(task.data))
        most = 2500 if (model, length) == ("lstm", 50) else COURSE.steps
        row = {"model": model, "length": length, "data": data, **train(trainer, most, least=COURSE.steps)}
        if (model, length) == ("lstm", 10):  # lengths beyond 7 are only sampled otherwise
            counted = count(task.model.eval(), length, all_of(length))
            row["all"] = [counted["right"], counted["trials"]]
        rows.append(row)
    return rows


def fast() -> list[Row]:
    """Preset `fast` at 50 and at 1 000 digits."""
    return [
        {"length": length, **train(new_trainer("fast", length=length, seed=seed), FAST.steps)}
        for length, seeds in ((50, 10), (1000, 3))
        for seed in range(seeds)
    ]


def last_checkpoint(length: int, seed: int) -> Row:
    """A model of preset `fast` after all its steps."""
    trainer = new_trainer("fast", length=length, seed=seed, schedule=FAST.schedule)
    return {"length": length, **train(trainer, FAST.steps, least=FAST.steps)}


def final() -> list[Row]:
    """The last checkpoint of preset `fast`, whatever came before; one model on each core at a time."""
    lengths, seeds = zip(*product(FINAL_LENGTHS, SEEDS), (4100, 11), strict=True)
    rows = on_each_core(last_checkpoint, reversed(lengths), reversed(seeds))  # the longest first
    return sorted(rows, key=lambda row: (row["length"], row["seed"]))


def ablation() -> list[Row]:
    """Preset `fast` at 50 digits, each ingredient exchanged for the course recipe's or left out."""
    variants = {
        "preset fast": {},
        "initialisation as nn.Linear": {"initialisation": "linear"},
        "digits as scalars": {"encoding": "scalar"},
        "RMSprop": {"optimizer": "rmsprop"},
        "RMSprop, 1e-3": {"optimizer": "rmsprop", "learning_rate": 1e-3},
        "Adam, 1e-2": {"learning_rate": 1e-2},
        "no curriculum": {"curriculum": 1.0},
        "clipped at 1": {"max_grad_norm": 1.0},
        "no clipping": {"max_grad_norm": 1e6},
    }
    return [
        {"variant": name, **train(new_trainer("fast", length=50, seed=seed, **options), 1000)}
        for name, options in variants.items()
        for seed in SEEDS
    ]


def generalisation() -> list[Row]:
    """One model trained to 1 000 digits, on lengths it never saw."""
    model, rows = finished("lstm", length=1000, schedule="constant"), []
    for length in UNSEEN_LENGTHS:
        trials = 1000 if length <= 10_000 else 200
        sampled = (palindromes(UNSEEN, some, length) for some in torch.arange(trials).split(200))
        few = DIGITS ** free_digits(length) <= trials
        rows.append(count(model, length, all_of(length) if few else sampled))
    return rows


def certain() -> list[Row]:
    """All palindromes there are, up to 12 digits, by models of preset `fast`."""
    models = ((n, finished("lstm", length=n, schedule="constant")) for n in range(1, 13))
    return [count(model, length, all_of(length)) for length, model in models]


def proven() -> list[Row]:
    """Digits proven for every length, of models trained on palindromes alone, and on boxes as well."""
    sys.path.append(str(REPOSITORY / "examples"))
    from proven import FLOAT32, first_states, least, margins, next_states, prove

    rows = []
    for task, seed in product(("lstm", "examples/proven.py:ProvenTask"), SEEDS):
        began, model = time.monotonic(), finished(task, seed=seed)
        minutes, margin = (time.monotonic() - began) / 60, prove(model)
        precise, sure = copy.deepcopy(model).double(), 0
        box = first_states(precise, FLOAT32)
        while sure < MOST_SURE and (least(margins(precise, box.h, FLOAT32)) > 0).all():
            box, sure = box | next_states(precise, box, FLOAT32), sure + 1
        row = {"boxes": task != "lstm", "seed": seed, "sure": sure, "minutes": round(minutes, 2)}
        # JSON has no -inf, which is the margin where no box was found.
        row |= {"proven": int((margin > 0).sum()), "margin": max(margin.min().item(), -1.0)}
        sampled = (palindromes(UNSEEN, some, 10_000) for some in torch.arange(1000).split(200))
        rows.append(row | count(model, 10_000, sampled))
    return rows


def timed_run(length: int, options: str, trials: int) -> Row:
    """Time, memory and accuracy of a whole run, as a user starts it."""
    command = f"launch/lstm.py --length {length} {options}"
    with TemporaryDirectory() as folder:
        run, began = Path(folder) / "run", time.monotonic()
        arguments = [sys.executable, *command.split(), "--wandb", "disabled", "--run-dir", str(run)]
        process = subprocess.Popen(arguments, cwd=REPOSITORY)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command} ended with exit code {process.returncode}")
        accuracy = read_run(run, command).last("eval/accuracy")
    row = {"length": length, "command": f"python {command}", "seconds": round(seconds)}
    return row | {"peak_gib": round(used.ru_maxrss / 2**20, 2), "accuracy": accuracy, "trials": trials}


def long() -> list[Row]:
    """Whole runs up to 100 000 digits.

    The rate is constant beyond 1 000: else it falls before the curriculum has reached the length.
    """
    hundred = "--steps 100 --schedule constant --evaluate-every 100"
    return [
        timed_run(1000, "--steps 150 --evaluate-every 150", 10_000),
        timed_run(10_000, hundred, 1000),
        timed_run(100_000, hundred, 1000),
    ]


def million() -> list[Row]:
    """A whole run at a million digits.

    The curriculum leads to full length in few steps, of which the last six are at
    283 989 and at 1 000 000 digits.
    """
    recipe = "--batch-size 64 --learning-rate 0.02 --schedule constant --curriculum 4"
    return [timed_run(1_000_000, f"{recipe} --steps 190 --evaluate-every 190 --log-every 1", 1000)]


if __name__ == "__main__":
    run_parts(__doc__, "lstm", course, fast, final, ablation, generalisation, certain, proven, long, million)
