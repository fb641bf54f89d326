"""What people write in tasks of their own ends in the same bits, or is refused in one line."""

from collections.abc import Iterator

import pytest
from entry import load
from harness import Keeper

ZOO = load()
SAMPLE = [
    "points",
    "image_classifier",
    "spectral_norm",
    "norm_in_branch",
    "labels_on_task_with_norm",
    "counter_in_module",
    "frozen_midway",
    "own_numpy_generator",
    "own_generator_in_optimizer",
    "gan",
    "parameter_hook",
    "rate_by_hand",
    "random_split",
    "mixup_in_collate",
    "draws_in_pieces",
    "counter_in_step",
]  # the others are slow
HABITS = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in ZOO]


@pytest.fixture(scope="module")
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.end()


@pytest.mark.parametrize("name", HABITS)
def test_it_is_equal_or_refused(keeper: Keeper, name: str) -> None:
    habit, found = ZOO[name], keeper.judge(name)
    if not habit.accepts(found):
        pytest.fail(f"{habit.task.__doc__}: {found}; expected: {habit.expected}", pytrace=False)
