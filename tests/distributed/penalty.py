"""Started by a launcher: the exact gradient penalty under DDP, with and without `static_graph`.

Writes the discriminator's gradients after one backward pass through loss + |∇D|², averaged over ranks.
"""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cs324dist.data.streams import MicroBatch, Stream
from cs324dist.tasks.gan.networks import Discriminator

if __name__ == "__main__":
    out, static_graph = sys.argv[1], sys.argv[2] == "static"
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    discriminator = Discriminator()
    wrapped = DistributedDataParallel(discriminator, static_graph=static_graph)
    batch = MicroBatch(0, 8, dist.get_rank(), dist.get_world_size())
    images = Stream(0, "images").normals(batch.samples, 784).view(-1, 1, 28, 28).requires_grad_()
    for _ in range(2):  # a static graph is recorded in the first pass and relied on from the second on
        discriminator.zero_grad()
        logits = wrapped(images)
        (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        (F.softplus(-logits).mean() + slope.square().sum((1, 2, 3)).mean()).backward()
    if dist.get_rank() == 0:
        save_file({name: p.grad for name, p in discriminator.named_parameters()}, out)
    os._exit(0)  # see `exit_process`
