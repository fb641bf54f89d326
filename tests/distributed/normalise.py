"""Started by a launcher: BatchNorm over ranks on this rank's share of a batch; writes all it gives."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from cs324dist.data.streams import MicroBatch, Stream
from cs324dist.distributed.batch_norm import convert_sync_batchnorm
from cs324dist.errors import exit_process

SHAPES = {"vectors": (12, 5), "images": (12, 3, 4, 4)}


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch with a large mean beside a small variance, and the gradient that comes back to its output."""
    shape, samples = SHAPES[name], torch.arange(SHAPES[name][0])
    numbers = Stream(0, name).normals(samples, 2 * torch.Size(shape[1:]).numel()).double()
    x, grad = numbers.view(shape[0], 2, *shape[1:]).unbind(1)
    return 100 + 0.1 * x, grad


def norm_for(name: str) -> nn.Module:
    layer = (nn.BatchNorm1d if name == "vectors" else nn.BatchNorm2d)(SHAPES[name][1]).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, len(layer.weight)))
        layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
    return layer


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    found = {}
    for name in SHAPES:
        whole, whole_grad = inputs(name)
        share = MicroBatch(0, len(whole), rank, world_size).samples
        x, grad = whole[share].requires_grad_(), whole_grad[share]
        layers = nn.Sequential(norm_for(name))
        convert_sync_batchnorm(layers)
        output = layers(x)
        output.backward(grad)
        for parameter in layers.parameters():
            dist.all_reduce(parameter.grad)
        tensors = {"output": output.detach(), "grad": x.grad}
        tensors |= {f"grad of {key}": p.grad for key, p in layers[0].named_parameters()}
        tensors |= dict(layers[0].named_buffers())
        found |= {f"{name}/{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(found, Path(sys.argv[1]) / f"rank{rank}.safetensors")
    accelerator.end_training()
    exit_process(0)
