"""A task that says it is done ends its run as the last step would, and it stays done."""

import pytest
from chaos import content_of
from launched import metrics, newest_checkpoint, status

from cs324dist.runs.history import step_of

STOPPING = ("tests/training/stopping.py",)


@pytest.fixture(scope="module")
def done(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("done") / "run"
    return run, launch(*STOPPING, "--run-dir", run).stderr


def test_it_ends_after_the_evaluation_that_says_so_with_a_checkpoint(done):
    run, said = done
    assert f"{run}: finished after 40 steps" in said
    assert status(run) == {"state": "finished", "step": 40, "why": ""}
    assert step_of(newest_checkpoint(run)) == 40
    assert [row["eval/score"] for row in metrics(run) if "eval/score" in row] == [3, 5, 4, 4.5]


def test_it_is_not_taken_up_again_by_the_same_command_or_more_steps(launch, done):
    run, _ = done
    before = content_of(run)
    for more in ([], ["--steps", "600"]):
        said = launch(*STOPPING, *more, "--run-dir", run).stderr
        assert f"{run} is finished, 40 steps: its task is done" in said
    assert content_of(run) == before
