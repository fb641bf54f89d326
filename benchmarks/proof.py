"""The proof's results: how few cells and how coarse an arithmetic admit one, boxes over the steps, the guess.

    python benchmarks/proof.py           # everything: about three quarters of an hour on two cores
    python benchmarks/proof.py guessed   # some of it

Each part writes `benchmarks/results/lstm/PART.json`; `python benchmarks/results_page.py` then writes the
page and its picture from them and from `lstm_results.py proven`.
"""

import sys
import time
from functools import partial

import torch
from common import REPOSITORY, Row, on_each_core, run_parts, trainer_of
from lstm_results import UNSEEN, finished
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F

from cs324dist.tasks.lstm.networks import LSTM
from cs324dist.tasks.lstm.palindromes import palindromes

sys.path.append(str(REPOSITORY / "examples"))
from proven import FLOAT32, Arithmetic, first_states, next_states, prove

PROVEN = "examples/proven.py:ProvenTask"
LEARNERS = ((64, 24), (32, 24), (16, 24), (8, 24), (4, 24), (128, 8), (16, 8))  # cells and bits
SEEDS = 4
MOST = 3000  # steps of training
TRY_EVERY = 100  # steps
HOPEFUL = 0.1  # loss of the worst case below which a proof is looked for; a guess has log 10
SHOWN = 60  # steps of the picture
SHOWN_DIGITS = [0, 1]
GUESSES = ((10, 128, 32_000), (2, 128, 8_000), (10, 4, 400_000), (2, 4, 150_000), (2, 1, 400_000))
TRIALS = ((100, 10), (10_000, 50))  # sequences and their digits; the second if all of the first are right
LARGEST = (-1.0, 2.0)  # the weights of a draw are uniform in ±10^a, and a is uniform in this interval


def learn(cells: int, seed: int, bits: int) -> Row:
    """Train until every first digit is proven; then the fewest bits that the proof allows."""
    changes = {"hidden_size": cells, "seed": seed, "bits": bits, "steps": MOST}
    trainer, began = trainer_of(PROVEN, "fast", **changes), time.monotonic()
    margin, model = torch.tensor([-1.0]), trainer.task.model
    for step in range(1, MOST + 1):
        trainer.step(step - 1, is_logged=False)
        if step % TRY_EVERY == 0 and trainer.read_metrics()["train/worst_case"] < HOPEFUL:
            margin = prove(model, Arithmetic.of(bits))
            if (margin > 0).all():
                break
    seconds, fewest = round(time.monotonic() - began), bits if (margin > 0).all() else None
    while fewest and (prove(model, Arithmetic.of(fewest - 1)) > 0).all():
        fewest -= 1
    return {"cells": cells, "seed": seed, "bits": bits, "steps": step, "seconds": seconds,
            "proven": int((margin > 0).sum()), "margin": max(margin.min().item(), -1.0),  # JSON has no -inf
            "fewest_bits": fewest}  # fmt: skip


def learned(cells: int, bits: int) -> list[Row]:
    """Whether LSTMs of so many cells learn to be proven, in an arithmetic of so many bits."""
    return on_each_core(learn, [cells] * SEEDS, range(SEEDS), [bits] * SEEDS)


def boxes() -> list[Row]:
    """Of first digits 0 and 1, step by step: what one cell holds, and what its box allows.

    It is the cell that holds the two digits farthest apart in the end.
    """
    rows = []
    for task in ("lstm", PROVEN):
        model = finished(task).double()
        digits, first = palindromes(UNSEEN, torch.arange(500), SHOWN)
        state, held, box, allowed = None, [], first_states(model, FLOAT32), []
        for digit in digits:
            _, state = model.scan(digit[None], state)
            ends = [state[1][first == known].aminmax(dim=0) for known in SHOWN_DIGITS]
            held.append(torch.stack([torch.stack(end) for end in ends]))  # digit side cell
            allowed.append(torch.stack(box.c, dim=1)[SHOWN_DIGITS])
            box = box | next_states(model, box, FLOAT32)
        last = held[-1]
        cell = int(torch.maximum(last[0, 0] - last[1, 1], last[1, 0] - last[0, 1]).argmax())
        found, bounds = (torch.stack(some)[..., cell].tolist() for some in (held, allowed))
        rows.append({"boxes": task != "lstm", "cell": cell, "found": found, "bounds": bounds})
    return rows


def guess(classes: int, cells: int, draws: int) -> Row:
    """Draw weights at random; which draws answer every sequence with its first digit?"""
    model = LSTM(classes, cells, classes, kernel="equations").requires_grad_(False)
    generator, at_once = torch.Generator().manual_seed(0), max(4, 1000 // cells)
    few, many = (sequences(classes, *some) for some in TRIALS)
    best, latching, first, began = 0.0, 0, None, time.monotonic()
    for draw in range(0, draws, at_once):
        weights = drawn(model, at_once, generator)
        right = shares_right(model, weights, *few)
        best = max(best, right.max().item())
        for candidate in right.eq(1).nonzero()[:, 0].tolist():
            one = {name: weight[candidate : candidate + 1] for name, weight in weights.items()}
            if shares_right(model, one, *many).item() == 1:
                latching, first = latching + 1, first or draw + candidate + 1
    seconds = round(time.monotonic() - began)
    return {"classes": classes, "cells": cells, "draws": draw + at_once, "latching": latching, "first": first,
            "best": best, "seconds": seconds}  # fmt: skip


def guessed() -> list[Row]:
    """LSTMs whose weights are guessed: of so many classes and cells, so many draws. An hour of one core."""
    return on_each_core(guess, *zip(*GUESSES, strict=True))


def sequences(classes: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Palindromes of so many different digits."""
    digits, last = palindromes(UNSEEN, torch.arange(count), length)
    return F.one_hot(digits.long() % classes, classes).float(), last % classes


def drawn(model: LSTM, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """So many draws of a model's weights, each of a size of its own."""
    sizes = (10 ** torch.empty(count).uniform_(*LARGEST, generator=generator)).tolist()

    def weights_like(one: Tensor) -> Tensor:
        return torch.stack([torch.empty_like(one).uniform_(-s, s, generator=generator) for s in sizes])

    return {name: weights_like(one) for name, one in model.named_parameters()}


def shares_right(model: LSTM, weights: dict[str, Tensor], digits: Tensor, last: Tensor) -> Tensor:
    """Of several draws of a model's weights: the share of right answers."""
    logits = vmap(lambda one: functional_call(model, one, digits))(weights)
    return (logits.argmax(-1) == last).double().mean(-1)


if __name__ == "__main__":
    learners = {f"cells_{cells}_bits_{bits}": partial(learned, cells, bits) for cells, bits in LEARNERS}
    run_parts(__doc__, "lstm", boxes, guessed, **learners)
