"""A GPU takes the path of a CPU; two processes on one GPU do too. `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cs324dist.data.streams import ShuffledEpochs, Stream

pytestmark = pytest.mark.gpu
FOLLOW = Path(__file__).parent / "follow.py"


def test_a_gpu_draws_the_numbers_of_a_cpu():
    indices = torch.tensor([0, 1, 12_345_678_901])
    stream, shuffle = Stream(3, "tests"), ShuffledEpochs(3, "tests", 1000)
    assert stream.integers(indices.cuda(), 7, 10).tolist() == stream.integers(indices, 7, 10).tolist()
    assert stream.signs(indices.cuda(), 100).tolist() == stream.signs(indices, 100).tolist()
    assert shuffle.items(indices.cuda()).tolist() == shuffle.items(indices).tolist()
    torch.testing.assert_close(stream.normals(indices.cuda(), 7).cpu(), stream.normals(indices, 7))


@pytest.mark.parametrize("task", ["lstm", "gan"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_gpu_takes_the_path_of_a_cpu(launch, tmp_path, task, processes):
    settings = '{"batch_size": 8, "dataset": "fake"}' if task == "gan" else '{"batch_size": 16, "length": 12}'

    def weights(name: str, processes: int, **how):
        out = tmp_path / name
        command = (FOLLOW, task, "report", out, "--settings", settings, "--backend", "gloo")
        launch(*command, launcher="torchrun", options=("--nproc_per_node", str(processes)), **how)
        return load_file(out)

    expected = weights("cpu.safetensors", 1, environment={"CUDA_VISIBLE_DEVICES": ""})
    for name, tensor in weights("gpu.safetensors", processes).items():
        difference = (tensor - expected[name]).double().norm()
        assert difference <= 1e-6 * expected[name].double().norm(), name
