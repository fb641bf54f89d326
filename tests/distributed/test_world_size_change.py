"""A run that is continued on another number of processes follows the path of one that never was stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launched import newest_checkpoint
from paths import assert_same_path, command, weights_in

from cs324dist.runs.history import step_of

BEFORE, AFTER = 10, 20  # steps
EVERY = {"steps": BEFORE + AFTER, "checkpoint_every": BEFORE}
CASES = {
    "lstm fast": {"batch_size": 16, "length": 12, **EVERY},
    "gan fast": {"batch_size": 8, "dataset": "fake", **EVERY},
}


@pytest.fixture(scope="module", params=CASES)
def train(request, launch):

    def train(run: Path, processes: int) -> None:
        launch(*command(request.param, CASES[request.param], run), processes=processes)
        assert json.loads((newest_checkpoint(run) / "trainer.json").read_text())["processes"] == processes

    return train


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    train(run, processes=2)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_it_stays_on_the_path(train, uninterrupted, tmp_path, processes):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for checkpoint in (run / "checkpoints").iterdir():
        if step_of(checkpoint) > BEFORE:
            shutil.rmtree(checkpoint)
    before = weights_in(newest_checkpoint(run))
    train(run, processes)
    after = weights_in(newest_checkpoint(run))
    assert_same_path(after, weights_in(newest_checkpoint(uninterrupted)))
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert len(moved) > len(after) / 2
