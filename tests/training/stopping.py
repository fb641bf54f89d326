"""A task that is done when two evaluations have not been better: they give --values in turn."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from cs324dist import MUTABLE, Config, Evaluation, Task, main


@dataclass(frozen=True)
class StoppingConfig(Config):
    values: Annotated[tuple[float, ...], MUTABLE] = (3, 5, 4, 4.5, 6, 1)
    patience: Annotated[int, MUTABLE] = 2
    stopped_in: Annotated[int, MUTABLE] = 0
    """The evaluation after this step asks its process to stop."""


class Stopping(Task[StoppingConfig]):
    name = "stopping"
    presets: ClassVar = {
        "fast": StoppingConfig(
            steps=60, batch_size=6, log_every=7, evaluate_every=10, checkpoint_every=15, wandb="disabled"
        )
    }

    def __init__(self, config, device):
        super().__init__(config, device)
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.networks = {"model": self.model}
        self.optimizers = {"model": torch.optim.SGD(self.model.parameters(), 1.0)}
        torch.nn.init.zeros_(self.model.weight)
        self.largest = 0.0

    def loss(self, batch):
        loss = -self.model.weight.sum()  # which rises by one at each step
        return loss, {"loss": loss}

    def evaluate(self, sum_over):
        step = round(self.model.weight.item())
        if step == self.config.stopped_in:
            os.kill(os.getpid(), signal.SIGTERM)
        total = sum_over(lambda indices: time.sleep(0.2) or {"n": indices.sum()}, 6, piece=3)["n"].item()
        self.largest = max(self.largest, 100 - total)  # a sum that is cut off is smaller
        score = self.config.values[step // 10 - 1]
        return Evaluation({"score": score, "step": step, "largest": self.largest})

    def is_done(self, evaluations):
        scores = [evaluation["score"] for evaluation in evaluations]
        return len(scores) - 1 - scores.index(max(scores)) >= self.config.patience if scores else False


if __name__ == "__main__":
    main(Stopping, __doc__)
