"""A task whose data come from workers, with augmentation and dropout."""

import random
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Interval
from torch import nn
from torch.utils.data import Dataset

from cs324dist import MUTABLE, Config, Evaluation, Task, UserError, loader, main, seeded


@dataclass(frozen=True)
class LoadingConfig(Config):
    workers: Annotated[int, Interval(ge=0, le=9), MUTABLE] = 2
    bad_item: int = -1


class Rows(Dataset):
    """Row `item` with a value of each generator that an augmentation may draw from."""

    def __init__(self, bad_item: int = -1) -> None:
        self.bad_item = bad_item

    def __len__(self) -> int:
        return 20

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        if item == self.bad_item:
            raise UserError(f"row {item} cannot be read: mend it")
        return torch.tensor([item, torch.rand(()), np.random.random(), random.random()]), item % 2


class Loading(Task[LoadingConfig]):
    name = "loading"
    presets: ClassVar = {"fast": LoadingConfig(steps=12, batch_size=8, log_every=1, wandb="disabled")}

    def __init__(self, config, device):
        super().__init__(config, device)
        self.data = loader(Rows(config.bad_item), config.seed, "rows", workers=config.workers)
        with seeded(config.seed, "weights"):
            self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).to(device)
        self.networks = {"model": self.model}
        self.optimizers = {"model": torch.optim.Adam(self.model.parameters(), 1e-2)}

    def loss(self, batch):
        rows, labels = self.data.batch(batch)
        loss = nn.functional.cross_entropy(self.model(rows), labels)
        return loss, {"loss": loss}

    def evaluate(self, sum_over):
        def total(items):
            return {"total": self.model(self.data.items(items)[0]).sum()}

        return Evaluation({"mean": sum_over(total, 20, piece=6)["total"].item() / 20})


if __name__ == "__main__":
    main(Loading, __doc__)
