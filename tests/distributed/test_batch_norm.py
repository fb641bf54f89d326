"""BatchNorm over ranks on CPUs, beside torch's own on the whole batch."""

from pathlib import Path

import pytest
import torch
from normalise import SHAPES, inputs, norm_for
from safetensors.torch import load_file


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, launch, tmp_path_factory):
    out = tmp_path_factory.mktemp("norm")
    script = Path(__file__).parent / "normalise.py"
    launch(script, out, launcher="torchrun", options=("--nproc_per_node", str(request.param)))
    return [load_file(path) for path in sorted(out.iterdir())]


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_plain_batch_norm_on_the_whole_batch(ranks, name):
    x, grad = inputs(name)
    x.requires_grad_()
    layer = norm_for(name)
    output = layer(x)
    output.backward(grad)

    def together(key):
        return torch.cat([rank[f"{name}/{key}"] for rank in ranks])

    torch.testing.assert_close(together("output"), output.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(together("grad"), x.grad, rtol=1e-10, atol=1e-10)
    for rank in ranks:
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(rank[f"{name}/grad of {key}"], parameter.grad, rtol=1e-10, atol=1e-10)
        for key, buffer in layer.named_buffers():
            torch.testing.assert_close(rank[f"{name}/{key}"], buffer, rtol=1e-12, atol=0)
