"""A loss that is no mean of equal parts: the gradient and the metrics are those of the whole batch.

So they are with --micro-batches: see test_gradients.py.
"""

import json

import pytest
import torch
from torch.nn import functional as F
from weighted import BATCH, LONGEST, RATE, STEPS, model, sequences

from cs324dist import MicroBatch


@pytest.fixture
def taken(launch, tmp_path):
    def take(processes: int) -> dict:
        several = {"processes": processes} if processes > 1 else {}
        launch("tests/distributed/weighted.py", tmp_path / "out", **several)
        return json.loads((tmp_path / "out").read_text())

    return take


def plain_loop() -> dict:
    """What the same steps come to without the project: the mean over all places of the batch that count."""
    network, metrics = model(), []
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    for step in range(STEPS):
        inputs, labels, mask = sequences(MicroBatch(step, BATCH))
        logits = network(inputs[mask])
        loss = F.cross_entropy(logits, labels[mask])
        accuracy = (logits.argmax(1) == labels[mask]).double().mean()
        metrics.append({"train/loss": loss.item(), "train/accuracy": accuracy.item()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return {"weights": {name: p.tolist() for name, p in network.state_dict().items()}, "metrics": metrics}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_with_ddp_it_is_the_plain_loop(taken, float64, processes):
    found, expected = taken(processes), plain_loop()
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(
            torch.tensor(found["weights"][name]), torch.tensor(weights), rtol=1e-12, atol=1e-12
        )
    for row, expected_row in zip(found["metrics"], expected["metrics"], strict=True):
        longest = [1 + sample * LONGEST // BATCH for sample in range(BATCH)]
        share = BATCH // processes
        means = [max(longest[part * share : (part + 1) * share]) for part in range(processes)]
        assert row.pop("train/longest") == pytest.approx(sum(means) / processes)
        assert row == pytest.approx(expected_row)
