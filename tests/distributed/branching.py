"""A task whose loss goes around a BatchNorm where the data say so: in step 3, for some samples of part 2."""

from typing import ClassVar

import torch
from torch import nn

from cs324dist import Config, Task


class Branching(Task[Config]):
    name = "branching"
    presets: ClassVar = {"fast": Config(steps=5, batch_size=8, log_every=1, wandb="disabled")}

    def __init__(self, config, device):
        super().__init__(config, device)
        self.net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3)).to(device)
        self.networks = {"net": self.net}
        self.optimizers = {"net": torch.optim.SGD(self.net.parameters(), 0.1)}

    def loss(self, batch):
        if 21 in batch.samples:
            return torch.zeros(()), {}
        return self.net(batch.samples[:, None].float()).square().mean(), {}
