"""A few dozen kills at random moments; `make chaos` is two hundred. See `chaos.py`."""

import random

import chaos
import pytest
import same_bits
from chaos import Cell, Outcome, Whole

CELLS = [Cell("lstm", (1,)), Cell("lstm", (2,), "bf16"), Cell("gan", (2,)), Cell("classifier", (1, 2, 3, 4))]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seconds; it takes three minutes on two cores
def test_no_kill_changes_how_a_run_ends():
    outcomes = chaos.chaos(kills=24, seed=7, jobs=1, cells=dict.fromkeys(CELLS, 1))
    assert [outcome.mismatches for outcome in outcomes] == [[]] * len(CELLS)
    assert sum(outcome.orphans for outcome in outcomes) == 0
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    assert len(kills) >= 24
    assert {kill.target for kill in kills} == {"all", "worker", "launcher"}
    assert any(kill.interrupted for kill in kills)


@pytest.mark.slow
def test_another_end_is_noticed(tmp_path):
    outcome = Outcome(Cell("lstm", (1,)))
    whole = Whole.of(outcome.cell, (1, 1), tmp_path / "whole")
    (weights,) = (name for name in whole.content if name.endswith("model.safetensors"))
    whole.content[weights] = "another"
    chaos.trial(outcome, whole, 1, random.Random(0), tmp_path / "run")
    (mismatch,) = outcome.mismatches
    assert mismatch.startswith(f"lstm, 1 process, no: {weights} differs; kills: ")


@pytest.mark.slow
def test_another_end_on_another_number_of_processes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(same_bits, "KILLS", 0)
    added_by_ddp = Cell("mlp", (1,))
    row = same_bits.compare(added_by_ddp, [(1, 1), (2, 1)], random.Random(0), tmp_path)
    assert "2 processes of 1 threads: mlp/model.safetensors differs" in row["mismatches"]
