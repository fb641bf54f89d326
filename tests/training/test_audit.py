"""A run can be taken again to the last bit; what was changed behind its back is found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from launched import files_of, mend

from cs324dist import audit
from cs324dist.errors import UserError
from cs324dist.runs.checkpoints import TrainerState
from cs324dist.runs.environment import environment

SMOKE = ("--preset", "smoke", "--wandb", "disabled", "--log-every", "1", "--checkpoint-every", "5")
LSTM = ("launch/lstm.py", *SMOKE, "--keep-last", "4")
GAN = ("launch/gan.py", *SMOKE, "--dataset", "fake")
TWO = ("--config_file", "accelerate_configs/cpu_ddp.yaml")


@pytest.fixture(scope="module")
def honest(launch, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("audit") / "run"
    launch(*LSTM, "--run-dir", run)
    return run


@pytest.fixture
def copy(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "run"))


def change_owner(run: Path, number: int, **changes: object) -> None:
    path = run / "owners" / f"{number}.json"
    owner = json.loads(path.read_text())
    owner["config"].update(changes)
    path.write_text(json.dumps(owner))


def flip_a_bit(checkpoint: Path, file: str = "lstm/model.safetensors") -> None:
    path = checkpoint / file
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # the last bit of a mantissa
    path.write_bytes(content)
    mend(checkpoint)


def equal(*steps: int) -> list[str]:
    return [f"steps {step} to {step + 5}: equal to the last bit" for step in steps]


def test_an_honest_run_repeats_from_its_first_step_to_its_last_and_nothing_in_it_is_changed(launch, honest):
    before = files_of(honest)
    assert launch("launch/audit.py", honest, "--from-start").stdout.splitlines() == equal(0, 5, 10, 15)
    assert files_of(honest) == before


def test_without_more_only_intervals_between_checkpoints_are_replayed(launch, honest):
    assert launch("launch/audit.py", honest).stdout.splitlines() == equal(5, 10, 15)


@pytest.mark.parametrize(
    ("step", "file", "found"),
    [(10, "lstm/model.safetensors", {(5, 10), (10, 15)}), (20, "optimizers.safetensors", {(15, 20)})],
)
def test_one_flipped_bit_of_one_tensor_is_found_and_named(launch, copy, step, file, found):
    flip_a_bit(copy / "checkpoints" / f"{step:09d}-1", file)
    done = launch("launch/audit.py", copy, check=False)
    assert done.returncode == 1
    intervals = [(start, start + 5) for start in (5, 10, 15)]
    assert {(a, b) for a, b in intervals if f"steps {a} to {b}: DIFFERENT" in done.stdout} == found
    named = f"error: steps {step - 5} to {step}: {file}: "
    assert any(line.startswith(named) and " differs in 1 of " in line for line in done.stderr.splitlines())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_three_processes_made_of_micro_batches_is_audited_by_one(launch, tmp_path):
    run = tmp_path / "run"
    launch(*LSTM, "--micro-batches", "4", "--run-dir", run, processes=3)
    assert json.loads((run / "owners" / "1.json").read_text())["environment"]["processes"] == 3
    assert launch("launch/audit.py", run, "--from-start").stdout.splitlines() == equal(0, 5, 10, 15)
    flip_a_bit(run / "checkpoints" / "000000020-1")
    done = launch("launch/audit.py", run, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [*equal(5, 10), "steps 15 to 20: DIFFERENT"]
    named = "error: steps 15 to 20: lstm/model.safetensors: output.weight differs in 1 of 1280 values"
    assert named in done.stderr.splitlines()


def test_a_metric_that_was_written_otherwise_is_found(launch, copy):
    path = copy / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 12 and "train/loss" in row)
    row["train/loss"] += 1e-7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch("launch/audit.py", copy, check=False)
    assert done.returncode == 1
    assert "train/loss after step 12 was" in done.stderr


EMPTY = """
import torch
from cs324dist.tasks.lstm.task import LSTMTask

class Empty(LSTMTask):
    name = "empty"

    def __init__(self, config, device):
        super().__init__(config, device)
        self.model.register_buffer("nothing", torch.empty(0, 3))
"""


def test_a_tensor_without_values_is_equal_too(launch, tmp_path):
    (tmp_path / "own.py").write_text(EMPTY)
    launch("launch/train.py", f"{tmp_path}/own.py", *SMOKE, "--run-dir", tmp_path / "run")
    done = launch("launch/audit.py", tmp_path / "run", "--task", f"{tmp_path}/own.py")
    assert done.stdout.splitlines() == equal(10, 15)


def test_a_run_without_a_hash_seed_is_replayed_with_one_and_nothing_is_said(launch, copy):
    path = copy / "owners" / "1.json"
    owner = json.loads(path.read_text())
    del owner["environment"]["variables"]["PYTHONHASHSEED"]
    path.write_text(json.dumps(owner))
    assert "PYTHONHASHSEED" not in launch("launch/audit.py", copy).stderr


def test_a_folder_that_is_no_run_and_a_run_with_one_checkpoint_are_refused(launch, copy, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        audit.audit(tmp_path / "nothing", None, False)
    for step in (5, 10, 15):
        shutil.rmtree(copy / "checkpoints" / f"{step:09d}-1")
    done = launch("launch/audit.py", copy, check=False)
    assert (done.returncode, "give --from-start" in done.stderr) == (2, True)
    assert "steps 0 to 20: equal" in launch("launch/audit.py", copy, "--from-start").stdout


@pytest.mark.slow
def test_each_interval_is_taken_again_as_its_owner_took_it_or_it_is_said_why_not(launch, copy):
    """Steps 20 to 25 are taken with another kernel, and 25 to 30 also with another number of threads."""
    newest = copy / "checkpoints" / "000000020-1"
    lines = json.loads((newest / "trainer.json").read_text())["metrics_lines"]
    mend(newest, metrics_lines=lines - 1)  # the next owner makes up for the last evaluation
    other = (*LSTM, "--kernel", "equations", "--run-dir", copy)
    launch(*other, "--steps", "25")
    launch(*other, "--steps", "30", environment={"CS324DIST_THREADS": "2"})
    done = launch("launch/audit.py", copy)
    assert done.stdout.splitlines() == equal(15, 20)
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]  # of the commit
    assert said == ["steps 25 to 30 cannot be compared: made with threads 2, here 1"]
    change_owner(copy, 2, kernel="fused")
    assert "steps 20 to 25: DIFFERENT" in launch("launch/audit.py", copy, check=False).stdout


@pytest.fixture
def choose():
    """What is chosen of an interval that was made here, and of one that was made otherwise."""
    here = environment()

    def choose(needed: set[str], **otherwise: object) -> list[str]:
        made = [here, replace(here, **otherwise)]
        intervals = [
            audit.Interval(None, Path(f"{n}"), TrainerState(n), Path("owners/1.json"), environment, {})
            for n, environment in enumerate(made)
        ]
        return [str(interval) for interval in audit._comparable(intervals, here, needed)]

    return choose


@pytest.mark.parametrize(
    ("otherwise", "said"),
    [
        ({"precision": "bf16"}, "precision bf16, here no"),
        ({"processes": 2}, "processes 2, here 1"),
        ({"compiled": "inductor"}, "compiled inductor, here None"),
    ],
)
def test_what_was_made_otherwise_is_not_compared_and_it_is_said_why(choose, capsys, otherwise, said):
    assert choose(audit.NEEDED | audit.BY_DDP, **otherwise) == ["steps 0 to 0"]
    assert capsys.readouterr().err == f"steps 0 to 1 cannot be compared: made with {said}\n"


class TestATaskOfAUsersOwn:
    def test_it_is_never_imported_because_a_run_folder_names_it(self, copy, tmp_path, monkeypatch):
        (tmp_path / "evil.py").write_text("open('code ran', 'w').close()\nclass Evil: pass\n")
        monkeypatch.chdir(tmp_path)
        path = copy / "config.json"
        record = {**json.loads(path.read_text()), "task": "evil.py:Evil", "script": "evil.py"}
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match="which is no task of the project: give --task"):
            audit.audit(copy, None, False)
        assert not (tmp_path / "code ran").exists()
        with pytest.raises(UserError, match=r"is not a subclass of cs324dist\.Task"):
            audit.audit(copy, "evil.py:Evil", False)
        assert (tmp_path / "code ran").exists()  # a user's word makes it run

    def test_a_run_of_another_task_is_refused(self, honest):
        with pytest.raises(UserError, match="is a run of 'lstm', not of gan"):
            audit.audit(honest, "gan", False)


@pytest.mark.slow
def test_two_processes_are_replayed_by_two_and_by_no_other_number(launch, tmp_path):
    run = tmp_path / "run"
    launch(*GAN, "--run-dir", run, launcher="accelerate", options=TWO)
    done = launch("launch/audit.py", run, launcher="accelerate", options=TWO)
    assert done.stdout.count("equal to the last bit") == 2
    done = launch("launch/audit.py", run, check=False)
    assert (done.returncode, "--nproc_per_node 2" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_run_in_bf16_is_replayed_in_bf16_alone(launch, tmp_path):
    run = tmp_path / "run"
    bf16 = ("--mixed_precision", "bf16")
    launch(*GAN, "--run-dir", run, launcher="accelerate", options=bf16)
    done = launch("launch/audit.py", run, launcher="accelerate", options=bf16)
    assert done.stdout.count("equal to the last bit") == 2
    done = launch("launch/audit.py", run, environment={"ACCELERATE_MIXED_PRECISION": ""})
    assert done.stdout.count("equal to the last bit") == 2
    done = launch("launch/audit.py", run, check=False)
    assert (done.returncode, "made with precision bf16, here no" in done.stderr) == (2, True)
