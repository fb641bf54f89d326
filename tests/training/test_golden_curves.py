"""A change that should not alter results does not: the losses of a few steps at a fixed seed, in float64.

Where it should, `python tests/training/test_golden_curves.py` writes the curves again; say so in the commit.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

STORED = Path(__file__).with_name("golden_curves.json")
EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 8
FAKE = {"dataset": "fake", "batch_size": 8}
RECIPES = {
    "lstm, preset course": ("lstm", "course", {"length": 10}),
    "lstm, preset fast": ("lstm", "fast", {"length": 10}),
    "rnn": ("lstm", "course", {"length": 5, "model": "rnn"}),
    "gan, preset course": ("gan", "course", FAKE),
    "gan, preset fast": ("gan", "fast", {**FAKE, "steps": 2500}),
    "gan, preset fast without labels": ("gan", "fast", {**FAKE, "steps": 2500, "label_weight": 0.0}),
    "classifier": (f"{EXAMPLES}/classifier.py:ClassifierTask", "fast", FAKE),
}


def curves(recipe: str, **changed: str) -> dict[str, list[float]]:
    """Every metric of the first steps."""
    name, preset, changes = RECIPES[recipe]
    task_type = find_task(name)
    task = task_type(replace(task_type.presets[preset], **changes, **changed), torch.device("cpu"))
    for network in task.networks.values():
        network.double()  # the weights were drawn in float32
    trainer, rows = Trainer(task, Accelerator(cpu=True)), []
    torch.set_default_dtype(torch.float64)
    try:
        for step in range(STEPS):
            trainer.step(step, is_logged=False)  # without what is only measured
            rows.append(trainer.read_metrics())
    finally:
        torch.set_default_dtype(torch.float32)
    return {name: [row[name] for row in rows if name in row] for name in rows[0]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_losses_are_those_that_were_stored(recipe: str) -> None:
    assert_stored(curves(recipe), recipe)


def test_the_lstm_as_its_equations_learns_as_the_fused_one() -> None:
    assert_stored(curves("lstm, preset course", kernel="equations"), "lstm, preset course")


def assert_stored(found: dict[str, list[float]], recipe: str) -> None:
    expected = json.loads(STORED.read_text())[recipe]
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-12), name


if __name__ == "__main__":
    STORED.write_text(json.dumps({recipe: curves(recipe) for recipe in RECIPES}, indent=1) + "\n")
