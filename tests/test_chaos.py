"""A few dozen kills at random moments; `make chaos` is two hundred. See `chaos.py`."""

import random

import chaos
import pytest
from chaos import Cell, Outcome, Whole

CELLS = [Cell("lstm", 1), Cell("lstm", 2, "bf16"), Cell("gan", 2), Cell("classifier", None)]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seconds; it takes three minutes on two cores
def test_no_kill_changes_how_a_run_ends():
    outcomes = chaos.chaos(kills=24, seed=7, jobs=1, cells=CELLS)
    assert [outcome.mismatches for outcome in outcomes] == [[]] * len(CELLS)
    assert sum(outcome.orphans for outcome in outcomes) == 0
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    assert len(kills) >= 24
    assert {kill.target for kill in kills} == {"all", "worker", "launcher"}
    assert any(kill.interrupted for kill in kills)


@pytest.mark.slow
def test_another_end_is_noticed(tmp_path):
    outcome, cell = Outcome(Cell("lstm", 1)), Cell("lstm", 1)
    whole = Whole.of(cell, tmp_path / "whole")
    (weights,) = (name for name in whole.content if name.endswith("model.safetensors"))
    whole.content[weights] = "another"
    chaos.trial(outcome, whole, 1, random.Random(0), tmp_path / "run")
    (mismatch,) = outcome.mismatches
    assert mismatch.startswith(f"lstm x 1 no: {weights} differs; kills: ")


def test_of_metrics_all_but_the_throughput_is_compared(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "000000005-1"
    checkpoint.mkdir(parents=True)

    def content(line: str):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        return chaos.content_of(tmp_path)

    line = '{"step": 5, "train/loss": 0.5, "throughput/samples_per_second": 81.2}'
    assert not chaos.differences(content(line), content(line.replace("81.2", "99")))
    assert chaos.differences(content(line), content(line.replace("0.5", "0.50"))) == ["metrics.jsonl differs"]
