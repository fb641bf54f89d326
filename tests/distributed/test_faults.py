"""The equality tests can fail: each fault of `faults.py` makes two processes leave the path of one."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

BATCH, LENGTH = 16, 12
LSTM_SETTINGS = {"batch_size": BATCH, "length": LENGTH, "curriculum": 1.0}


def largest_distance(weights, expected):
    return max(
        float((weights[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in expected.items()
        if tensor.count_nonzero() > 0
    )


@pytest.mark.parametrize(
    ("fault", "case", "settings"),
    [
        ("offset_rank", "lstm report", LSTM_SETTINGS),
        ("sum_for_mean", "lstm report", LSTM_SETTINGS),
        ("unreduced_gradients", "lstm report", LSTM_SETTINGS),
        ("shuffle_restarted_on_resume", "lstm report", LSTM_SETTINGS),
        pytest.param(
            "local_batch_norm", "gan report", {"batch_size": BATCH, "dataset": "fake"}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_fault_is_noticed(follow, fault, case, settings):
    honest = follow(*case.split(), settings, processes=1)
    faulty = follow(*case.split(), settings, processes=2, fault=fault)
    assert largest_distance(faulty, honest) > 1e-4


@pytest.mark.slow
def test_static_graph_breaks_the_exact_gradient_penalty_and_plain_ddp_does_not(launch, tmp_path):
    def gradients(processes, graph):
        out = tmp_path / f"{graph}{processes}.safetensors"
        script = Path(__file__).parent / "penalty.py"
        launch(script, out, graph, launcher="torchrun", options=("--nproc_per_node", str(processes)))
        return load_file(out)

    expected = gradients(1, "plain")
    assert largest_distance(gradients(2, "plain"), expected) < 1e-12
    assert largest_distance(gradients(2, "static"), expected) > 0.1
