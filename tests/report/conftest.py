"""Runs to report on."""

from pathlib import Path

import pytest
from made_runs import HOSTILE, add_owner, leave, make_damaged, make_gan, make_lstm, started


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: three lengths, an RNN, two GANs, a damaged and an empty one."""
    root = tmp_path_factory.mktemp("runs")
    for length in (5, 10, 20):
        make_lstm(root / f"lstm-length{length}", length, steps=500 if length == 20 else 300)
    make_lstm(root / "rnn-length5", 5, model="rnn")
    for number, step, processes in ((2, 100, 3), (3, 200, 2), (4, 200, 1)):
        add_owner(root / "rnn-length5", number, from_step=step, environment={"processes": processes})
    make_gan(root / "gan-fast-0")
    make_gan(root / "gan-young", frames=1, checkpoint=False, distance=1e6)
    make_damaged(root / HOSTILE)
    with started(root / "empty", "lstm", "fast"):
        pass
    (root / "empty" / "status.json").unlink()
    for folder in root.iterdir():
        leave(folder)
    return root
