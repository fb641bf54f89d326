"""A task of your own: a small MLP on a table of numbers. docs/your_own_task.md says how to write one.

python examples/mlp.py

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml examples/mlp.py --data examples/spirals.csv
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist import (
    MUTABLE,
    Config,
    Count,
    Evaluation,
    MicroBatch,
    Positive,
    ShuffledEpochs,
    Task,
    UserError,
    accuracy,
    count_correct,
    main,
    seeded,
)

HELD_OUT = 5  # every fifth row is not trained on


@dataclass(frozen=True)
class MLPConfig(Config):
    """Train an MLP on a table."""

    steps: Annotated[Count, MUTABLE] = 1000
    evaluate_every: Annotated[Count, MUTABLE] = 200

    data: Path = Path("examples/spirals.csv")
    """Table as CSV without a header: the features, and in the last column the class, counted from 0."""

    hidden_size: Count = 64
    """Width of the hidden layers."""

    learning_rate: Positive = 1e-2
    """Adam's learning rate."""


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


class MLPTask(Task[MLPConfig]):
    """One step: a batch of rows, cross-entropy."""

    name = "mlp"
    presets: ClassVar = {"fast": MLPConfig()}

    def __init__(self, config: MLPConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.x, self.y = read_table(config.data, device)
        held_out = torch.arange(len(self.y), device=device) % HELD_OUT == 0
        self.train_rows, self.test_rows = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        self.order = ShuffledEpochs(config.seed, "rows/train", len(self.train_rows))
        with seeded(config.seed, "weights"):
            self.mlp = MLP(self.x.shape[1], config.hidden_size, int(self.y.max()) + 1).to(device)
        self.networks = {"mlp": self.mlp}
        self.optimizers = {"mlp": torch.optim.Adam(self.mlp.parameters(), config.learning_rate)}

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the rows of a micro-batch."""
        rows = self.train_rows[self.order.items(batch)]
        logits = self.mlp(self.x[rows])
        loss = F.cross_entropy(logits, self.y[rows])
        return loss, {"loss": loss, "accuracy": accuracy(logits, self.y[rows])}

    def evaluate(self, sum_over) -> Evaluation:
        """Accuracy on the rows held out."""

        def count_right(indices: Tensor) -> dict[str, Tensor]:
            rows = self.test_rows[indices]
            return {"right": count_correct(self.mlp(self.x[rows]), self.y[rows])}

        right = sum_over(count_right, len(self.test_rows))["right"].item()
        return Evaluation({"accuracy": right / len(self.test_rows)})


def read_table(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and classes of the rows."""
    try:
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2)).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"--data {path} cannot be read as a table of numbers: {error}") from None
    return table[:, :-1].float(), table[:, -1].long()


if __name__ == "__main__":
    main(MLPTask, __doc__)
