"""Peak memory of a process over the number of its parts: ten million parameters, without BatchNorm.

python benchmarks/memory.py
"""

import resource
import sys

import torch
from accelerate import Accelerator
from common import run_python, store
from torch import nn
from torch.nn import functional as F

from cs324dist.distributed.exact import ExactGradients

PARTS, STEPS, BATCH, WIDTH = (1, 2, 4, 8), 5, 64, 1826  # three square layers have 10.0 million parameters


def peak(parts: int) -> float:
    """MiB of this process, after some steps without checks."""
    exact = ExactGradients(parts, 0, Accelerator(cpu=True), check_every=0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = exact.prepare(nn.Sequential(*layers), "net")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(BATCH, WIDTH)
    for step in range(STEPS):
        exact.backward(lambda part: F.mse_loss(model(x[part.rows]), x[part.rows]), step, BATCH)
        optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak(int(sys.argv[1])))
    else:
        found = {str(parts): float(run_python("benchmarks/memory.py", parts).split()[-1]) for parts in PARTS}
        for parts, mib in found.items():
            print(f"{parts} parts: {mib:.0f} MiB, {mib / found['1']:.2f} times that of one")
        store("memory", {"mib": found}, threads=1)
