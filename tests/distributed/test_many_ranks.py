"""What the package adds to DDP, on 64 ranks with real numbers: the bits of one process.

The ranks are threads; torch's LocalTensor runs Python once for all ranks, and here it asks which it is.
"""

import copy

import pytest
import torch
from ranks import Rank, as_ranks
from torch import nn

from cs324dist.data.streams import Stream, seeded
from cs324dist.distributed.exact import ExactGradients
from cs324dist.distributed.stop import StopRequest

COUNT, SAMPLES = 64, 128  # micro-batches of two samples each
WIDTH = 48
PROCESSES = [1, 3, 64]


with seeded(0, "weights"):
    NETWORK = nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def loss(layers: nn.Module, samples: torch.Tensor) -> torch.Tensor:
    """The mean over samples; a layer is used again for samples 10 and 11 alone, a micro-batch."""
    hidden = layers(3 + Stream(0, "inputs").normals(samples, 4).to(layers[0].weight.dtype))
    chosen = (samples >= 10) & (samples < 12)
    again = layers[2](hidden[chosen]).square().sum() if chosen.any() else 0.0
    return (hidden.square().sum() + again) / len(samples)


def gradients(rank: Rank) -> list[torch.Tensor]:
    """The gradients of this rank's network, and what BatchNorm keeps."""
    exact = ExactGradients(COUNT, 0, rank)
    exact.prepare(layers := copy.deepcopy(NETWORK))
    exact.backward(lambda batch: loss(layers, batch.samples), 0, SAMPLES)
    trained = [parameter.grad for parameter in layers.parameters() if parameter.requires_grad]
    return trained + list(layers.buffers())


@pytest.fixture(scope="module")
def of_one_process() -> list[torch.Tensor]:
    return gradients(Rank(0, 1))


@pytest.mark.parametrize("processes", PROCESSES)
def test_gradients_have_the_same_bits_on_any_number_of_processes(of_one_process, processes):
    for found in as_ranks(processes, gradients):
        assert all(map(torch.equal, found, of_one_process))


@pytest.mark.parametrize("processes", PROCESSES)
def test_all_stop_after_the_step_in_which_one_was_asked_to(processes):
    def votes(rank: Rank) -> list[bool]:
        stop, found = StopRequest(processes), []
        stop._group = "a group"
        for step in range(5):
            stop._signals += step == 2 and rank.process_index == processes // 2
            found.append(stop.agreed())
        return found

    assert as_ranks(processes, votes) == [[False, False, False, True, True]] * processes
