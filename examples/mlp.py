"""A task of your own: a small MLP on a table of numbers. docs/your_own_task.md walks through it.

python examples/mlp.py

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml examples/mlp.py --data examples/spirals.csv
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.command_line import POSITIVE, Count
from cs324dist.data.streams import ShuffledEpochs
from cs324dist.distributed.process import in_full_precision, seeded, shard
from cs324dist.errors import UserError
from cs324dist.metrics.accuracy import share_right
from cs324dist.settings import MUTABLE, RunSettings
from cs324dist.tasks.base import Evaluation, UntilStopped
from cs324dist.training_run import main

HELD_OUT = 5  # every fifth row is not trained on


@dataclass(frozen=True)
class MLPSettings(RunSettings):
    """Train an MLP on a table."""

    steps: Annotated[Count, MUTABLE] = 1000
    evaluate_every: Annotated[Count, MUTABLE] = 200

    data: Path = Path("examples/spirals.csv")
    """Table as CSV without a header: the features, and in the last column the class, counted from 0."""

    hidden_size: Count = 64
    """Width of the hidden layers."""

    learning_rate: Annotated[float, POSITIVE] = 1e-2
    """Adam's step size."""

    def run_name(self) -> str:
        """The default run folder's name."""
        return f"mlp-{self.data.stem}-{self.seed}"


class MLP(nn.Module):
    """Features to logits."""

    def __init__(self, features: int, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.config = {"features": features, "hidden_size": hidden_size, "classes": classes}
        self.net = nn.Sequential(
            nn.Linear(features, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, one row for each row of `x`."""
        return self.net(x)


class MLPTask:
    """One step: a batch of rows, cross-entropy, one Adam step."""

    def __init__(self, settings: MLPSettings, accelerator: Accelerator) -> None:
        self.settings, self.accelerator, self.shard = settings, accelerator, shard(accelerator)
        self.x, self.y = read_table(settings.data, self.shard.device)
        held_out = torch.arange(len(self.y), device=self.shard.device) % HELD_OUT == 0
        self.train_rows, self.test_rows = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        self.order = ShuffledEpochs(settings.seed, "rows/train", len(self.train_rows))
        with seeded(settings.seed, "weights"):
            model = MLP(self.x.shape[1], settings.hidden_size, int(self.y.max()) + 1)
        optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.models, self.optimizers = {"mlp": model}, {"mlp": optimizer}
        self.counters: dict[str, int] = {}
        self.counter_limits: dict[str, range] = {}

    def step(self, step: int) -> dict[str, Tensor]:
        """See `Task.step`."""
        rows = self.train_rows[self.order.batch(self.shard, step, self.settings.batch_size)]
        logits = self.model(self.x[rows])
        loss = F.cross_entropy(logits, self.y[rows])
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"train/loss": loss, "train/accuracy": share_right(logits, self.y[rows])}

    @torch.no_grad()
    def evaluate(self, until_stopped: UntilStopped = iter) -> Evaluation:
        """Accuracy on the rows held out; each rank counts its share."""
        rows = self.test_rows[self.shard.samples(0, len(self.test_rows))]
        logits = in_full_precision(self.models["mlp"], self.x[rows])
        right = self.accelerator.reduce((logits.argmax(1) == self.y[rows]).sum(), "sum")
        return Evaluation({"eval/accuracy": right.item() / len(self.test_rows)})


def read_table(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and classes of the rows."""
    try:
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2)).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"--data {path} cannot be read as a table of numbers: {error}") from None
    return table[:, :-1].float(), table[:, -1].long()


if __name__ == "__main__":
    main("mlp", MLPTask, {"fast": MLPSettings()}, __doc__)
