"""What a loop of one's own logs: which checkpoint is the best, when it stops early, how far it is."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cs324dist import Run, UserError
from cs324dist.audit import audit
from cs324dist.report.provenance import command
from cs324dist.report.reading import read_run

ACCURACY = {7: 0.5, 14: 0.9, 20: 0.9}  # after these steps


def run_of(folder: Path, **options: object) -> Run:
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    options = {"accelerator": Accelerator(cpu=True), **options}
    return Run(folder, networks={"net": net}, optimizers={"net": optimizer}, **options)


def loop(run: Run, until: int = 20) -> list[list[float]]:
    """Log the accuracies; returns what had been logged by then."""
    found = []
    with run:
        for step in run.steps(until, save_every=10):
            if step + 1 in ACCURACY:
                run.log(accuracy=ACCURACY[step + 1])
                found.append(run.logged("accuracy"))
    return found


@pytest.mark.parametrize(
    ("keep_best", "said"),
    [
        (
            "accuracy",
            "finished after 20 steps; the best accuracy, 0.9, is that of {}/checkpoints/000000014-1",
        ),
        (
            "accuracy:min",
            "finished after 20 steps; the best accuracy, 0.5, is that of {}/checkpoints/000000007-1",
        ),
        ("acuracy", "finished after 20 steps; no checkpoint has a value of acuracy (keep_best)"),
    ],
)
def test_each_step_that_logs_the_metric_is_saved_and_the_first_of_the_best_stays(
    tmp_path, capsys, keep_best, said
):
    loop(run_of(tmp_path / "run", keep_best=keep_best, keep_last=1))
    assert said.format(tmp_path / "run") in capsys.readouterr().err


LOGS_ON_ONE_RANK = """
import sys, torch
from cs324dist import ExactGradients, Run
exact = ExactGradients(4)
net = exact.prepare(torch.nn.Linear(2, 1))
run = Run(sys.argv[1], networks={"net": net}, optimizers={}, keep_best="accuracy")
with run:
    for step in run.steps(4, save_every=4):
        if step == 1 and run.accelerator.is_main_process:
            run.log(accuracy=0.5)
"""


def test_it_is_saved_if_one_rank_alone_logs_it(launch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LOGS_ON_ONE_RANK)
    done = launch(script, tmp_path / "run", processes=3)
    assert f"the best accuracy, 0.5, is that of {tmp_path}/run/checkpoints/000000002-1" in done.stderr


def test_what_was_logged_is_known_to_a_run_that_goes_on_too(tmp_path):
    assert loop(run_of(tmp_path / "run"), 10) == [[0.5]]
    assert loop(run_of(tmp_path / "run")) == [[0.5, 0.9], [0.5, 0.9, 0.9]]
    assert run_of(tmp_path / "run").logged("another") == []


def test_another_word_for_wandb_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^wandb='disable' is not allowed: give one of online, offline, disabled$"
    ):
        run_of(tmp_path / "run", wandb="disable")


def test_the_command_that_repeats_it_has_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["classify.py", "--patience", "1", "--out", "a b"])
    loop(run_of(tmp_path / "run"))
    assert command(read_run(tmp_path / "run", "run")).endswith("python classify.py --patience 1 --out 'a b'")


def test_it_cannot_be_audited_and_a_line_says_what_tests_it(tmp_path):
    loop(run_of(tmp_path / "run"))
    with pytest.raises(UserError, match=r"is of a loop of your own.*assert_same_when_killed tests it$"):
        audit(tmp_path / "run", None, from_start=False)


def test_a_loop_may_have_two_phases(tmp_path, capsys):
    def train(folder: Path, fails_at: int | None = None) -> tuple[list[int], str]:
        run, steps = run_of(folder), []
        with run:
            for until in (4, 8):
                for step in run.steps(until, save_every=2):
                    if step == fails_at:
                        raise RuntimeError("in the second phase")
                    run.log(value=float(step))
                    steps.append(step)
        return steps, capsys.readouterr().err

    assert train(tmp_path / "whole")[0] == [*range(8)]
    with pytest.raises(RuntimeError, match="in the second phase"):
        train(tmp_path / "run", fails_at=7)
    assert "step 7/8 " in capsys.readouterr().err
    steps, said = train(tmp_path / "run")
    assert steps == [6, 7]
    assert "is finished" not in said
    assert "is finished, 8 steps: for more," in train(tmp_path / "run")[1]
