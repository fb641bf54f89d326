"""--keep-best: the checkpoint with the best value of a metric stays, however old it is."""

import pytest
from launched import metrics, status

from cs324dist.runs.history import step_of

STOPPING = ("tests/training/stopping.py", "--patience", "9", "--keep-last", "1", "--steps", "50")
VALUES = (5, 3, 8, 8, 4)


def checkpoints(run) -> list[int]:
    return sorted(step_of(path) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("best", "kept"), [("eval/score", [30, 50]), ("eval/score:min", [20, 50])])
def test_the_best_checkpoint_is_kept_and_the_run_goes_on_from_the_newest(launch, tmp_path, best, kept):
    run = tmp_path / "run"
    values = tuple(map(str, VALUES))
    command = (*STOPPING, "--keep-best", best, "--run-dir", run, "--values", *values)
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
    done = launch(*STOPPING, "--keep-best", "score:min", "--run-dir", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --keep-best score is no metric of an evaluation: "
        "give a name that begins with eval/, such as eval/score\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_metric_that_is_not_measured_fails_the_run_after_a_checkpoint_which_another_name_continues(
    launch, tmp_path
):
    run = tmp_path / "run"
    command = (*STOPPING, "--run-dir", run, "--values", *map(str, VALUES), "--keep-best")
    wrong = "--keep-best eval/acuracy is no metric of an evaluation: give one of eval/score, eval/step"
    done = launch(*command, "eval/acuracy", check=False)
    assert done.returncode == 1
    said = f"{wrong}; the last good checkpoint is {run}/checkpoints/000000010-1"
    assert done.stderr.splitlines()[-1] == f"error: {said}"
    assert status(run) == {"state": "failed", "step": 10, "why": said}
    assert "continuing from step 10 of 50" in launch(*command, "eval/score").stderr
    assert checkpoints(run) == [30, 50]
