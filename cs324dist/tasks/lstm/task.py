"""The LSTM (or the Elman network) on palindromes: the course report's Part I."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.config import MUTABLE, BatchSize, Config, Count, Positive, ScheduleName
from cs324dist.data.streams import MicroBatch, Stream, seeded
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import UserError, printable
from cs324dist.metrics import accuracy, count_correct
from cs324dist.tasks.base import Evaluation, Metrics, Task, Updater
from cs324dist.tasks.lstm.networks import LSTM, RNN
from cs324dist.tasks.lstm.palindromes import DIGITS, palindrome_accuracy, palindromes

SHORTEST = 4  # digits; where a curriculum starts
LENGTHEN_EVERY = 2  # steps between decisions of the curriculum, for which a GPU is waited for
ENOUGH = 0.97  # share of a batch that must be right for the length to grow


@dataclass(frozen=True)
class LSTMConfig(Config):
    """Train an LSTM on palindromes."""

    preset: Annotated[str, MUTABLE] = "fast"
    """Recipe that the other defaults come from: fast (solves any length in few steps), course (that of the
    course report), smoke (takes seconds, to see that it runs)."""

    steps: Annotated[Count, MUTABLE] = 150
    batch_size: BatchSize = 128
    log_every: Annotated[Count, MUTABLE] = 10
    evaluate_every: Annotated[Count, MUTABLE] = 50
    checkpoint_every: Annotated[Count, MUTABLE] = 50
    max_grad_norm: Positive | None = 0.25
    schedule: ScheduleName = "wsd"

    length: Annotated[int, Interval(ge=1, le=10_000_000)] = 50
    """Digits the model sees; the palindrome has one more, which the model predicts."""

    model: Literal["lstm", "rnn"] = "lstm"
    """lstm, or rnn: the Elman network that the course report compares it with."""

    kernel: Annotated[Literal["fused", "equations"], MUTABLE] = "fused"
    """How the LSTM is computed: by torch's fused kernel, or by its equations; equal up to rounding."""

    hidden_size: Annotated[int, Interval(ge=1, le=65_536)] = 128
    """Width of the hidden state."""

    encoding: Literal["onehot", "scalar"] = "onehot"
    """A digit as the network's input: onehot, or scalar (the digit itself)."""

    initialisation: Literal["length", "linear"] = "length"
    """length: the gates remember for about --length steps from the start; linear: as nn.Linear does."""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Optimizer: adam or rmsprop."""

    learning_rate: Positive = 4e-2
    """Learning rate of the optimizer."""

    curriculum: Annotated[float, Interval(ge=1, le=1e9)] = 2.0
    """Factor by which a short start length grows to --length, each time that 97 % of a batch are right (every
    second batch is looked at); 1: no curriculum."""


FAST = LSTMConfig()


class LSTMTask(Task[LSTMConfig]):
    """One step: a batch of palindromes, the cross-entropy of the last digit."""

    name = "lstm"
    presets: ClassVar = {
        "fast": FAST,
        "course": replace(
            FAST, steps=1500, evaluate_every=100, checkpoint_every=100, encoding="scalar",
            initialisation="linear", optimizer="rmsprop", learning_rate=1e-3, max_grad_norm=10.0,
            schedule="constant", curriculum=1.0,
        ),
        "smoke": replace(
            FAST, steps=20, length=10, evaluate_every=10, checkpoint_every=10, schedule="constant",
        ),
    }  # fmt: skip

    def __init__(self, config: LSTMConfig, device: torch.device) -> None:
        super().__init__(config, device)
        with seeded(config.seed, "weights"):
            self.model = build_model(config).to(device)
        self.networks = {config.model: self.model}
        parameters = self.model.parameters()
        if config.optimizer == "adam":
            self.optimizers = {config.model: torch.optim.Adam(parameters, config.learning_rate, fused=True)}
        else:
            self.optimizers = {
                config.model: torch.optim.RMSprop(parameters, config.learning_rate, foreach=True)
            }
        self.data = Stream(config.seed, "palindromes/train")
        self.shortest = config.length if config.curriculum == 1 else min(SHORTEST, config.length)
        self.length = self.shortest
        self.right: dict[int, Tensor] = {}

    @classmethod
    def run_name(cls, config: LSTMConfig) -> str:
        """The name of a run's default folder."""
        kind = config.model if cls is LSTMTask else cls.name
        return f"{kind}-length{config.length}-{config.preset}-{config.seed}"

    def step(self, step: int, trainer: Updater) -> None:
        """One update, and every second time the curriculum's decision."""
        trainer.update(self.config.model, self.loss)
        decides = self.length < self.config.length and (step + 1) % LENGTHEN_EVERY == 0
        if decides and trainer.sum(self.right) >= ENOUGH * self.config.batch_size:
            self.length = min(self.config.length, int(self.length * self.config.curriculum) + 1)

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the last digit."""
        digits, last = palindromes(self.data, batch.samples, self.length)
        logits = self.model(digits)
        loss = F.cross_entropy(logits, last)
        self.right[batch.index] = count_correct(logits, last)
        return loss, {"loss": loss, "accuracy": accuracy(logits, last)}

    def evaluate(self, sum_over: SumOver) -> Evaluation:
        """Accuracy at the full length; see `palindrome_accuracy`."""
        stream = Stream(self.config.seed, "palindromes/evaluation")
        found = palindrome_accuracy(self.model, self.config.length, stream, sum_over)
        return Evaluation({"accuracy": found})

    def state_dict(self) -> dict[str, Any]:
        """The length that the curriculum has reached."""
        return {"length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the length that the curriculum had reached."""
        if type(length := state["length"]) is not int or not self.shortest <= length <= self.config.length:
            raise UserError(f"a curriculum of this run cannot reach length {printable(length)}")
        self.length = length


def build_model(config: LSTMConfig) -> nn.Module:
    """The model that the options ask for, freshly initialised."""
    input_size = DIGITS if config.encoding == "onehot" else 1
    if config.model == "rnn":
        return RNN(input_size, config.hidden_size, DIGITS)
    model = LSTM(input_size, config.hidden_size, DIGITS, kernel=config.kernel)
    if config.initialisation == "length":
        model.initialise_for_length(config.length)
    return model
