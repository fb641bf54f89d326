"""The LSTM's results: train, count, and store what docs/results.md is written from.

    python benchmarks/lstm_results.py                    # everything: about 160 minutes on two cores
    python benchmarks/lstm_results.py ablation certain   # some of it

Each part writes `benchmarks/results/lstm/PART.json`; `python benchmarks/results_page.py` then writes the
page. A model counts as solved at the first step after which every trial of the evaluation stream is right:
all palindromes there are where those are at most 10 000 (up to 7 digits), 10 000 beyond, 1 000 beyond 2 000
digits. Looked at is every second or twentieth step, if its batch was entirely right.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import parts
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm import tqdm

from cs324dist.data.palindromes import DIGITS, all_palindromes, encode, free_digits, palindromes
from cs324dist.data.streams import Stream
from cs324dist.distributed.process import start_accelerator
from cs324dist.metrics.accuracy import LONG, TRIALS, TRIALS_WHEN_LONG
from cs324dist.models.lstm import LSTM
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.lstm import FAST, PRESETS, LSTMTask

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "lstm"
REPORT = PRESETS["course"]
LENGTHS = (5, 10, 15, 20, 50)  # the report's
SEEDS = range(5)
FIXED = 2048  # palindromes of a fixed training set
CURVE_EVERY = 25  # steps
SETTLING = 30  # steps watched after a curriculum has reached the full length


class FixedSet(Stream):
    """A training set of `FIXED` palindromes, over and over, in place of an endless stream."""

    def integers(self, indices: Tensor, components: int, below: int) -> Int64[Tensor, "samples components"]:
        return super().integers(indices % FIXED, components, below)


def train(task: LSTMTask, most: int, look_every: int, least: int = 0) -> dict[str, Any]:
    """Train until solved, at least `least` and at most `most` steps."""
    settings, solved, curve = task.settings, None, []
    for step in tqdm(range(most), f"{settings.run_name()} seed {settings.seed}", leave=False, disable=None):
        metrics = task.step(step)
        if (step + 1) % CURVE_EVERY == 0:
            loss, accuracy = (round(metrics[f"train/{name}"].item(), 4) for name in ("loss", "accuracy"))
            curve.append([step + 1, loss, accuracy])
        hopeful = task.counters["length"] == settings.length and metrics["train/accuracy"] == 1
        if solved is None and hopeful and (step + 1) % look_every == 0 and accuracy_of(task) == 1:
            solved = step + 1
        if solved and step + 1 >= least:
            break
    accuracy = accuracy_of(task)
    return {"seed": settings.seed, "solved": solved, "accuracy": accuracy, "steps": step + 1, "curve": curve}


def accuracy_of(task: LSTMTask) -> float:
    return task.evaluate().metrics["eval/accuracy"]


@torch.no_grad()
def count_all(task: LSTMTask) -> tuple[int, int]:
    """How many of all palindromes there are it gets right, and how many there are."""
    settings = task.settings
    model, length, trials = (
        task.models["lstm"].eval(),
        settings.length,
        DIGITS ** free_digits(settings.length),
    )
    right = 0
    for indices in tqdm(torch.arange(trials).split(1 << 14), f"all of length {length}", disable=None):
        digits, last = all_palindromes(length, indices)
        right += int((model(encode(digits, settings.encoding)).argmax(dim=1) == last).sum())
    return right, trials


def report() -> list[dict[str, Any]]:
    """The report's lengths, by the LSTM and the Elman network, on endless data and on a fixed set."""
    cells = [(model, length, "endless") for model in ("lstm", "rnn") for length in LENGTHS]
    trials = []
    for model, length, data in [*cells, ("lstm", 50, "fixed")]:
        for seed in SEEDS:
            task = LSTMTask(replace(REPORT, length=length, model=model, seed=seed), accelerator)
            if data == "fixed":
                task.data = FixedSet(**asdict(task.data))
            most = 2500 if (model, length) == ("lstm", 50) else REPORT.steps
            trial = train(task, most, look_every=20, least=REPORT.steps)
            if length == 10 and model == "lstm":  # lengths beyond 7 are only sampled otherwise
                trial["all"] = count_all(task)
            trials.append({"model": model, "length": length, "data": data, **trial})
    return trials


def readings() -> list[dict[str, Any]]:
    """The report's recipe at 50 digits, with what the report leaves open read in other ways."""

    def second_bias(model: LSTM) -> None:  # the hidden parts' own, were they an nn.Linear each
        bound = model.W_h.shape[1] ** -0.5
        model.b += torch.empty_like(model.b).uniform_(-bound, bound)

    def no_bias(model: LSTM) -> None:
        nn.init.zeros_(model.b)

    def remembering(model: LSTM) -> None:
        nn.init.ones_(model.gate("f")[2])

    trials = []
    for name, change, changes in (
        ("a bias for the input's part and one for the hidden state's", second_bias, {}),
        ("biases zero", no_bias, {}),
        ("forget gate's bias 1", remembering, {}),
        ("clipped at 1", None, {"max_grad_norm": 1.0}),
    ):
        for seed in SEEDS:
            task = LSTMTask(replace(REPORT, length=50, seed=seed, **changes), accelerator)
            torch.manual_seed(seed)
            if change:
                with torch.no_grad():
                    change(task.models["lstm"])
            trials.append({"reading": name, **train(task, REPORT.steps, look_every=20)})
    return trials


def initialisation() -> list[dict[str, Any]]:
    """The report's recipe at 20 digits, with other weights to begin with."""

    def like_torch(model: LSTM) -> None:
        for weight in (model.W_x, model.W_h, model.b):
            nn.init.uniform_(weight, -(model.W_h.shape[1] ** -0.5), model.W_h.shape[1] ** -0.5)

    def xavier(model: LSTM) -> None:
        for weight in (model.W_x, model.W_h):
            for gate in weight.chunk(4):
                nn.init.xavier_uniform_(gate)
        nn.init.zeros_(model.b)

    trials = []
    for name, initialise in (
        ("nn.Linear's (the report's)", LSTM.initialise_as_linear),
        ("nn.LSTM's", like_torch),
        ("Xavier", xavier),
        ("for the length", lambda model: model.initialise_for_length(20)),
    ):
        for seed in SEEDS:
            task = LSTMTask(replace(REPORT, length=20, seed=seed), accelerator)
            torch.manual_seed(seed)
            with torch.no_grad():
                initialise(task.models["lstm"])
            trials.append({"initialisation": name, **train(task, REPORT.steps, look_every=20)})
    return trials


def fast() -> list[dict[str, Any]]:
    """Preset `fast` at 50 and at 1 000 digits."""
    trials = []
    for length, seeds in ((50, range(10)), (1000, range(3))):
        for seed in seeds:
            task = LSTMTask(replace(FAST, length=length, seed=seed), accelerator)
            trials.append({"length": length, **train(task, FAST.steps, look_every=2)})
    return trials


def ablation() -> list[dict[str, Any]]:
    """Preset `fast` at 50 digits, each ingredient exchanged for the report's or left out."""
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
    trials = []
    for name, changes in variants.items():
        for seed in SEEDS:
            task = LSTMTask(replace(FAST, seed=seed, **changes), accelerator)
            trials.append({"variant": name, **train(task, 1000, look_every=2)})
    return trials


def settled() -> list[dict[str, Any]]:
    """With either initialisation at 1 000 digits: is a batch still wrong once the full length is reached?"""
    trials = []
    for initialisation in ("length", "linear"):
        for seed in range(3):
            settings = replace(FAST, length=1000, initialisation=initialisation, seed=seed)
            task, reached, wrong = LSTMTask(settings, accelerator), None, 0
            for step in range(FAST.steps):
                if reached is None and task.counters["length"] == settings.length:
                    reached = step
                if reached is not None and step == reached + SETTLING:
                    break
                metrics = task.step(step)
                wrong += reached is not None and metrics["train/accuracy"].item() < 1
            trials.append(
                {"initialisation": initialisation, "seed": seed, "reached": reached, "wrong": wrong}
            )
    return trials


def generalisation() -> list[dict[str, Any]]:
    """One model trained to 1 000 digits, on lengths it never saw."""
    task = LSTMTask(replace(FAST, length=1000), accelerator)
    train(task, FAST.steps, look_every=2, least=FAST.steps)
    model, counted = task.models["lstm"].eval(), []
    for length in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 1500, 2000, 3000, 5000, 10_000, 20_000,
                   50_000, 100_000):  # fmt: skip
        there_are = DIGITS ** free_digits(length)
        right, trials = 0, min(there_are, 1000 if length <= 10_000 else 200)
        for indices in torch.arange(trials).split(200):
            digits, last = (
                all_palindromes(length, indices)
                if there_are <= 1000
                else palindromes(Stream(0, "palindromes/generalisation"), indices, length)
            )
            with torch.no_grad():
                right += int((model(encode(digits, "onehot")).argmax(dim=1) == last).sum())
        counted.append({"length": length, "right": right, "trials": trials})
    return counted


def held() -> list[dict[str, Any]]:
    """What the states of that model do over the length, for 100 palindromes."""
    task = LSTMTask(replace(FAST, length=1000), accelerator)
    train(task, FAST.steps, look_every=2, least=FAST.steps)
    model, measured = task.models["lstm"].eval(), []
    digits, _ = palindromes(Stream(0, "palindromes/generalisation"), torch.arange(100), 20_000)
    x, first = encode(digits, "onehot"), digits[:, 0]
    state, before = None, 0
    for steps in (10, 100, 1000, 10_000, 20_000):
        with torch.no_grad():
            _, state = model.scan(x[before:steps], state)
        h, c, before = *state, steps
        centres = torch.stack([h[first == digit].mean(0) for digit in range(DIGITS)])
        measured.append(
            {
                "steps": steps,
                "within": (h - centres[first]).norm(dim=1).mean().item(),
                "between": torch.pdist(centres).min().item(),
                "largest_cell": c.abs().max().item(),
            }
        )
    return measured


def certain() -> list[dict[str, Any]]:
    """All palindromes there are, up to 12 digits, by models of preset `fast`."""
    counted = []
    for length in range(1, 13):
        task = LSTMTask(replace(FAST, length=length), accelerator)
        train(task, FAST.steps, look_every=2, least=FAST.steps)
        right, trials = count_all(task)
        counted.append({"length": length, "right": right, "trials": trials})
    return counted


def long() -> list[dict[str, Any]]:
    """Time, memory and accuracy of whole runs, as a user starts them."""
    trials = []
    for length, steps in ((1000, 150), (10_000, 100), (100_000, 100)):
        options = f"--length {length} --steps {steps} --evaluate-every {steps}"
        with tempfile.TemporaryDirectory() as folder:
            command = f"launch/lstm.py {options}"
            quiet = ("--wandb", "disabled", "--log-every", "1", "--run-dir", f"{folder}/run")
            began = time.monotonic()
            process = subprocess.Popen([sys.executable, *command.split(), *quiet], cwd=REPOSITORY)
            _, status, used = os.wait4(process.pid, 0)
            if code := os.waitstatus_to_exitcode(status):
                sys.exit(f"{command} ended with exit code {code}")
            rows = RunDir(Path(folder) / "run").read_metrics()
        trials.append(
            {
                "length": length,
                "command": f"python {command}",
                "seconds": round(time.monotonic() - began),
                "peak_gib": round(used.ru_maxrss / 2**20, 2),
                "accuracy": [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1],
                "trials": TRIALS if length <= LONG else TRIALS_WHEN_LONG,
                "train_accuracy": [row["train/accuracy"] for row in rows if "train/accuracy" in row],
            }
        )
    return trials


PARTS = {
    part.__name__: part
    for part in (
        report,
        readings,
        initialisation,
        fast,
        ablation,
        settled,
        generalisation,
        held,
        certain,
        long,
    )
}

if __name__ == "__main__":
    accelerator = start_accelerator(FAST.batch_size)
    parts.make(__doc__, PARTS, RESULTS)
