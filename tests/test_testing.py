"""What a user's test calls fails where a promise is broken, and says in what."""

import pytest

from cs324dist.testing import assert_same_on, assert_same_when_killed

TASK = """
import os, sys, torch
from cs324dist import Config, Evaluation, Task, UserError, main
class Mine(Task):
    name = "mine"
    presets = {"fast": Config(steps=400, batch_size=6, log_every=1, checkpoint_every=20)}
    def __init__(self, config, device):
        super().__init__(config, device)
        self.networks = {"model": torch.nn.Linear(1, 1, bias=False)}
        self.optimizers = {"model": torch.optim.SGD(self.networks["model"].parameters(), 1e-3)}
        torch.nn.init.ones_(self.networks["model"].weight)
    def loss(self, batch):
        loss = self.networks["model"](torch.ones(1, 1)).sum() * FACTOR
        return loss, {"loss": loss}
def refused():
    raise UserError("this one is broken")
main(Mine, None)
"""
FACTORS = {
    "honest": "(1 + batch.index)",
    "by world size": "(1 + int(os.environ.get('WORLD_SIZE', 1)))",
    "by process": "(os.getpid() % 9973)",
    "broken on a rank": "(refused() if os.environ.get('RANK') == '1' else 1)",
}


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("CS324DIST_THREADS", "1")

    def written(factor):
        script = tmp_path / "my_task.py"
        script.write_text(TASK.replace("FACTOR", FACTORS[factor]))
        return (script, "--micro-batches", "3", "--steps", "40")

    return written


@pytest.mark.slow
def test_a_task_that_depends_on_the_number_of_processes_is_found_out(task, tmp_path):
    assert_same_on(1, 3, command=task("honest"), folder=tmp_path / "honest")
    with pytest.raises(AssertionError, match=r"differ in model/model.safetensors, line 1 of metrics.jsonl"):
        assert_same_on(1, 3, command=task("by world size"), folder=tmp_path / "not")


@pytest.mark.slow
def test_a_task_that_cannot_be_continued_is_found_out(task, tmp_path):
    steps = ("--steps", "400")
    assert_same_when_killed((*task("honest"), *steps), tmp_path / "honest")
    with pytest.raises(AssertionError, match=r"differ in .*metrics.jsonl"):
        assert_same_when_killed((*task("by process"), *steps), tmp_path / "not")


def test_a_run_that_fails_or_is_too_short_says_so(task, tmp_path):
    with pytest.raises(AssertionError, match="--steps 0 is not allowed"):
        assert_same_on(1, 3, command=(*task("honest"), "--steps", "0"), folder=tmp_path / "a")
    with pytest.raises(AssertionError, match="it ended before it could be killed"):
        assert_same_when_killed((*task("honest"), "--steps", "1"), tmp_path / "b")
    with pytest.raises(AssertionError, match="error on rank 1: this one is broken") as failed:
        assert_same_on(3, 1, command=task("broken on a rank"), folder=tmp_path / "c")
    lines = str(failed.value).removeprefix("it failed: ").splitlines()
    assert all(line.startswith("error on rank ") for line in lines), lines
