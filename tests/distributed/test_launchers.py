"""The launchers that users have: accelerate, torchrun and plain python, on one machine and on two."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors import safe_open

CONFIGS = sorted((Path(__file__).parents[2] / "accelerate_configs").glob("*.yaml"))
TRAIN = ("launch/lstm.py", "--length", "20", "--steps", "50", "--log-every", "1", "--wandb", "disabled")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(run) if "train/loss" in line]


@pytest.fixture(scope="module")
def one_process(launch, tmp_path_factory) -> list[float]:
    run = tmp_path_factory.mktemp("one") / "run"
    launch(*TRAIN, "--run-dir", run)
    return losses(run)


def assert_same_curve(run: Path, expected: list[float]) -> None:
    assert len(expected) == 50
    assert losses(run) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_itself_reads_the_config(config):
    parsed = load_config_from_file(str(config))
    assert parsed.use_cpu == config.stem.startswith("cpu")
    processes = {"cpu": 1, "cpu_ddp": 2, "gpu": 1, "gpu_compiled": 1, "multi_gpu": 2, "multi_node": 4}
    assert parsed.num_processes == processes[config.stem]
    assert parsed.mixed_precision == ("no" if parsed.use_cpu else "bf16")


def test_accelerate_with_two_processes_has_the_loss_curve_of_one(launch, tmp_path, one_process):
    run = tmp_path / "run"
    done = launch(
        *TRAIN,
        "--run-dir",
        run,
        launcher="accelerate",
        options=("--config_file", "accelerate_configs/cpu_ddp.yaml"),
    )
    assert "processes: 2" in done.stderr
    assert_same_curve(run, one_process)


def test_accelerate_with_one_process_has_it_too(launch, tmp_path, one_process):
    run = tmp_path / "run"
    launch(
        *TRAIN,
        "--run-dir",
        run,
        launcher="accelerate",
        options=("--config_file", "accelerate_configs/cpu.yaml"),
    )
    assert_same_curve(run, one_process)


def test_torchrun_with_four_processes_has_it_too(launch, tmp_path, one_process):
    run = tmp_path / "run"
    launch(*TRAIN, "--run-dir", run, launcher="torchrun", options=("--nproc_per_node", "4"))
    assert_same_curve(run, one_process)


@pytest.mark.slow
def test_two_nodes_with_two_processes_each_have_it_too(launch, tmp_path, one_process):
    run = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(rank: int) -> str:
        options = (
            "--config_file",
            "accelerate_configs/multi_node.yaml",
            "--mixed_precision",
            "no",
            "--machine_rank",
            str(rank),
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            str(port),
        )
        return launch(*TRAIN, "--run-dir", run, launcher="accelerate", options=options).stderr

    with ThreadPoolExecutor(2) as nodes:
        said = list(nodes.map(node, (0, 1)))
    assert "processes: 4" in said[0]
    assert "step 50/50" not in said[1]  # only the main process speaks
    assert_same_curve(run, one_process)


def test_fewer_processes_than_asked_for_are_refused(launch, tmp_path):
    run = tmp_path / "run"
    done = launch(
        *TRAIN,
        "--run-dir",
        run,
        launcher="accelerate",
        options=("--cpu", "--num_processes", "2"),
        check=False,
    )
    assert done.returncode != 0
    assert "error: 2 processes were asked for, and accelerate launch started 1" in done.stderr
    assert not run.exists()


def test_a_default_config_of_the_users_is_named(launch, tmp_path):
    default = tmp_path / "home" / "accelerate" / "default_config.yaml"
    default.parent.mkdir(parents=True)
    default.write_text(CONFIGS[0].read_text())
    done = launch(
        *TRAIN,
        "--run-dir",
        tmp_path / "run",
        "--steps",
        "1",
        launcher="accelerate",
        environment={"HF_HOME": str(tmp_path / "home")},
    )
    assert f"accelerate launch took its settings from {default}" in done.stderr


def test_fp16_on_a_cpu_is_refused(launch, tmp_path):
    options = ("--config_file", "accelerate_configs/cpu.yaml", "--mixed_precision", "fp16")
    done = launch(*TRAIN, "--run-dir", tmp_path / "run", launcher="accelerate", options=options, check=False)
    assert done.returncode != 0
    assert "give bf16, or no" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_worker_that_dies_is_restarted_and_continues_from_the_last_checkpoint(launch, tmp_path):
    run = tmp_path / "run"
    options = ("--config_file", "accelerate_configs/cpu_ddp.yaml", "--max_restarts", "1")
    done = launch(Path(__file__).parent / "killed_once.py", run, launcher="accelerate", options=options)
    assert "continuing from step 20 of 40" in done.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert [line["step"] for line in metrics(run) if "train/loss" in line] == list(range(1, 41))


def test_bf16_on_a_cpu_solves_length_ten(launch, tmp_path):
    run = tmp_path / "run"
    options = ("--config_file", "accelerate_configs/cpu.yaml", "--mixed_precision", "bf16")
    done = launch(
        "launch/lstm.py",
        "--length",
        "10",
        "--wandb",
        "disabled",
        "--run-dir",
        run,
        launcher="accelerate",
        options=options,
    )
    assert "precision: bf16" in done.stderr
    assert metrics(run)[-1]["eval/accuracy"] == 1.0


@pytest.mark.slow
def test_the_gan_trains_in_bf16_on_a_cpu(launch, tmp_path, mnist_root):
    run = tmp_path / "run"
    options = ("--config_file", "accelerate_configs/cpu.yaml", "--mixed_precision", "bf16")
    launch(
        "launch/gan.py",
        "--steps",
        "300",
        "--batch-size",
        "16",
        "--data-root",
        mnist_root,
        "--wandb",
        "disabled",
        "--run-dir",
        run,
        launcher="accelerate",
        options=options,
    )
    lines = metrics(run)
    # Untrained, the distance is 2 184; in float32 it ends at 315. A run that went wrong has null, for NaN.
    assert lines[-1]["eval/frechet_distance"] < 600


@pytest.mark.slow
def test_compiled_models_train_alike_and_may_be_continued_uncompiled(launch, tmp_path):
    smoke = ("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--lr-decay", "none")
    smoke += ("--log-every", "1", "--wandb", "disabled")
    compiled, plain = tmp_path / "compiled", tmp_path / "plain"
    options = ("--config_file", "accelerate_configs/cpu.yaml", "--dynamo_backend", "inductor")
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
