"""The run folder: whose it is, where it stands, and what is left of it after a crash."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cs324dist.errors import UserError
from cs324dist.models.rnn import RNN
from cs324dist.runs import run_dir as run_dir_module
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.files import read_json
from cs324dist.runs.run_dir import RunDir

SETTINGS = {"seed": 0, "steps": 30}


@pytest.fixture(autouse=True)
def machine(monkeypatch) -> dict[str, object]:
    """What runs are made by; a test may change it."""
    environment = {"commit": "abc", "packages": {"torch": "2.9.0"}, "threads": 4}
    monkeypatch.setattr(run_dir_module, "environment", lambda: dict(environment))
    return environment


@pytest.fixture
def run(tmp_path) -> Iterator[RunDir]:
    run = RunDir(tmp_path / "run")
    run.open("gan", SETTINGS)
    yield run
    run.release()


def save(run: RunDir, step: int) -> Path:
    write_checkpoint(run.checkpoint(step), {"rnn": RNN(1, 1, 1)}, {"m": torch.ones(3)}, TrainerState(step, 1))
    return run.checkpoint(step)


def damage(checkpoint: Path) -> Path:
    path = checkpoint / "optimizers.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def no_conflicts(stored: object) -> list[str]:
    return []


class TestCheckpoints:
    def test_without_any_there_is_no_newest(self, run):
        assert run.newest_checkpoint() is None
        assert run.newest_step() == 0

    def test_the_newest_is_taken_and_nothing_is_said(self, run, capsys):
        for step in (20, 100):
            save(run, step)
        assert run.newest_checkpoint() == run.path / "checkpoints" / "000000100"
        assert run.newest_step() == 100
        assert capsys.readouterr().err == ""

    def test_a_damaged_one_is_named_and_moved_aside_and_the_one_before_is_taken(self, run, capsys):
        before, damaged = save(run, 10), damage(save(run, 20))
        content = damaged.read_bytes()
        assert run.newest_checkpoint() == before
        run.set_damaged_aside()
        (line,) = capsys.readouterr().err.splitlines()
        aside = run.checkpoints / "damaged-000000020"
        assert line.startswith(f"warning: {damaged} is damaged")
        assert str(aside) in line
        assert (aside / damaged.name).read_bytes() == content
        assert run.newest_step() == 10

    def test_where_all_are_damaged_the_run_is_refused_and_nothing_is_touched(self, run):
        damaged = [damage(save(run, step)) for step in (20, 10)]
        with pytest.raises(UserError) as caught:
            run.newest_checkpoint()
        *each, last = caught.value.lines
        assert [line.partition(" is damaged")[0] for line in each] == list(map(str, damaged))
        assert f"no checkpoint of {run} can be used" in last
        assert {p.name for p in run.checkpoints.iterdir()} == {"000000010", "000000020"}

    def test_a_step_may_be_damaged_again_after_it_was_taken_again(self, run):
        before = save(run, 10)
        for _ in range(2):
            damage(save(run, 20))
            assert run.newest_checkpoint() == before
            run.set_damaged_aside()


class TestMetrics:
    def test_lines_are_read_back_in_order(self, run):
        run.append_metrics(1, {"train/loss": 2.5})
        run.append_metrics(2, {"train/loss": 0.1, "eval/accuracy": 1.0})
        assert run.read_metrics() == [
            {"step": 1, "train/loss": 2.5},
            {"step": 2, "train/loss": 0.1, "eval/accuracy": 1.0},
        ]

    def test_what_is_not_finite_is_written_as_null_which_every_reader_takes(self, run):
        run.append_metrics(3, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
        (line,) = (run.path / "metrics.jsonl").read_text().splitlines()

        def no_json(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        parsed = json.loads(line, parse_constant=no_json)
        assert parsed == {"step": 3, "a": None, "b": None, "c": None, "d": 0.5}
        assert run.read_metrics() == [parsed]

    def test_a_line_cut_anywhere_is_passed_over_and_its_step_is_taken_again(self, run):
        path = run.path / "metrics.jsonl"
        for step in (1, 2, 3):
            run.append_metrics(step, {"train/loss": step / 8})
        whole = path.read_bytes()
        last = len(whole.splitlines(keepends=True)[-1])
        for missing in range(2, last + 1):  # 1: only the end of the line is missing, all of it can be read
            path.write_bytes(whole[:-missing])
            assert [row["step"] for row in run.read_metrics()] == [1, 2]
            run.rewind(2, 2)
            run.append_metrics(3, {"train/loss": 3 / 8})
            assert path.read_bytes() == whole

    @pytest.mark.parametrize("line", ["[1]", '"x"', "{}", '{"step": "2"}', "[" * 100_000, "\x00\x00"])
    def test_a_line_that_is_no_row_is_passed_over(self, run, line):
        (run.path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        assert run.read_metrics() == [{"step": 1}, {"step": 3}]

    def test_going_back_drops_what_lies_past_the_checkpoint_and_says_running(self, run):
        for step in (5, 10, 15, 20):
            run.append_metrics(step, {"loss": 1.0})
        run.write_status("failed", 10, "no power")
        run.rewind(10, 2)
        assert [row["step"] for row in run.read_metrics()] == [5, 10]
        assert read_json(run.path / "status.json") == {"state": "running", "step": 10, "why": ""}

    def test_going_back_writes_down_what_it_costs(self, run):
        for step in (5, 10, 15, 20):
            run.append_metrics(step, {"loss": 1.0})
        run.release()
        first = run.path / "owners" / "1.json"
        last_sign = first.stat().st_mtime - 60
        os.utime(first, (last_sign, last_sign))
        again = RunDir(run.path)
        again.open("lstm", {})
        again.rewind(10, 2)
        again.release()
        facts = read_json(run.path / "owners" / "2.json")
        assert (facts["from_step"], facts["lost_steps"]) == (10, 10)
        assert 60 <= facts["seconds_since_previous"] < 3600
        assert "seconds_since_previous" not in read_json(first)

    def test_going_back_works_before_the_first_line(self, run):
        run.rewind(0, 0)
        assert run.read_metrics() == []


class TestWhoseFolder:
    def test_a_new_and_an_empty_folder_fit(self, tmp_path):
        RunDir(tmp_path / "new").check_fits("gan", no_conflicts)
        RunDir(tmp_path).check_fits("gan", no_conflicts)
        assert list(tmp_path.iterdir()) == []

    def test_a_run_fits_its_own_task_and_is_compared_by_its_settings(self, run):
        compared = []
        run.check_fits("gan", lambda stored: compared.append(stored) or [])
        assert compared == [SETTINGS]

    def test_another_task_is_named(self, run):
        with pytest.raises(UserError, match="holds a run of 'gan'"):
            run.check_fits("lstm", no_conflicts)

    def test_conflicts_are_passed_on_line_by_line(self, run):
        with pytest.raises(UserError) as caught:
            run.check_fits("gan", lambda stored: ["--a is wrong", "--b is wrong"])
        assert caught.value.lines == ("--a is wrong", "--b is wrong")

    def test_a_folder_of_other_things_and_a_file_are_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        for path in (tmp_path, tmp_path / "thesis.tex"):
            with pytest.raises(UserError) as caught:
                RunDir(path).check_fits("gan", no_conflicts)
            assert f"--run-dir {path} holds something that is no run" in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize("config", ["", "{}", '{"task": "gan", "settings": 3}', "[]"])
    def test_a_damaged_config_is_refused(self, tmp_path, config):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError) as caught:
            RunDir(tmp_path).check_fits("gan", no_conflicts)
        assert str(tmp_path / "config.json") in str(caught.value)

    def test_a_folder_below_a_file_cannot_be_opened(self, tmp_path):
        (tmp_path / "file").touch()
        run = RunDir(tmp_path / "file" / "run")
        run.check_fits("gan", no_conflicts)
        with pytest.raises(UserError, match=r"--run-dir .*file/run cannot be written to"):
            run.open("gan", SETTINGS)


class TestOpening:
    def test_the_config_says_what_is_run_and_by_what(self, run, machine):
        config = run.read_config()
        assert config["task"] == "gan"
        assert config["settings"] == SETTINGS
        assert config["environment"] == {**machine, "precision": "no"}

    def test_the_same_machine_and_versions_go_on_without_a_warning(self, run, capsys):
        tracker = run.read_config()["tracker_run_id"]
        run.open("gan", {**SETTINGS, "steps": 60})
        assert capsys.readouterr().err == ""
        assert run.read_config()["tracker_run_id"] == tracker
        assert run.read_config()["settings"]["steps"] == 60

    def test_what_may_change_bits_is_warned_of_with_old_and_new_value(self, run, machine, capsys):
        machine.update(commit="def", packages={"torch": "3.0.0"})
        run.open("gan", SETTINGS)
        commit, packages = capsys.readouterr().err.splitlines()
        assert commit.startswith("warning:")
        assert "commit abc, now def" in commit
        assert "2.9.0" in packages
        assert "3.0.0" in packages
        run.open("gan", SETTINGS)
        assert capsys.readouterr().err == ""  # it is what the run is made by from here on

    def test_two_runs_have_trackers_of_their_own(self, run, tmp_path):
        other = RunDir(tmp_path / "other")
        other.open("gan", SETTINGS)
        assert other.read_config()["tracker_run_id"] != run.read_config()["tracker_run_id"]


def test_the_status_says_where_the_run_stands(run):
    run.write_status("stopped", 12, "a signal asked for it")
    assert json.loads((run.path / "status.json").read_text()) == {
        "state": "stopped",
        "step": 12,
        "why": "a signal asked for it",
    }


def test_a_checkpoint_that_cannot_be_deleted_does_not_keep_a_run_from_being_finished(
    run, monkeypatch, capsys
):
    """Somebody reads it over a network file system, perhaps."""
    for step in (10, 20):
        save(run, step)

    def busy(self: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    monkeypatch.setattr(Path, "rename", busy)
    run.finish(20, keep_last=1)
    assert read_json(run.path / "status.json")["state"] == "finished"
    said = capsys.readouterr().err
    assert said.startswith("warning: an old checkpoint stays for now")
    assert str(run.checkpoint(10)) in said
