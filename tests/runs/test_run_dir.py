"""The run folder: whose it is, where it stands, and what is left of it after a crash."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cs324dist.config import Config, as_json
from cs324dist.data.streams import MicroBatch
from cs324dist.errors import UserError
from cs324dist.loop import run_task
from cs324dist.pictures import save_png
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.environment import Environment
from cs324dist.runs.files import read_json
from cs324dist.runs.lease import owner_of
from cs324dist.runs.run_dir import RunDir, RunRecord, Status
from cs324dist.tasks.base import Metrics, Task
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


class Trained:
    """What a checkpoint holds."""

    def __init__(self) -> None:
        self.networks, self.optimizers = {"rnn": RNN(1, 1, 1)}, {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def save(run: RunDir, step: int) -> Path:
    write_checkpoint(run.checkpoint(step), Trained(), TrainerState(step))
    return run.checkpoint(step)


def damage(checkpoint: Path) -> Path:
    path = checkpoint / "optimizers.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


class TestCheckpoints:
    def test_without_any_there_is_no_newest(self, run):
        assert run.newest_checkpoint() is None
        assert run.newest_step() == 0

    def test_the_newest_is_taken_and_nothing_is_said(self, run, capsys):
        for step in (20, 100):
            save(run, step)
        assert run.newest_checkpoint() == run.path / "checkpoints" / "000000100-1"
        assert run.newest_step() == 100
        assert capsys.readouterr().err == ""

    def test_a_damaged_one_is_named_and_moved_aside_and_the_one_before_is_taken(self, run, capsys):
        before, damaged = save(run, 10), damage(save(run, 20))
        content = damaged.read_bytes()
        assert run.newest_checkpoint() == before
        run.set_damaged_aside()
        (line,) = capsys.readouterr().err.splitlines()
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

    def test_a_step_may_be_damaged_again_after_it_was_taken_again(self, run):
        before = save(run, 10)
        for _ in range(2):
            damage(save(run, 20))
            assert run.newest_checkpoint() == before
            run.set_damaged_aside()


class TestWhatCannotBeReadNow:
    """It may be whole: nothing is passed over, set aside or deleted."""

    @pytest.fixture
    def failing(self, monkeypatch) -> Iterator[Callable[[Path, int], None]]:
        """Have the reads of a path fail."""
        honest, errors = Path.read_bytes, {}

        def read_bytes(path: Path) -> bytes:
            if number := errors.get(path):
                raise OSError(number, os.strerror(number))
            return honest(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        return lambda path, number: errors.update({path: number})

    @pytest.mark.parametrize("name", ["trainer.json", "optimizers.safetensors", "rnn/model.safetensors"])
    @pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
    def test_the_newest_checkpoint(self, run, failing, name, number, capsys):
        before, newest = save(run, 10), save(run, 20)
        failing(newest / name, number)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            run.newest_checkpoint()
        assert caught.value.filename == str(newest / name)
        run.set_damaged_aside()
        run.keep_newest(2)
        assert sorted(run.checkpoints.iterdir()) == [before, newest]
        assert capsys.readouterr().err == ""

    def test_its_last_owner_whose_precision_it_has(self, run, failing):
        failing(run.path / "owners" / "1.json", errno.ESTALE)
        with pytest.raises(OSError, match="Stale file handle"):
            run.latest_environment()

    def test_its_metrics(self, run, failing):
        run.append_metrics(1, {"loss": 1.0})
        failing(run.path / "metrics.jsonl", errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            run.has_evaluation(1, 1)
        with pytest.raises(UserError, match="cannot be written to"):
            go_back(run, 1, 1)
        assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'

    def test_by_its_name_alone_the_newest_is_kept(self, run, failing):
        checkpoints = [save(run, step) for step in (10, 20, 30)]
        for path in checkpoints:
            failing(path / "trainer.json", errno.EIO)
        run.keep_newest(1)
        assert list(run.checkpoints.iterdir()) == checkpoints[-1:]

    def test_a_folder(self, run, monkeypatch, capsys):
        newest = save(run, 20)

        def fails(path: Path) -> Any:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", fails)
            for look in (run.newest_checkpoint, run.latest_environment):
                with pytest.raises(OSError, match="Stale file handle"):
                    look()
            run.keep_newest(1)
        assert "warning: an old checkpoint stays for now" in capsys.readouterr().err
        assert list(run.checkpoints.iterdir()) == [newest]


class TestMetrics:
    def test_lines_are_read_back_in_order(self, run):
        run.append_metrics(1, {"train/loss": 2.5})
        run.append_metrics(2, {"train/loss": 0.1, "eval/accuracy": 1.0})
        assert list(run.read_metrics()) == [
            {"step": 1, "train/loss": 2.5},
            {"step": 2, "train/loss": 0.1, "eval/accuracy": 1.0},
        ]

    @pytest.mark.parametrize("lost", [True, False])
    def test_lines_are_forgotten_only_when_they_are_on_the_disk(self, run, monkeypatch, lost):
        """On a network file system or at a quota, what was written is lost when fsync says so."""
        path = run.path / "metrics.jsonl"
        run.append_metrics(1, {"loss": 1.0})
        run.write_metrics(sync=True)
        on_disk = path.stat().st_size
        run.append_metrics(2, {"loss": 2.0})
        with monkeypatch.context() as patch:

            def fails(descriptor: int) -> None:
                if lost:
                    os.truncate(path, on_disk + 3)
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

            patch.setattr(os, "fsync", fails)
            with pytest.raises(OSError, match="quota"):
                run.write_metrics(sync=True)
        assert path.stat().st_size == on_disk
        run.append_metrics(3, {"loss": 3.0})
        assert run.write_metrics(sync=True) == 3
        assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]

    def test_what_is_not_finite_is_written_as_null_which_every_reader_takes(self, run):
        run.append_metrics(3, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
        (line,) = (run.path / "metrics.jsonl").read_text().splitlines()

        def no_json(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        parsed = json.loads(line, parse_constant=no_json)
        assert parsed == {"step": 3, "a": None, "b": None, "c": None, "d": 0.5}
        assert list(run.read_metrics()) == [parsed]

    def test_a_line_cut_anywhere_is_passed_over_and_its_step_is_taken_again(self, run):
        path = run.path / "metrics.jsonl"
        for step in (1, 2, 3):
            run.append_metrics(step, {"train/loss": step / 8})
        whole = path.read_bytes()
        last = len(whole.splitlines(keepends=True)[-1])
        for missing in range(2, last + 1):  # 1: only the end of the line is missing, all of it can be read
            path.write_bytes(whole[:-missing])
            assert [row["step"] for row in run.read_metrics()] == [1, 2]
            go_back(run, 2, 2)
            run.append_metrics(3, {"train/loss": 3 / 8})
            assert path.read_bytes() == whole

    @pytest.mark.parametrize("line", ["[1]", '"x"', "{}", '{"step": "2"}', "[" * 100_000, "\x00\x00"])
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

    def test_a_damaged_line_that_belongs_to_the_checkpoint_is_named(self, run):
        (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
        assert run.has_evaluation(1, 1)
        with pytest.raises(UserError, match="line 2 is damaged: mend or delete it"):
            run.has_evaluation(3, 3)

    def test_going_back_drops_what_lies_past_the_checkpoint_and_says_running(self, run):
        for step in (5, 10, 15, 20):
            run.append_metrics(step, {"loss": 1.0})
        run.write_status("failed", 10, "no power")
        go_back(run, 10, 2)
        assert [row["step"] for row in run.read_metrics()] == [5, 10]
        assert read_json(run.path / "status.json") == {"state": "running", "step": 10, "why": ""}

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

    def test_going_back_works_before_the_first_line(self, run):
        go_back(run, 0, 0)
        assert list(run.read_metrics()) == []


class TestWhoseFolder:
    def test_a_new_and_an_empty_folder_fit(self, tmp_path):
        RunDir(tmp_path / "new").check_fits("gan", CONFIG)
        RunDir(tmp_path).check_fits("gan", CONFIG)
        assert list(tmp_path.iterdir()) == []

    def test_what_a_start_that_was_killed_has_left_fits(self, tmp_path):
        for left in ("owners", "checkpoints", "samples"):
            (tmp_path / left).mkdir()
        (tmp_path / ".config.json.tmp").touch()
        RunDir(tmp_path).check_fits("gan", CONFIG)

    def test_a_run_fits_its_own_task_and_options(self, run):
        run.check_fits("gan", CONFIG)
        run.check_fits("gan", replace(CONFIG, steps=31))

    def test_another_task_is_named(self, run):
        with pytest.raises(UserError, match="holds a run of 'gan'"):
            run.check_fits("lstm", CONFIG)

    def test_each_option_that_differs_has_a_line(self, run):
        with pytest.raises(UserError) as caught:
            run.check_fits("gan", replace(CONFIG, seed=1, batch_size=32))
        assert [line.partition(":")[0] for line in caught.value.lines] == [
            "--seed 1 differs from the run's 0",
            "--batch-size 32 differs from the run's 64",
        ]

    def test_a_folder_of_other_things_and_a_file_are_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        for path in (tmp_path, tmp_path / "thesis.tex"):
            with pytest.raises(UserError) as caught:
                RunDir(path).check_fits("gan", CONFIG)
            assert f"{path} is not a run folder" in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_run_that_another_process_starts_meanwhile_is_not_called_something_else(
        self, tmp_path, monkeypatch
    ):
        def looked_at_just_before_it_starts(run):
            found = (run.path / "config.json").exists()
            (run.path / "config.json").write_text("{}")
            return found

        monkeypatch.setattr(RunDir, "exists", property(looked_at_just_before_it_starts))
        RunDir(tmp_path).check_fits("gan", CONFIG)

    @pytest.mark.parametrize(
        "config",
        [
            "",
            "{}",
            "[]",
            '{"format": 4, "task": "gan", "config": 3}',
            '{"format": 4, "task": "gan", "config": {}, "script": "", "changed": {}, "tracker_run_id": "x"}',
        ],
    )
    def test_a_damaged_config_is_refused(self, tmp_path, config):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError) as caught:
            RunDir(tmp_path).check_fits("gan", CONFIG)
        assert all(line.startswith(str(tmp_path / "config.json")) for line in caught.value.lines)

    @pytest.mark.parametrize("written", [None, 1, 3, "\x1b[2J"])
    def test_a_run_of_another_format_is_refused_in_one_line_that_names_it(self, run, written):
        content = {**read_json(run.path / "config.json"), "format": written, "colour": "red"}
        if written is None:
            del content["format"], content["task"]
        (run.path / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            run.check_fits("gan", CONFIG)
        shown = "[2J" if isinstance(written, str) else written
        assert caught.value.lines == (
            f"{run.path / 'config.json'} has format {shown}, this version reads format 4: "
            f"use the version that wrote it, or give another folder",
        )

    def test_a_run_that_lacks_an_option_of_today_is_continued(self, run):
        content = read_json(run.path / "config.json")
        del content["config"]["warmup_steps"], content["config"]["micro_batches"]
        (run.path / "config.json").write_text(json.dumps(content))
        run.check_fits("gan", CONFIG)
        assert run.read_config(Config) == CONFIG
        with pytest.raises(UserError, match=r"^--warmup-steps 3 differs from the run's 0: "):
            run.check_fits("gan", replace(CONFIG, warmup_steps=3))

    def test_a_run_whose_options_are_tuples_is_continued(self, tmp_path):
        @dataclass(frozen=True)
        class Tuples(Config):
            betas: tuple[float, float] = (0.9, 0.99)

        with started(tmp_path / "run", replace(RECORD, config=as_json(Tuples()))) as run:
            run.check_fits("gan", Tuples())
            assert run.read_config(Tuples) == Tuples()
            with pytest.raises(
                UserError, match=r"^--betas \(0.9, 0.5\) differs from the run's \(0.9, 0.99\): "
            ):
                run.check_fits("gan", Tuples(betas=(0.9, 0.5)))

    def test_a_folder_below_a_file_cannot_be_claimed(self, tmp_path):
        (tmp_path / "file").touch()
        run = RunDir(tmp_path / "file" / "run")
        with (
            pytest.raises(UserError, match=r".*file/run cannot be written to"),
            run.claimed(lambda: run.check_fits("gan", CONFIG), at_once),
        ):
            pass


class TestClaiming:
    def test_if_nothing_is_started_a_new_folder_is_gone_again(self, tmp_path):
        with RunDir(tmp_path / "run").claimed(anything, at_once):
            assert (tmp_path / "run" / "owners" / "1.json").is_file()
        assert list(tmp_path.iterdir()) == []

    def test_and_a_folder_that_was_there_stays_as_it_was(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with RunDir(tmp_path / "empty").claimed(anything, at_once):
            pass
        assert list((tmp_path / "empty").iterdir()) == []

    def test_what_does_not_fit_any_more_once_it_is_claimed_is_refused(self, tmp_path):
        """Another process may have had the folder in between."""
        run, checks = RunDir(tmp_path / "run"), []

        def check() -> None:
            checks.append((run.path / "owners").exists())
            if len(checks) == 2:
                raise UserError("somebody was faster")

        with pytest.raises(UserError, match="somebody was faster"), run.claimed(check, at_once):
            raise AssertionError
        assert checks == [False, True]
        assert not run.path.exists()


class TestStarting:
    def test_the_record_says_what_is_run_and_the_owner_in_what_environment(self, run):
        assert run.read_record() == RECORD
        assert run.read_config(Config) == CONFIG
        assert run.read_status() == Status("running", 0)
        assert owner_of(run.path, 1).environment == HERE

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
        with started(tmp_path / "run", environment=now):  # a warning, without
            pass

    def test_what_may_change_bits_is_warned_of_with_old_and_new_value(self, tmp_path, capsys):
        changed = replace(HERE, commit="def", packages={"torch": "3.0.0"}, compiled="inductor", cuda="13.0")
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
                ("compiled", "None", "inductor"),
            )
        ]
        with started(tmp_path / "run", environment=changed):
            pass
        assert capsys.readouterr().err == ""  # it is what the run is made by from here on

    def test_two_runs_have_trackers_of_their_own(self):
        ids = {RunRecord("gan", "", {}, {}).tracker_run_id for _ in range(9)}
        assert len(ids) == 9
        assert all(len(tracker) == 8 and int(tracker, 16) >= 0 for tracker in ids)

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
    def test_every_file_has_the_mode_that_the_umask_gives(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            with started(tmp_path / "run") as run:
                run.append_metrics(1, {"loss": 1.0})
                save(run, 1)
                save_png(torch.zeros(1, 4, 4, dtype=torch.uint8), run.sample(1))
        finally:
            os.umask(before)
        written = [path for path in run.path.rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert {path.suffix for path in written} == {".json", ".jsonl", ".png", ".safetensors"}
        assert {path.name: path.stat().st_mode & 0o777 for path in written} == {
            path.name: 0o666 & ~umask for path in written
        }


class Falling(Task[Config]):
    """A task that has one network, made by `make`."""

    name = "falling"
    presets: ClassVar = {"default": Config(steps=2, wandb="disabled")}
    make: Callable[[], nn.Module]
    steps_taken: ClassVar[list[int]]

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.network = type(self).make()
        self.networks = {"network": self.network}
        self.optimizers = {"network": torch.optim.NAdam(self.network.parameters())}

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        self.steps_taken.append(batch.step)
        loss = sum(parameter.square().sum() for parameter in self.network.parameters())
        return loss, {"loss": loss.detach()}


def linear(config: object = None, **buffers: Tensor) -> nn.Module:
    module = nn.Linear(2, 2)
    if config is not None:
        module.config = config
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


class TestBeforeTheFirstStep:
    """What cannot be saved is refused before it is trained, and leaves no trace."""

    def train(self, make: Callable[[], nn.Module], run_dir: Path, **options: object) -> list[int]:
        task = type("Falling", (Falling,), {"make": staticmethod(make), "steps_taken": []})
        config = replace(Falling.presets["default"], preset="default", run_dir=run_dir, **options)
        try:
            run_task(task, config, Accelerator(cpu=True))
        except UserError:
            assert task.steps_taken == []
            raise
        return task.steps_taken

    @pytest.mark.parametrize(
        ("make", "line"),
        [
            (
                lambda: linear(b=torch.zeros(2, dtype=torch.complex128)),
                "it cannot be saved: KeyError: torch.complex128",
            ),
            (
                lambda: linear(b=torch.zeros(1).expand(3)),
                "it cannot be saved: RuntimeError: unsupported operation",
            ),
            (lambda: linear(b=torch.eye(2).to_sparse()), "it cannot be saved: "),
            (lambda: linear({"widths": (1, 2)}), "Linear.config['widths'] is (1, 2): give "),
        ],
        ids=["complex", "expanded", "sparse", "tuple"],
    )
    def test_what_cannot_be_saved_is_refused(self, tmp_path, make, line):
        with pytest.raises(UserError) as caught:
            self.train(make, tmp_path / "run")
        (said,) = caught.value.lines
        assert said.startswith(line)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_seen_before_a_step(self, tmp_path, monkeypatch):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(
            UserError, match=r"cannot be written to \(No space left on device\): give another"
        ):
            self.train(linear, tmp_path / "run")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "make",
        [
            lambda: linear(counts=torch.zeros(3, dtype=torch.int8), mask=torch.tensor([0.0, -torch.inf])),
            lambda: linear(
                {"rate": 0.1, "bias": True, "name": "x"}, counts=torch.zeros(3, dtype=torch.int16)
            ),
        ],
    )
    def test_what_can_be_saved_is_trained_and_continued(self, tmp_path, make):
        run = RunDir(tmp_path / "run")
        assert self.train(make, run.path) == [0, 1]
        assert list(run.path.rglob(".*")) == []
        assert self.train(make, run.path, steps=4) == [2, 3]
        assert run.read_status() == Status("finished", 4)


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
