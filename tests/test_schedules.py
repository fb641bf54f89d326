"""Learning rates over the steps: those of torch's schedulers, and what the trainer makes of them."""

import warnings
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from cs324dist.config import Config, ScheduleName


def factors(schedule: str, steps: int, warmup_steps: int = 0) -> list[float]:
    config = Config(schedule=schedule, steps=steps, warmup_steps=warmup_steps)
    return [config.learning_rate_factor(step) for step in range(steps)]


def torchs(
    steps: int, *parts: tuple[type[LRScheduler], dict[str, float]], milestones: list[int]
) -> list[float]:
    """The learning rates that torch's schedulers, one after the other, make of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    found = []
    with warnings.catch_warnings():  # of torch about its own use of itself
        warnings.simplefilter("ignore")
        scheduler = SequentialLR(optimizer, [kind(optimizer, **how) for kind, how in parts], milestones)
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("steps", [6, 37])
def test_linear_and_cosine_are_torchs_after_a_warm_up_that_is_torchs(steps, warmup):
    rest = steps - warmup
    before = [(LinearLR, {"start_factor": 1 / (warmup + 1), "total_iters": warmup})] if warmup else []
    milestones = [warmup] if warmup else []
    line = (LinearLR, {"start_factor": 1.0, "end_factor": 0.0, "total_iters": rest})
    half_cosine = (CosineAnnealingLR, {"T_max": rest})
    for schedule, part in (("linear", line), ("cosine", half_cosine)):
        expected = torchs(steps, *before, part, milestones=milestones)
        assert factors(schedule, steps, warmup) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(
    schedule=st.sampled_from(get_args(ScheduleName)), steps=st.integers(1, 300), warmup=st.integers(0, 400)
)
def test_every_step_trains_and_only_the_warm_up_rises(schedule, steps, warmup):
    """Also where the warm-up is as long as the run, or longer."""
    found = factors(schedule, steps, warmup)
    assert all(0 < factor <= 1 for factor in found)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == 1
