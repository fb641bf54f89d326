"""The equality tests can fail: each fault of `faults.py` makes two processes leave the path of one."""

from pathlib import Path

import pytest
from paths import command
from safetensors.torch import load_file

LSTM = {"batch_size": 16, "length": 12, "curriculum": 1.0, "steps": 20}  # as there: a run is shared
GAN = {"batch_size": 16, "dataset": "fake", "steps": 20}


def largest_distance(weights, expected):
    return max(
        float((weights[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in expected.items()
        if tensor.count_nonzero() > 0
    )


@pytest.mark.parametrize(
    ("fault", "case", "config"),
    [
        ("offset_rank", "lstm course", LSTM),
        ("sum_for_mean", "lstm course", LSTM),
        pytest.param("shuffle_restarted_on_resume", "lstm course", LSTM, marks=pytest.mark.slow),
        pytest.param("local_batch_norm", "gan course", GAN, marks=pytest.mark.slow),
    ],
)
def test_the_fault_is_noticed(follow, fault, case, config):
    honest = follow(case, config, processes=1)
    faulty = follow(case, config, processes=2, fault=fault)
    assert largest_distance(faulty, honest) > 1e-4


@pytest.mark.slow
def test_gradients_that_are_not_reduced_end_the_run_after_the_first_step(launch, tmp_path):
    faulty = {"environment": {"FAULT": "unreduced_gradients"}, "check": False}
    done = launch(*command("lstm course", LSTM, tmp_path / "run"), processes=2, **faulty)
    assert "error: after step 1, lstm: W_x on rank 1 is not as on rank 0" in done.stderr


@pytest.mark.slow
def test_static_graph_breaks_the_exact_gradient_penalty_and_plain_ddp_does_not(launch, tmp_path):
    def gradients(processes, graph):
        out = tmp_path / f"{graph}{processes}.safetensors"
        script = Path(__file__).parent / "penalty.py"
        launch(script, out, graph, processes=processes)
        return load_file(out)

    expected = gradients(1, "plain")
    assert largest_distance(gradients(2, "plain"), expected) < 1e-12
    assert largest_distance(gradients(2, "static"), expected) > 0.1
