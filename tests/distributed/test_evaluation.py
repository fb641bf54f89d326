"""An evaluation is shared out over ranks, and finds the same at any world size."""

import json
from pathlib import Path

import pytest

CASES = {
    "gan": {"dataset": "fake"},
    "lstm": {"length": 12},
    "classifier": {"dataset": "fake"},
}


@pytest.mark.parametrize("task", CASES)
def test_three_processes_find_what_one_finds(launch, tmp_path, task):
    found = []
    for processes in (1, 3):
        out = tmp_path / f"{processes}.safetensors"
        settings = json.dumps({**CASES[task], "batch_size": 9})
        launch(
            Path(__file__).parent / "follow.py", task, "fast", out,
            "--steps", 0, "--evaluate", "--settings", settings,
            launcher="torchrun", options=("--nproc_per_node", str(processes)),
        )  # fmt: skip
        found.append(json.loads(out.with_suffix(".json").read_text()))
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-6)
    assert len(found[0]) == {"gan": 12, "lstm": 1, "classifier": 1}[task]
