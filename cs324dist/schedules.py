"""Learning rate schedules: the factor on the learning rate as a pure function of the step."""

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


def learning_rate_factor(schedule: ScheduleName, step: int, steps: int, warmup_steps: int = 0) -> float:
    """The factor at `step`, counted from 0, of `steps`: a linear warm-up, then the schedule over the rest."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    at, end = step - warmup_steps, max(steps - warmup_steps, 1)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - at / end
        case "cosine":  # half of one (Loshchilov and Hutter 2017)
            return 0.5 * (1 + math.cos(math.pi * at / end))
        case "wsd":  # 1 over the first half, then linear: warmup, stable, decay (Hu et al. 2024)
            return min(1.0, 2 * (1 - at / end))
