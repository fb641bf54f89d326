"""BatchNorm over ranks on CPUs, beside torch's own on the whole batch."""

from pathlib import Path

import pytest
import torch
from normalise import SHAPES, inputs, norm_for
from safetensors.torch import load_file
from torch import nn

from cs324dist.distributed.batch_norm import convert_sync_batchnorm, freeze_cancelled_biases


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


@pytest.mark.parametrize("affine", [True, False])
def test_in_bf16_its_moments_are_those_of_torch(affine):
    layers = [nn.BatchNorm1d(8, affine=affine) for _ in range(2)]
    convert_sync_batchnorm(layers[0])
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    xs = [x.clone().requires_grad_() for _ in layers]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    for output in outputs:
        output.backward(x.flip(0))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=0.02, atol=0.02)
    assert layers[0].running_var.dtype == torch.float32
    torch.testing.assert_close(layers[0].running_var, layers[1].running_var)


@pytest.mark.parametrize(
    ("layer", "norm", "is_cancelled"),
    [
        (nn.Linear(4, 5), nn.BatchNorm1d(5), True),
        (nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), True),
        (nn.Linear(4, 6), nn.BatchNorm1d(5), False),  # of inputs of shape (N, 5, 4): a bias for each feature
        (nn.Linear(4, 5), nn.BatchNorm1d(5).eval(), False),
    ],
)
def test_a_bias_is_frozen_if_it_has_no_effect(layer, norm, is_cancelled):
    freeze_cancelled_biases(nn.Sequential(layer, norm))
    assert layer.bias.requires_grad != is_cancelled
    shape = (1, 4, 4) if isinstance(layer, nn.Conv2d) else (5, 4) if len(layer.bias) == 6 else (4,)
    x = torch.rand(7, *shape)
    outputs = []
    for shift in (0.0, 1.0):
        with torch.no_grad():
            layer.bias += shift * torch.arange(len(layer.bias))
            outputs.append(norm(layer(x)))
    assert torch.allclose(*outputs, atol=1e-4) == is_cancelled


@pytest.mark.parametrize("affine", [True, False])
def test_in_a_model_of_bf16_it_computes_as_torch_does(affine):
    layers = [nn.BatchNorm1d(8, affine=affine).bfloat16() for _ in range(2)]
    convert_sync_batchnorm(layers[0])
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for one in [layer(x) for layer in layers]:
        assert one.dtype == torch.bfloat16
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(layers[0].running_var, layers[1].running_var, rtol=0.02, atol=0.02)


class NormThenReLU(nn.BatchNorm1d):
    def forward(self, input):
        return torch.relu(super().forward(input))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_subclass_does_besides_stays(training):
    plain, converted = (nn.Sequential(NormThenReLU(5)).double().train(training) for _ in range(2))
    convert_sync_batchnorm(converted)
    convert_sync_batchnorm(converted)
    assert isinstance(converted[0], NormThenReLU)
    x = inputs("vectors")[0]
    expected = plain(x)
    torch.testing.assert_close(converted(x), expected, rtol=1e-10, atol=1e-10)
    assert not training or expected.min() == 0
    torch.testing.assert_close(converted[0].running_var, plain[0].running_var, rtol=1e-12, atol=0)
