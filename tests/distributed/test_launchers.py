"""The launchers that users have: accelerate, torchrun and plain python, on one machine and on two."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launched import PACKAGE, metrics
from safetensors import safe_open

from cs324dist.distributed.launcher import check_environment
from cs324dist.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "accelerate_configs").glob("*.yaml"))
TRAIN = ("launch/lstm.py", "--length", "20", "--steps", "50", "--log-every", "1", "--wandb", "disabled")


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(run) if "train/loss" in line]


@pytest.fixture(scope="module")
def one_process(launch, tmp_path_factory) -> list[float]:
    run = tmp_path_factory.mktemp("one") / "run"
    launch(*TRAIN, "--run-dir", run)
    return losses(run)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_itself_reads_the_config(config):
    parsed = load_config_from_file(str(config))
    assert parsed.use_cpu == config.stem.startswith("cpu")
    processes = {"cpu": 1, "cpu_ddp": 2, "gpu": 1, "gpu_compiled": 1, "multi_gpu": 2, "multi_node": 4}
    assert parsed.num_processes == processes[config.stem]
    shares_a_machine = config.stem in ("cpu_ddp", "multi_gpu")  # Accelerate then takes a free port itself
    assert (
        parsed.main_process_port
        == {True: 0, False: 29500 if config.stem == "multi_node" else None}[shares_a_machine]
    )
    assert parsed.mixed_precision is None  # the run's own option says it


@pytest.mark.parametrize(("config", "processes"), [("cpu", 1), ("cpu_ddp", 2)])
def test_accelerate_has_the_loss_curve_of_plain_python(launch, tmp_path, one_process, config, processes):
    run = tmp_path / "run"
    options = ("--config_file", f"accelerate_configs/{config}.yaml")
    done = launch(*TRAIN, "--run-dir", run, launcher="accelerate", options=options)
    assert f"processes: {processes}" in done.stderr
    for said in ("step 50/50", "evaluation after 50 steps", "finished after 50 steps"):
        assert done.stderr.count(said) == 1  # only the main process speaks
    assert len(one_process) == 50
    assert losses(run) == pytest.approx(one_process, abs=1e-3)


CPU = ("--config_file", "accelerate_configs/cpu.yaml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cpu", "--num_processes", "2"), "2 processes were asked for, and accelerate launch started 1"),
        ((*CPU, "--mixed_precision", "fp16"), "fp16 would silently run as float32 on a CPU"),
        ((*CPU, "--use_fsdp"), "accelerate launch was asked for FSDP, and this toolkit trains with DDP"),
    ],
    ids=["fewer processes", "fp16 on a CPU", "FSDP"],
)
def test_what_would_be_ignored_is_refused_in_one_line(launch, tmp_path, options, said):
    run = tmp_path / "run"
    done = launch(*TRAIN, "--run-dir", run, launcher="accelerate", options=options, check=False)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {said}")
    assert f"{PACKAGE}/" not in done.stderr  # the launcher's traceback has no frame of ours
    assert not run.exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "asked for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asked for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "asked for Megatron-LM"),
        (
            *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
            "--gradient_accumulation_steps 4 of accelerate launch would change nothing: give the script",
        ),
    ],
)
def test_so_it_is_where_the_environment_asks_for_it(monkeypatch, name, value, said):
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_environment()


def test_a_default_config_of_the_users_is_named(launch, tmp_path):
    default = tmp_path / "home" / "accelerate" / "default_config.yaml"
    default.parent.mkdir(parents=True)
    default.write_text(CONFIGS[0].read_text())
    environment = {"HF_HOME": str(tmp_path / "home")}
    one = (*TRAIN, "--steps", "1", "--run-dir", tmp_path / "run")
    done = launch(*one, launcher="accelerate", environment=environment)
    assert f"accelerate launch took its settings from {default}" in done.stderr


def test_bf16_on_a_cpu_solves_length_ten(launch, tmp_path):
    run = tmp_path / "run"
    options = ("--config_file", "accelerate_configs/cpu.yaml", "--mixed_precision", "bf16")
    command = ("launch/lstm.py", "--length", "10", "--wandb", "disabled", "--run-dir", run)
    done = launch(*command, launcher="accelerate", options=options)
    assert "precision: bf16" in done.stderr
    assert metrics(run)[-1]["eval/accuracy"] == 1.0


@pytest.mark.slow
def test_the_gan_trains_in_bf16_on_a_cpu(launch, tmp_path, mnist_root):
    run = tmp_path / "run"
    options = ("--config_file", "accelerate_configs/cpu.yaml", "--mixed_precision", "bf16")
    command = ("launch/gan.py", "--steps", "600", "--batch-size", "16", "--data-root", mnist_root)
    launch(*command, "--wandb", "disabled", "--run-dir", run, launcher="accelerate", options=options)
    # Untrained, the distance is 2 184; in float32 it ends at 178. A run that went wrong has null, for NaN.
    assert metrics(run)[-1]["eval/frechet_distance"] < 600


@pytest.mark.slow
def test_compiled_models_train_alike_and_may_be_continued_uncompiled(launch, tmp_path):
    smoke = ("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--schedule", "constant")
    smoke += ("--log-every", "1", "--wandb", "disabled", "--precision", "no")
    compiled, plain = tmp_path / "compiled", tmp_path / "plain"
    options = ("--config_file", "accelerate_configs/cpu.yaml")
    options += ("--dynamo_backend", "inductor")
    launch(*smoke, "--steps", "10", "--run-dir", compiled, launcher="accelerate", options=options)
    launch(*smoke, "--steps", "10", "--run-dir", plain)
    for name in ("train/generator_loss", "train/discriminator_loss"):
        ours, expected = ([line[name] for line in metrics(run)[:5]] for run in (compiled, plain))
        assert ours[0] == pytest.approx(expected[0], rel=1e-5)
        assert ours == pytest.approx(expected, rel=1e-2)
    for weights in sorted(plain.rglob("model.safetensors")):
        with safe_open(weights, "pt") as a, safe_open(compiled / weights.relative_to(plain), "pt") as b:
            assert list(a.keys()) == list(b.keys())
    said = launch(*smoke, "--steps", "12", "--run-dir", compiled).stderr
    assert "continuing from step 10 of 12" in said


@pytest.mark.slow
def test_two_processes_of_the_gan_print_no_warning(launch, tmp_path):
    command = "launch/gan.py --preset smoke --dataset fake --wandb disabled --steps 2 --run-dir"
    done = launch(*command.split(), tmp_path / "run", processes=2)
    assert "Warning" not in done.stderr
