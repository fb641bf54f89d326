"""The run folder: whose it is, where it stands, and what is left of it after a crash."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from launched import files_of, holding, refusal

from cs324dist.config import Config, as_json
from cs324dist.errors import UserError
from cs324dist.pictures import save_png
from cs324dist.runs import metrics_file
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.environment import Environment
from cs324dist.runs.files import read_json
from cs324dist.runs.lease import owner_of
from cs324dist.runs.records import RunRecord
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.lstm.networks import RNN

CONFIG = Config(seed=0, steps=30)
RECORD = RunRecord("gan", "launch/gan.py", as_json(CONFIG), {"steps": 2500})
HERE = Environment(
    python="3.11.7", packages={"torch": "2.9.0"}, commit="abc", device="a processor", cuda=None, threads=4,
    processes=1, precision="no", compiled=None,
)  # fmt: skip


def at_once(work: Callable[[], None]) -> None:
    """The main process does it; there is no other."""
    work()


def anything() -> None:
    """Whatever is in the folder fits."""


@contextmanager
def started(
    path: Path, record: RunRecord = RECORD, environment: Environment = HERE, step: int = 0, lines: int = 0
) -> Iterator[RunDir]:
    run = RunDir(path)
    with run.claimed(anything, at_once):
        run.start(record, environment, step, lines)
        yield run


@pytest.fixture
def run(tmp_path) -> Iterator[RunDir]:
    with started(tmp_path / "run") as run:
        yield run


def go_back(run: RunDir, step: int, lines: int) -> None:
    run.start(RECORD, HERE, step, lines)


def save(run: RunDir, step: int) -> Path:
    write_checkpoint(run.checkpoint(step), holding(rnn=RNN(1, 1, 1)), TrainerState(step))
    return run.checkpoint(step)


def damage(checkpoint: Path) -> Path:
    path = checkpoint / "optimizers.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


class TestCheckpoints:
    def test_a_damaged_one_is_named_and_moved_aside_and_the_one_before_is_taken(self, run, capsys):
        before = save(run, 10)
        for _ in range(2):  # it may be taken again, and damaged again
            damaged = damage(save(run, 20))
            content = damaged.read_bytes()
            assert run.newest_checkpoint() == before
            run.set_damaged_aside()
        line, _ = capsys.readouterr().err.splitlines()
        aside = run.checkpoints / "damaged-000000020-1"
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
        assert {p.name for p in run.checkpoints.iterdir()} == {"000000010-1", "000000020-1"}


class TestMetrics:
    def test_what_cannot_be_read_now_may_be_whole_and_is_left(self, run, monkeypatch):
        run.append_metrics(1, {"loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(metrics_file, "content_of", Mock(side_effect=OSError(errno.EIO, "I/O error")))
            with pytest.raises(OSError, match="I/O error"):
                run.has_evaluation(1, 1)
            with pytest.raises(UserError, match="cannot be written to"):
                go_back(run, 1, 1)
        assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'

    def test_what_is_not_finite_is_written_as_null_which_every_reader_takes(self, run):
        run.append_metrics(3, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
        (line,) = (run.path / "metrics.jsonl").read_text().splitlines()

        def no_json(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        parsed = json.loads(line, parse_constant=no_json)
        assert parsed == {"step": 3, "a": None, "b": None, "c": None, "d": 0.5}
        assert list(run.read_metrics()) == [parsed]

    @pytest.mark.parametrize("line", ["[1]", "{}", '{"step": "2"}', "[" * 100_000, "\x00\x00"])
    def test_a_line_that_is_no_row_is_passed_over(self, run, line):
        (run.path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        assert list(run.read_metrics()) == [{"step": 1}, {"step": 3}]

    def test_an_evaluation_is_a_row_of_its_names_or_of_its_step_alone(self, run):
        run.append_metrics(5, {"train/loss": 2.5, "throughput/steps_per_second": 9.0})
        assert not run.has_evaluation(5, 9)
        run.append_metrics(5, {"eval/accuracy": float("nan")})
        run.append_metrics(10, {})
        assert [run.has_evaluation(step, 9) for step in (5, 10, 15)] == [True, True, False]
        assert [run.has_evaluation(5, lines) for lines in (1, 2)] == [False, True]
        assert not run.has_evaluation(10, 2)

    def test_going_back_writes_down_what_it_costs_and_who_took_which_steps(self, tmp_path):
        with started(tmp_path / "run") as run:
            for step in (5, 10, 15, 20):
                run.append_metrics(step, {"loss": 1.0})
        first = tmp_path / "run" / "owners" / "1.json"
        last_sign = first.stat().st_mtime - 60
        os.utime(first, (last_sign, last_sign))
        config = replace(CONFIG, keep_last=7)
        here = replace(HERE, processes=2)
        with started(tmp_path / "run", replace(RECORD, config=as_json(config)), here, step=10, lines=2):
            pass
        owner = owner_of(tmp_path / "run", 2)
        assert (owner.from_step, owner.lost_steps) == (10, 10)
        assert 60 <= owner.seconds_since_previous < 3600
        assert (owner.environment, owner.config) == (here, as_json(config))
        owner = owner_of(tmp_path / "run", 1)
        assert (owner.from_step, owner.lost_steps, owner.seconds_since_previous) == (0, 0, None)
        assert (owner.environment, owner.config) == (HERE, as_json(CONFIG))


class TestWhoseFolder:
    def test_a_run_that_another_process_starts_meanwhile_is_a_run(self, tmp_path, monkeypatch):
        def looked_at_just_before_it_starts(run):
            found = (run.path / "config.json").exists()
            (run.path / "config.json").write_text("{}")
            return found

        monkeypatch.setattr(RunDir, "exists", property(looked_at_just_before_it_starts))
        RunDir(tmp_path).check_fits("gan", CONFIG)

    @pytest.mark.parametrize("config", ["", "{}", "[]", '{"format": 4, "task": "gan", "config": 3}'])
    def test_a_damaged_config_is_refused(self, tmp_path, config):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError) as caught:
            RunDir(tmp_path).check_fits("gan", CONFIG)
        assert all(line.startswith(str(tmp_path / "config.json")) for line in caught.value.lines)

    @pytest.mark.parametrize(("written", "shown"), [(3, 3), ("\x1b[2J", "[2J")])
    def test_a_run_of_another_format_is_refused_in_one_line_that_names_it(self, run, written, shown):
        content = {**read_json(run.path / "config.json"), "format": written, "colour": "red"}
        (run.path / "config.json").write_text(json.dumps(content))
        assert refusal(run.check_fits, "gan", CONFIG) == (
            f"{run.path / 'config.json'} has format {shown}, this version reads format 4: "
            f"use the version that wrote it, or give another folder"
        )


def test_a_folder_that_was_there_stays_as_it_was_if_nothing_is_started(tmp_path):
    (tmp_path / "empty").mkdir()
    with RunDir(tmp_path / "empty").claimed(anything, at_once):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


class TestStarting:
    def test_the_same_machine_and_versions_go_on_without_a_warning(self, tmp_path, capsys):
        with started(tmp_path / "run") as run:
            tracker = run.read_record().tracker_run_id
        longer = as_json(replace(CONFIG, steps=60))
        with started(tmp_path / "run", RunRecord("gan", "launch/gan.py", longer, {})) as run:
            assert run.read_record().tracker_run_id == tracker
            assert run.read_config(Config).steps == 60
        assert capsys.readouterr().err == ""

    def test_with_exact_gradients_another_hash_seed_is_refused(self, tmp_path):
        made = replace(HERE, variables={"PYTHONHASHSEED": "0"})
        with started(tmp_path / "run", environment=made):
            pass
        now, run = replace(HERE, variables={"PYTHONHASHSEED": "7"}), RunDir(tmp_path / "run")
        said = "was made with PYTHONHASHSEED=0, now 7: a set of words would"
        with pytest.raises(UserError, match=said), run.claimed(anything, at_once):
            run.start(RECORD, now, 0, 0, is_exact=True)
        assert owner_of(tmp_path / "run", 2) is None  # no trace is left
        with started(tmp_path / "run", environment=now):  # a warning, without
            pass

    def test_what_may_change_bits_is_warned_of_with_old_and_new_value(self, tmp_path, capsys):
        changed = replace(HERE, commit="def", packages={"torch": "3.0.0"}, cuda="13.0", threads=2)
        with started(tmp_path / "run"):
            pass
        with started(tmp_path / "run", environment=changed):
            pass
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            f"warning: {tmp_path / 'run'} was made with {name} {old}, now {new}: bits may differ"
            for name, old, new in (
                ("packages", "{'torch': '2.9.0'}", "{'torch': '3.0.0'}"),
                ("commit", "abc", "def"),
                ("cuda", "None", "13.0"),
                ("threads", "4", "2"),
            )
        ]
        with started(tmp_path / "run", environment=changed):
            pass
        assert capsys.readouterr().err == ""  # it is what the run is made by from here on

    def test_where_it_cannot_start_no_trace_is_left(self, tmp_path):
        with started(tmp_path / "run") as run:
            pass
        (run.path / "samples").rmdir()
        (run.path / "samples").write_text("mine")
        before = files_of(run.path)
        with pytest.raises(UserError, match="cannot be written to"), started(run.path):
            pass
        assert {name for name in files_of(run.path) if not name.endswith(".lock")} == before.keys()

    def test_every_file_has_the_mode_that_the_umask_gives(self, tmp_path):
        before = os.umask(0o027)
        try:
            with started(tmp_path / "run") as run:
                run.append_metrics(1, {"loss": 1.0})
                save(run, 1)
                save_png(torch.zeros(1, 4, 4, dtype=torch.uint8), run.sample(1))
        finally:
            os.umask(before)
        written = [path for path in run.path.rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert {path.suffix for path in written} == {".json", ".jsonl", ".png", ".safetensors"}
        assert {path.stat().st_mode & 0o777 for path in written} == {0o640}
