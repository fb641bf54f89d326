"""The paths that different numbers of processes take from one seed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]
Follow = Callable[..., Weights]
FOLLOW = Path(__file__).parent / "follow.py"


@pytest.fixture(scope="session")
def follow(launch, tmp_path_factory) -> Follow:
    """The weights after some steps of a task in float64, on `processes` processes; each asked for once."""
    known: dict[str, Weights] = {}

    def run(
        task: str, preset: str, settings: dict, processes: int = 1, steps: int = 20, fault: str = ""
    ) -> Weights:
        key = json.dumps([task, preset, settings, processes, steps, fault])
        if key not in known:
            out = tmp_path_factory.mktemp("follow") / "weights.safetensors"
            command = [FOLLOW, task, preset, out, "--steps", steps, "--settings", json.dumps(settings)]
            command += ["--fault", fault] if fault else []
            launch(*command, launcher="torchrun", options=("--nproc_per_node", str(processes)))
            known[key] = load_file(out)
        return known[key]

    return run
