"""Runs in float64, whose weights show the path that they took."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]
TOLERANCE = 1e-9  # norm of difference over norm, float64


def command(case: str, config: Mapping[str, object], run: Path) -> list[object]:
    """Train a task in float64; `case` is its name and preset, such as `gan fast`."""
    task, preset = case.split()
    config = {"preset": preset, "log_every": 1000, "checkpoint_every": 1000, "wandb": "disabled", **config}
    options = [word for k, v in config.items() for word in ("--" + k.replace("_", "-"), v)]
    return ["launch/train.py", f"tests/distributed/faults.py:{task.upper()}", *options, "--run-dir", run]


def weights_in(checkpoint: Path) -> Weights:
    """Every tensor of every model, such as `generator/fc.0.weight`."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in checkpoint.glob("*/model.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same_path(weights: Weights, expected: Weights, tolerance: float = TOLERANCE) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        difference, size = (weights[name] - tensor).double().norm(), tensor.double().norm()
        assert difference <= tolerance * size, f"{name}: {difference / size:.1e}"
