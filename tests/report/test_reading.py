import os
import time
from pathlib import Path

import pytest
from made_runs import ENDS_SCRIPT, HOSTILE, add_owner, edit, make_gan, make_lstm, started

from cs324dist.errors import UserError
from cs324dist.report.reading import plain, read_run, read_runs
from cs324dist.runs.environment import environment
from cs324dist.runs.records import LOOP, RunRecord
from cs324dist.runs.run_dir import RunDir


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two words", "two words"),
        ("two\nlines", "two; lines"),
        ("\x00\u202eback\ud800", "��back�"),
        (0.1, "0.1"),
        (None, "null"),
        ({"a": [1]}, '{"a": [1]}'),
    ],
)
def test_any_value_is_one_printable_line(value: object, text: str) -> None:
    assert plain(value) == text


def test_a_run_is_read(runs: Path) -> None:
    run = read_run(runs / "gan-fast-0", "gan-fast-0")
    assert (run.task, run.state, run.step, run.steps, run.processes) == ("gan", "finished", 400, 400, 2)
    assert run.series("eval/frechet_distance") == {100: 50, 200: 25, 300: 5000 / 300, 400: 12.5}
    assert list(run.samples) == [100, 200, 300, 400]
    assert run.problems == []


def test_a_start_replaces_what_later_steps_were_started_by(tmp_path: Path) -> None:
    run = make_lstm(tmp_path / "run")
    for number, step, processes in ((2, 100, 3), (3, 200, 2), (4, 100, 4), (5, None, 9), (6, 150, 1)):
        add_owner(run, number, from_step=step, environment={"processes": processes})
    assert read_run(run, "run").starts == {0: 1, 100: 4, 150: 1}


def test_the_environment_is_that_of_the_last_owner_that_has_one(tmp_path: Path) -> None:
    run = make_lstm(tmp_path / "run")
    add_owner(run, 2, environment={"threads": 77})
    add_owner(run, 3, environment=None)  # killed before it began
    (run / "owners" / "4.json").write_text("{")
    read = read_run(run, "run")
    assert (read.environment.threads, read.processes) == (77, 1)
    assert list(read.owners) == [1, 2, 3]
    assert [problem.split()[0] for problem in read.problems] == [f"{run}/owners/4.json"]


@pytest.mark.parametrize(
    "changes", [{"from_step": -1}, {"lost_steps": "x"}, {"seconds_since_previous": -3}, {"new": 1}]
)
def test_an_owner_that_nobody_writes_so_is_a_problem(tmp_path: Path, changes: dict[str, object]) -> None:
    run = make_lstm(tmp_path / "run")
    edit(run / "owners" / "1.json", **changes)
    read = read_run(run, "run")
    assert (read.owners, read.environment) == ({}, None)
    assert [f"{run}/owners/1.json" in problem for problem in read.problems] == [True]


def test_what_is_no_number_is_a_gap(runs: Path) -> None:
    run = read_run(runs / HOSTILE, "damaged")
    assert list(run.series("train/loss").items())[-4:] == [
        (300, pytest.approx(0.1145, abs=1e-3)),
        (310, None),
        (320, None),
        (330, 0.01),
    ]
    assert [run.series("train/accuracy")[step] for step in (310, 320)] == [None, None]
    assert run.last("train/accuracy") == 1


def test_of_a_damaged_run_the_rest_is_read(runs: Path) -> None:
    run = read_run(runs / HOSTILE, "damaged")
    assert (run.task, run.state, run.setting("length")) == ("lstm", "failed", "7")
    assert (run.options, run.steps) == (None, None)
    assert list(run.owners) == [1]
    assert ENDS_SCRIPT in run.owners[1].environment.packages
    for file, problem in zip(("config.json", "owners/2.json", "owners/3.json"), run.problems, strict=True):
        assert problem.startswith(f"{runs / HOSTILE / file}")
        assert problem == plain(problem)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"step": 1}', '{"state": 3, "step": "x"}', '{"config": 7}',
     '{"state": "odd", "step": 1}', "a folder"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "status.json", "checkpoints/000000400-1/trainer.json"])
def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path, name: str, content: str) -> None:
    run_dir = make_gan(tmp_path / "run")
    if content == "a folder":
        (run_dir / name).unlink()
        (run_dir / name).mkdir()
    else:
        (run_dir / name).write_text(content)
    run = read_run(run_dir, "run")
    assert len(run.samples) == 4
    assert [name in problem for problem in run.problems] == [True]


@pytest.mark.parametrize("why", [r'"\ud800"', "[" * 500 + "]" * 500], ids=["surrogate", "nested"])
def test_what_is_json_to_python_alone_is_a_problem(tmp_path: Path, why: str) -> None:
    path = make_lstm(tmp_path / "run")
    (path / "status.json").write_text(f'{{"state": "failed", "step": 1, "why": {why}}}')
    (problem,) = read_run(path, "run").problems
    assert problem == f"{path}/status.json is damaged, or not a file of this project"


def test_the_processes_are_those_of_the_newest_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    path = make_gan(tmp_path / "run")
    for owner in (path / "owners").glob("*.json"):
        owner.unlink()
    (path / "checkpoints" / "000000500-1").mkdir()
    run = read_run(path, "run")
    assert run.processes == 2
    assert ["000000500-1/trainer.json" in problem for problem in run.problems] == [True]


def test_while_it_runs_the_metrics_say_how_far_it_is(tmp_path: Path) -> None:
    run = read_run(make_lstm(tmp_path / "run", state="running"), "run")
    assert (run.step, run.reached) == (300, 300)
    status = tmp_path / "run" / "status.json"
    edit(status, step=100)
    assert read_run(tmp_path / "run", "run").reached == 300
    edit(status, state="failed")
    assert read_run(tmp_path / "run", "run").reached == 100


def test_a_running_run_that_is_silent_is_noticed(tmp_path: Path) -> None:
    make_lstm(tmp_path / "run", state="running")
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "run" / "owners" / "1.json", (hour_ago, hour_ago))
    assert read_run(tmp_path / "run", "run").silent_for == pytest.approx(3600, rel=0.1)


def test_each_run_is_read_once_and_the_rest_is_named(runs: Path) -> None:
    gan = runs / "gan-fast-0"
    found, others = read_runs((gan, runs, gan / "samples" / "..", runs / "absent", runs / "lstm-length5"))
    assert [run.name for run in found] == ["gan-fast-0", "lstm-length5"]
    assert others == [f"{runs} is not a run folder", f"{runs / 'absent'} is not a run folder"]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = tuple(make_lstm(tmp_path / user / "lstm", steps=10) for user in "ab")
    assert [run.name for run in read_runs(paths)[0]] == [str(path) for path in paths]


@pytest.mark.parametrize("paths", [(), ("absent",), ("absent", "x" * 5000)])
def test_no_run_at_all_is_refused(tmp_path: Path, paths: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="give run folders") as refusal:
        read_runs(tuple(tmp_path / path for path in paths))
    assert len(refusal.value.lines) == 1


def test_a_run_whose_status_is_damaged_is_as_far_as_its_metrics(tmp_path: Path) -> None:
    path = make_lstm(tmp_path / "run")
    (path / "status.json").write_text("{")
    run = read_run(path, "run")
    assert (run.state, run.reached) == ("unclear", 300)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    with started(tmp_path / "new", "lstm", "fast"):
        pass
    (tmp_path / "new" / "status.json").unlink()
    edit(tmp_path / "new" / "owners" / "1.json", environment=None)
    run = read_run(tmp_path / "new", "new")
    assert (run.state, run.step, run.metrics, run.samples, run.processes) == ("not started", 0, {}, {}, None)
    assert run.problems == []


def test_a_loop_of_ones_own_has_settings_of_its_own(tmp_path):
    """Names that options of a task have, with values that those could not have."""
    config = {"steps": "many", "seed": None, "schedule": "one of mine"}
    run = RunDir(tmp_path / "run")
    with run.claimed(lambda: None, lambda work: work()):
        run.start(RunRecord(LOOP, "mine.py", config, {}), environment(commit=False), 0, 0)
        run.append_metrics(3, {"loss": 0.5})
    found = read_run(tmp_path / "run", "mine")
    assert (found.steps, found.problems, found.series("loss")) == (None, [], {3: 0.5})
    assert found.state_shown == "running"
