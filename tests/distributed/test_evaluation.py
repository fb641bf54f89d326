"""An evaluation is shared out over ranks, and finds the same at any world size."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("evaluate.py")
FIGURES = {"gan": 12, "lstm": 1}


@pytest.mark.slow
def test_three_processes_find_what_one_finds(launch, tmp_path):
    found = []
    for processes in (1, 3):
        out = tmp_path / f"{processes}.json"
        launch(SCRIPT, out, launcher="torchrun", options=("--nproc_per_node", str(processes)))
        found.append(json.loads(out.read_text()))
    for task, figures in FIGURES.items():
        assert found[0][task] == pytest.approx(found[1][task], rel=1e-6, abs=1e-6)
        assert len(found[0][task]) == figures
