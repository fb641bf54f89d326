"""BatchNorm over the parts of a batch, beside torch's own on the whole batch."""

import pytest
import torch
from launched import refusal
from ranks import Rank, as_ranks
from torch import Tensor, nn

from cs324dist.data.streams import CPU, Stream
from cs324dist.distributed.batch_norm import freeze_cancelled_biases, span_the_batch
from cs324dist.distributed.belongings import PartBelongings
from cs324dist.distributed.exact import ExactGradients
from cs324dist.distributed.parts import Parts
from cs324dist.errors import UserError

SHAPES = {"vectors": (12, 5), "images": (12, 3, 4, 4)}
CUTS = (1, 5, 2, 4)  # samples of each part


def inputs(name: str) -> tuple[Tensor, Tensor]:
    """A batch with a large mean beside a small variance, and the gradient that comes back to its output."""
    shape, samples = SHAPES[name], torch.arange(SHAPES[name][0])
    numbers = Stream(0, name).normals(samples, 2 * torch.Size(shape[1:]).numel()).double()
    x, grad = numbers.view(shape[0], 2, *shape[1:]).unbind(1)
    return 100 + 0.1 * x, grad


def norm_for(name: str, **options) -> nn.Module:
    layer = (nn.BatchNorm1d if name == "vectors" else nn.BatchNorm2d)(SHAPES[name][1], **options).double()
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, len(layer.weight)))
            layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
    return layer


def gradients_of(output: Tensor, grad: Tensor, x: Tensor, layer: nn.Module) -> dict[str, Tensor]:
    named = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(output, list(named.values()), grad)
    return {"output": output.detach(), **dict(zip(named, found, strict=True))}


def whole(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    return {**gradients_of(layer(x), grad, x, layer), **dict(layer.named_buffers())}


def in_parts(rank: Rank, layer: nn.Module, x: Tensor, grad: Tensor, cuts=CUTS) -> dict[str, Tensor]:
    """What this rank finds of its own rows, and its share of the sums."""
    parts = Parts(len(cuts), CPU)
    span_the_batch(layers := nn.Sequential(layer), "net", parts)
    xs, grads = x.split(cuts), grad.split(cuts)

    def work(index: int) -> dict[str, Tensor]:
        own = xs[index].clone().requires_grad_()
        with torch.autograd.set_multithreading_enabled(False):
            return gradients_of(layers(own), grads[index], own, layer)

    rows, own = {}, parts.of()
    for index, found in zip(own, parts.each(work, own, PartBelongings({}, CPU, len(cuts))), strict=True):
        rows[index] = found
    return {"rows": rows, "buffers": dict(layer.named_buffers())}


def put_together(of_ranks) -> dict[str, Tensor]:
    rows = {index: found for of_rank in of_ranks for index, found in of_rank["rows"].items()}
    in_order = [rows[index] for index in sorted(rows)]
    joined = {name: torch.cat([row[name] for row in in_order]) for name in ("output", "x")}
    summed = {name: sum(row[name] for row in in_order) for name in in_order[0] if name not in joined}
    return {**joined, **summed, **of_ranks[0]["buffers"]}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_plain_batch_norm_on_the_whole_batch(name, processes):
    found = put_together(as_ranks(processes, lambda rank: in_parts(rank, norm_for(name), *inputs(name))))
    assert_close(found, whole(norm_for(name), *inputs(name)))


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False, "eps": 0.1}]
)
def test_with_other_options_too(options):
    found = as_ranks(2, lambda rank: in_parts(rank, norm_for("vectors", **options), *inputs("vectors")))
    assert_close(put_together(found), whole(norm_for("vectors", **options), *inputs("vectors")))


def test_a_part_without_values_is_refused():
    with pytest.raises(UserError, match="a BatchNorm layer got no values of part 1 of the batch"):
        in_parts(Rank(0, 1), norm_for("vectors"), *inputs("vectors"), (4, 0, 8))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "a model of bf16"])
def test_in_bf16_its_moments_are_those_of_torch(affine, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    layers = [nn.BatchNorm1d(8, affine=affine).to(dtype) for _ in range(2)]
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = put_together([in_parts(Rank(0, 1), layers[0], x, x.flip(0), (8, 8))])
        expected = whole(layers[1], x, x.flip(0))
    assert found["output"].dtype == torch.bfloat16
    for name in ("output", "x"):
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)
    assert layers[0].running_var.dtype == dtype
    close = {} if autocast else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(layers[0].running_var, layers[1].running_var, **close)


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


class NormThenReLU(nn.BatchNorm1d):
    def forward(self, input):
        return torch.relu(super().forward(input))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_subclass_does_besides_stays(training):
    plain, spanning = (NormThenReLU(8).double().train(training) for _ in range(2))
    span_the_batch(spanning, "layer", Parts(2, CPU))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).double()
    # Which lets it span once more.
    found = put_together([in_parts(Rank(0, 1), spanning, x, x.flip(0), (8, 8))])
    assert isinstance(spanning, NormThenReLU)
    expected = plain(x)
    torch.testing.assert_close(found["output"], expected.detach(), rtol=1e-10, atol=1e-10)
    assert not training or expected.min() == 0
    torch.testing.assert_close(spanning.running_var, plain.running_var, rtol=1e-12, atol=0)


def test_outside_of_a_loss_it_is_torch_s_own():
    plain, spanning = norm_for("vectors"), norm_for("vectors")
    span_the_batch(spanning, "layer", Parts(2, CPU))
    x = inputs("vectors")[0]
    assert torch.equal(plain(x), spanning(x))
    assert torch.equal(plain.running_var, spanning.running_var)


def path(net: nn.ModuleList, x: Tensor, index: int, case: str) -> Tensor:
    """The path of part 2 is another one."""
    for number in [0, 1] if index != 2 else OTHER[case]:
        x = net[number](x)
    return x.square().mean()


OTHER = {"none": [], "ends early": [0], "skips one": [1], "another order": [1, 0]}
SAID = {
    "none": "to Net.0 in the forward pass (barrier 1), part 2 to its end (barrier 1)",
    "ends early": "to Net.1 in the forward pass (barrier 2), part 2 to Net.0 in the backward pass",
    "skips one": "to Net.0 in the forward pass (barrier 1), part 2 to Net.1 in the forward pass (barrier 1)",
    "another order": "to Net.0 in the forward pass (barrier 1), part 2 to Net.1 in the forward pass",
}


class Net(nn.ModuleList):
    pass


@pytest.mark.parametrize("case", SAID)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_different_paths_are_one_error_wherever_the_parts_are(case, processes):
    def refused(rank: Rank) -> str:
        exact = ExactGradients(4, 0, rank, check_every=0)
        exact.prepare(net := Net([nn.BatchNorm1d(3), nn.BatchNorm1d(3)]))
        return refusal(exact.backward, lambda batch: path(net, torch.rand(2, 3), batch.index, case), 0, 8)

    found = as_ranks(processes, refused)
    assert len(set(found)) == 1
    assert f"part 0 of the batch came {SAID[case]}" in found[0]
