"""Learning rate schedules: the factor on the learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]
Schedule = Callable[[int, int], float]


def constant(step: int, steps: int) -> float:
    """Always 1."""
    return 1.0


def linear(step: int, steps: int) -> float:
    """From 1 at step 0 down to 0 at `steps`."""
    return 1 - step / steps


def cosine(step: int, steps: int) -> float:
    """From 1 at step 0 down to 0 at `steps`, along half a cosine (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def wsd(step: int, steps: int) -> float:
    """1 over the first half, then down to 0 at `steps`: warmup, stable, decay (Hu et al. 2024)."""
    return min(1.0, 2 * (1 - step / steps))


SCHEDULES: dict[ScheduleName, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}


def learning_rate_factor(schedule: ScheduleName, step: int, steps: int, warmup_steps: int = 0) -> float:
    """The factor at `step`, counted from 0, of `steps`: a linear warm-up, then the schedule over the rest."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return SCHEDULES[schedule](step - warmup_steps, max(steps - warmup_steps, 1))
