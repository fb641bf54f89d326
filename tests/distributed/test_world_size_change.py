"""A run that is continued on another number of processes follows the path of one that never was stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLLOW = Path(__file__).parent / "follow.py"
BEFORE, AFTER = 10, 20  # steps
TOLERANCE = 1e-9  # norm of difference over norm, float64
CASES = {
    "lstm fast": {"batch_size": 16, "length": 12, "steps": BEFORE + AFTER},
    "gan fast": {"batch_size": 8, "dataset": "fake", "steps": BEFORE + AFTER},
}


@pytest.fixture(scope="module", params=CASES)
def stopped(request, launch, tmp_path_factory):
    """A function that takes a run to a step on so many processes, and the run where two left it."""
    folder = tmp_path_factory.mktemp("runs")
    case, settings = request.param, json.dumps(CASES[request.param])

    def follow(run: Path, processes: int, steps: int) -> dict[str, torch.Tensor]:
        out = run.with_suffix(".safetensors")
        command = (FOLLOW, *case.split(), out, "--settings", settings, "--steps", steps, "--folder", run)
        launch(*command, launcher="torchrun", options=("--nproc_per_node", str(processes)))
        trainer = json.loads((run / "checkpoints" / f"{steps:09d}" / "trainer.json").read_text())
        assert trainer["world_size"] == processes
        return load_file(out)

    follow(folder / "stopped", processes=2, steps=BEFORE)
    return follow, folder / "stopped"


@pytest.fixture(scope="module")
def uninterrupted(stopped):
    follow, run = stopped
    return follow(run.with_name("uninterrupted"), processes=2, steps=BEFORE + AFTER)


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_it_stays_on_the_path(stopped, uninterrupted, processes):
    follow, run = stopped
    continued = run.with_name(f"on-{processes}")
    shutil.copytree(run, continued)
    before = load_file(run.with_suffix(".safetensors"))
    after = follow(continued, processes, steps=BEFORE + AFTER)
    assert after.keys() == uninterrupted.keys()
    for name, tensor in uninterrupted.items():
        difference, size = (after[name] - tensor).double().norm(), tensor.double().norm()
        assert difference <= TOLERANCE * size, f"{name}: {difference / size:.1e}"
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert len(moved) > len(after) / 2
