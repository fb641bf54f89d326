import json
import os
import time
from pathlib import Path

import pytest
from made_runs import HOSTILE, make_gan, make_lstm

from cs324dist.errors import UserError
from cs324dist.report.reading import LONGEST, plain, read_run, read_runs
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
        ("ü" * 1000, "ü" * LONGEST + "…"),
    ],
)
def test_any_value_is_one_printable_line(value: object, text: str) -> None:
    assert plain(value) == text


def test_what_is_deeply_nested_is_left_out() -> None:
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert plain(value) == "…"


def test_a_run_is_read(runs: Path) -> None:
    run = read_run(runs / "gan-fast-0", "gan-fast-0")
    assert (run.task, run.state, run.step, run.steps, run.processes) == ("gan", "finished", 400, 400, 2)
    assert list(run.series("eval/frechet_distance").items()) == [
        (100, 50),
        (200, 25),
        (300, 5000 / 300),
        (400, 12.5),
    ]
    assert list(run.samples) == [100, 200, 300, 400]
    assert run.problems == []


def test_of_many_starts_the_last_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    run = make_lstm(tmp_path / "run")
    for number in range(2, 151):
        (run / "owners" / f"{number}.json").write_text(json.dumps({"host": f"node{number}"}))
    read = read_run(run, "run")
    assert (read.started, len(read.starts)) == (150, 100)
    assert read.starts[-1].where.startswith("node150")


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A folder from a stranger may hold a link to a file of the reader's."""
    run, mine = make_gan(tmp_path / "run"), tmp_path / "mine"
    for name in ("samples/000000100.png", "metrics.jsonl", "status.json"):
        (run / name).rename(mine)
        (run / name).symlink_to(mine)
        mine = mine.with_name(mine.name + "'")
    read = read_run(run, "run")
    assert list(read.samples) == [200, 300, 400]
    assert read.metrics == {}
    assert read.problems == [f"{run}/status.json is not a file"]


def test_what_is_no_number_is_a_gap(runs: Path) -> None:
    run = read_run(runs / HOSTILE, "damaged")
    assert list(run.series("train/loss").items())[-3:] == [
        (300, pytest.approx(0.1145, abs=1e-3)),
        (320, None),
        (330, 0.01),
    ]
    assert run.series("train/accuracy")[320] is None
    assert run.last("train/accuracy") == 1
    assert run.steps is None
    assert [start.where[:9] for start in run.starts[1:]] == ['{"a": "<b', "?, proces"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step": 1}', '{"state": 3, "step": "x"}', '{"settings": 7}']
)
@pytest.mark.parametrize("name", ["config.json", "status.json", "checkpoints/000000400/trainer.json"])
def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path, name: str, content: str) -> None:
    run_dir = make_gan(tmp_path / "run")
    (run_dir / name).write_text(content)
    run = read_run(run_dir, "run")
    assert len(run.samples) == 4
    assert [name in problem for problem in run.problems] == ([True] if len(content) < 3 else [])


def test_while_it_runs_the_metrics_say_how_far_it_is(tmp_path: Path) -> None:
    run = read_run(make_lstm(tmp_path / "run", state="running"), "run")
    assert (run.step, run.reached) == (300, 300)
    status = tmp_path / "run" / "status.json"
    status.write_text(json.dumps({"state": "running", "step": 100}))
    assert read_run(tmp_path / "run", "run").reached == 300
    status.write_text(json.dumps({"state": "failed", "step": 100}))
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
    assert others == [f"{runs} is no run", f"{runs / 'absent'} is no run"]


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
    folder = RunDir(tmp_path / "new")
    folder.open("lstm", {})
    folder.release()
    run = read_run(tmp_path / "new", "new")
    assert (run.state, run.step, run.metrics, run.samples, run.processes) == ("not started", 0, {}, {}, None)
