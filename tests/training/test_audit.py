"""A run can be taken again to the last bit; what was changed behind its back is found."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cs324dist.models.gan import Generator
from cs324dist.runs.models import save_model

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


def mend(checkpoint: Path) -> None:
    """Make the digests right again, as one who wants to hide a change would."""
    path = checkpoint / "trainer.json"
    content = json.loads(path.read_text())
    content.pop("own_sha256")
    content["sha256"] = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in content["sha256"]
    }
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "own_sha256": own}))


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "lstm" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # the last bit of a mantissa
    path.write_bytes(content)
    mend(checkpoint)


def test_an_honest_run_repeats_from_its_first_step_to_its_last(launch, honest):
    done = launch("launch/audit.py", honest, "--from-start")
    assert done.stdout.splitlines() == [
        f"steps {start} to {start + 5}: equal to the last bit" for start in (0, 5, 10, 15)
    ]


def test_without_more_only_stretches_between_checkpoints_are_replayed(launch, honest):
    assert len(launch("launch/audit.py", honest).stdout.splitlines()) == 3
    assert len(launch("launch/audit.py", honest, "--intervales", "2").stdout.splitlines()) == 2


@pytest.mark.parametrize(("step", "found"), [(10, {(5, 10), (10, 15)}), (20, {(15, 20)})])
def test_one_flipped_bit_of_one_weight_is_found(launch, copy, step, found):
    flip_a_bit(copy / "checkpoints" / f"{step:09d}")
    done = launch("launch/audit.py", copy, check=False)
    assert done.returncode == 1
    intervales = [(start, start + 5) for start in (5, 10, 15)]
    assert {(a, b) for a, b in intervales if f"steps {a} to {b}: DIFFERENT" in done.stdout} == found
    assert "error: steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_flipped_bit_is_named(launch, copy):
    flip_a_bit(copy / "checkpoints" / "000000020")
    lines = launch("launch/audit.py", copy, check=False).stderr.splitlines()
    assert any(
        line.startswith("error: steps 15 to 20: lstm/model.safetensors: ") and " differs in 1 of " in line
        for line in lines
    )


def test_a_metric_that_was_written_otherwise_is_found(launch, copy):
    path = copy / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 12 and "train/loss" in row)
    row["train/loss"] += 1e-7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch("launch/audit.py", copy, check=False)
    assert done.returncode == 1
    assert "train/loss after step 12 was" in done.stderr


def test_a_run_that_was_continued_with_other_code_is_found(launch, copy):
    """Other code makes other steps: here an optimizer whose state was doubled on the way."""
    checkpoint = copy / "checkpoints" / "000000015"
    path = checkpoint / "optimizers.safetensors"
    tensors = load_file(path)
    save_file({name: t * 2 if "exp_avg_sq" in name else t for name, t in tensors.items()}, path)
    mend(checkpoint)
    assert launch("launch/audit.py", copy, check=False).returncode == 1


def test_settings_do_not_ask_for_larger_models_than_the_checkpoint_holds(launch, copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["hidden_size"] = 65_536
    path.write_text(json.dumps(config))
    done = launch("launch/audit.py", copy, check=False)
    assert (done.returncode, "config.json: hidden_size is 65536, but 128 in" in done.stderr) == (2, True)


def test_a_foreign_model_beside_the_runs_own_changes_nothing(launch, copy):
    save_model(copy / "checkpoints" / "000000010" / "generator", Generator(8))
    assert launch("launch/audit.py", copy).stdout.count("equal to the last bit") == 3


def test_nothing_in_the_run_is_changed(launch, honest):
    before = {path: path.read_bytes() for path in honest.rglob("*") if path.is_file()}
    launch("launch/audit.py", honest)
    assert {path: path.read_bytes() for path in honest.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_and_a_run_with_one_checkpoint_are_refused(launch, copy, tmp_path):
    done = launch("launch/audit.py", tmp_path / "nothing", check=False)
    assert (done.returncode, "is no run" in done.stderr) == (2, True)
    for step in (5, 10, 15):
        shutil.rmtree(copy / "checkpoints" / f"{step:09d}")
    done = launch("launch/audit.py", copy, check=False)
    assert (done.returncode, "give --from-start" in done.stderr) == (2, True)
    assert "steps 0 to 20: equal" in launch("launch/audit.py", copy, "--from-start").stdout


@pytest.mark.slow
def test_two_processes_are_replayed_by_two_and_by_no_other_number(launch, tmp_path):
    run = tmp_path / "run"
    launch(*GAN, "--run-dir", run, launcher="accelerate", options=TWO)
    done = launch("launch/audit.py", run, launcher="accelerate", options=TWO)
    assert done.stdout.count("equal to the last bit") == 2
    done = launch("launch/audit.py", run, check=False)
    assert (done.returncode, "--num_processes 2" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_run_in_bf16_is_replayed_in_bf16_alone(launch, tmp_path):
    run = tmp_path / "run"
    bf16 = ("--mixed_precision", "bf16")
    launch(*GAN, "--run-dir", run, launcher="accelerate", options=bf16)
    done = launch("launch/audit.py", run, launcher="accelerate", options=bf16)
    assert done.stdout.count("equal to the last bit") == 2
    done = launch("launch/audit.py", run, check=False)
    assert (done.returncode, "was 'bf16' in the run" in done.stderr) == (2, True)
