"""A task that says it is done ends its run and stays done; with --keep-best, the best checkpoint stays."""

import pytest
from chaos import content_of
from launched import metrics, newest_checkpoint, status

from cs324dist.runs.history import step_of

STOPPING = ("tests/training/stopping.py",)
KEEPING = (*STOPPING, "--patience", "9", "--keep-last", "1", "--steps", "50")
VALUES = (5, 3, 8, 8, 4)


@pytest.fixture(scope="module")
def done(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("done") / "run"
    return run, launch(*STOPPING, "--run-dir", run).stderr


def test_it_ends_after_the_evaluation_that_says_so_with_a_checkpoint(done):
    run, said = done
    assert f"{run}: finished after 40 of 60 steps" in said
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


def test_an_evaluation_that_a_signal_cuts_off_leaves_nothing_and_is_made_again(launch, done, tmp_path):
    run = tmp_path / "run"
    stopped = launch(*STOPPING, "--stopped-in", "20", "--run-dir", run, check=False)
    assert (stopped.returncode, step_of(newest_checkpoint(run))) == (75, 20)
    launch(*STOPPING, "--stopped-in", "0", "--run-dir", run)
    of_both = [[row for row in metrics(of) if "eval/largest" in row] for of in (run, done[0])]
    assert of_both[0] == of_both[1] != []


def checkpoints(run) -> list[int]:
    return sorted(step_of(path) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("best", "kept"), [("eval/score", [30, 50]), ("eval/score:min", [20, 50])])
def test_the_best_checkpoint_is_kept_and_the_run_goes_on_from_the_newest(launch, tmp_path, best, kept):
    run = tmp_path / "run"
    values = tuple(map(str, VALUES))
    command = (*KEEPING, "--keep-best", best, "--run-dir", run, "--values", *values)
    end = launch(*command).stderr.splitlines()[-1]
    assert checkpoints(run) == kept
    value = {30: 8, 20: 3}[kept[0]]
    named = f"the best eval/score, {value}, is that of {run}/checkpoints/0000000{kept[0]}-1"
    assert end == f"{run}: finished after 50 steps; {named}"
    assert {row["step"]: row["eval/score"] for row in metrics(run) if "eval/score" in row}[kept[0]] in (8, 3)
    said = launch(*command, "9" if best.endswith("score") else "1", "--steps", "60").stderr
    assert "continuing from step 50 of 60" in said
    assert checkpoints(run) == [60]


def test_a_name_that_no_metric_of_an_evaluation_has_is_refused_before_the_first_step(launch, tmp_path):
    done = launch(*KEEPING, "--keep-best", "score:min", "--run-dir", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --keep-best score is no metric of an evaluation: "
        "give a name that begins with eval/, such as eval/score\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_metric_that_is_not_measured_fails_the_run_and_another_name_continues_it(launch, tmp_path):
    run = tmp_path / "run"
    command = (*KEEPING, "--run-dir", run, "--values", *map(str, VALUES), "--keep-best")
    there = "eval/score, eval/step, eval/largest"
    wrong = f"--keep-best eval/acuracy is no metric of an evaluation: give one of {there}"
    done = launch(*command, "eval/acuracy", check=False)
    assert done.returncode == 1
    said = f"{wrong}; the last good checkpoint is {run}/checkpoints/000000010-1"
    assert done.stderr.splitlines()[-1] == f"error: {said}"
    assert status(run) == {"state": "failed", "step": 10, "why": said}
    assert "continuing from step 10 of 50" in launch(*command, "eval/score").stderr
    assert checkpoints(run) == [30, 50]
