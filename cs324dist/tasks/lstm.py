"""The LSTM (or the Elman network) on palindromes: the report's Part I."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.command_line import POSITIVE, Count, OneOf, Within
from cs324dist.data.palindromes import DIGITS, encode, palindromes
from cs324dist.data.streams import Stream
from cs324dist.distributed.process import in_full_precision, seeded, shard
from cs324dist.metrics.accuracy import count_right_palindromes, share_right
from cs324dist.models.lstm import LSTM
from cs324dist.models.rnn import RNN
from cs324dist.runs.models import LARGEST_SIZE
from cs324dist.settings import MUTABLE, BatchSize, RunSettings
from cs324dist.tasks.base import Evaluation, UntilStopped

SHORTEST = 4  # digits; where a curriculum starts
LENGTHEN_EVERY = 2  # steps from one decision of the curriculum to the next, for which a GPU is waited for
ENOUGH = 0.97  # of a batch right, for it to go on


@dataclass(frozen=True)
class LSTMSettings(RunSettings):
    """Train an LSTM on palindromes."""

    preset: Annotated[str, OneOf("fast", "course", "smoke"), MUTABLE] = "fast"
    """Recipe that the other defaults come from: fast (solves any length in few steps), report (the report's),
    smoke (seconds, to see that it runs)."""

    steps: Annotated[Count, MUTABLE] = 150
    batch_size: BatchSize = 128
    log_every: Annotated[Count, MUTABLE] = 10
    evaluate_every: Annotated[Count, MUTABLE] = 50
    checkpoint_every: Annotated[Count, MUTABLE] = 50

    length: Annotated[int, Within(1, 10_000_000)] = 50
    """Digits the model sees; the palindrome has one more, which the model predicts."""

    model: Annotated[str, OneOf("lstm", "rnn")] = "lstm"
    """lstm, or rnn: the Elman network the report compares with."""

    kernel: Annotated[str, OneOf("fused", "equations"), MUTABLE] = "fused"
    """How the LSTM runs: torch's fused kernel, or the equations as written; equal to rounding."""

    hidden_size: Annotated[int, Within(1, LARGEST_SIZE)] = 128
    """Width of the hidden state."""

    encoding: Annotated[str, OneOf("onehot", "scalar")] = "onehot"
    """A digit as the network's input: onehot, or scalar (the digit itself)."""

    initialisation: Annotated[str, OneOf("length", "linear")] = "length"
    """length: the gates remember for about --length steps from the start; linear: as nn.Linear does."""

    optimizer: Annotated[str, OneOf("adam", "rmsprop")] = "adam"
    """Optimizer."""

    learning_rate: Annotated[float, POSITIVE] = 4e-2
    """Step size of the optimizer."""

    max_grad_norm: Annotated[float, POSITIVE] = 0.25
    """Largest norm of the whole gradient."""

    curriculum: Annotated[float, Within(1.0, 1e9)] = 2.0
    """Factor by which a short start length grows to --length, whenever every second batch is 97 % right; 1:
    none."""

    memory_options: ClassVar[tuple[str, ...]] = ("batch_size", "length", "hidden_size")

    def run_name(self) -> str:
        """The default run folder's name."""
        return f"{self.model}-length{self.length}-{self.preset}-{self.seed}"


FAST = LSTMSettings()
PRESETS = {
    "fast": FAST,
    "course": replace(
        FAST,
        preset="course",
        steps=1500,
        evaluate_every=100,
        checkpoint_every=100,
        encoding="scalar",
        initialisation="linear",
        optimizer="rmsprop",
        learning_rate=1e-3,
        max_grad_norm=10.0,
        curriculum=1.0,
    ),
    "smoke": replace(FAST, preset="smoke", steps=20, length=10, evaluate_every=10, checkpoint_every=10),
}


class LSTMTask:
    """One step: a batch of palindromes, cross-entropy of the last digit, one clipped optimizer step."""

    def __init__(
        self, settings: LSTMSettings, accelerator: Accelerator, dtype: torch.dtype = torch.float32
    ) -> None:
        self.settings, self.accelerator, self.dtype = settings, accelerator, dtype
        self.shard = shard(accelerator)
        self.data = Stream(settings.seed, "palindromes/train")
        with seeded(settings.seed, "weights"):
            model = build_model(settings).to(dtype)
        if settings.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                model.parameters(), settings.learning_rate, fused=True
            )
        else:
            optimizer = torch.optim.RMSprop(model.parameters(), settings.learning_rate, foreach=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.models: dict[str, nn.Module] = {settings.model: model}
        self.optimizers = {settings.model: optimizer}
        start = settings.length if settings.curriculum == 1 else min(SHORTEST, settings.length)
        self.counters = {"length": start}
        self.counter_limits = {"length": range(start, settings.length + 1)}

    def step(self, step: int) -> dict[str, Tensor]:
        """See `Task.step`."""
        settings, length = self.settings, self.counters["length"]
        digits, last = palindromes(self.data, self.shard.batch(step, settings.batch_size), length)
        logits = self.model(encode(digits, settings.encoding, self.dtype))
        loss = F.cross_entropy(logits, last)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if length < settings.length and (step + 1) % LENGTHEN_EVERY == 0:
            right = self.accelerator.reduce((logits.argmax(dim=1) == last).sum(), "sum")
            if right >= ENOUGH * settings.batch_size:
                self.counters["length"] = min(settings.length, int(length * settings.curriculum) + 1)
        return {"train/loss": loss, "train/accuracy": share_right(logits, last)}

    def evaluate(self, until_stopped: UntilStopped = iter) -> Evaluation:
        """Accuracy at the full length; see `count_right_palindromes`."""
        settings = self.settings
        predict = partial(in_full_precision, self.models[settings.model])
        stream = Stream(settings.seed, "palindromes/evaluation")
        right, trials = count_right_palindromes(
            predict, settings.encoding, settings.length, stream, self.shard, self.dtype, until_stopped
        )
        return Evaluation({"eval/accuracy": self.accelerator.reduce(right, "sum").item() / trials})


def build_model(settings: LSTMSettings) -> nn.Module:
    """The model that the settings ask for, freshly initialised."""
    input_size = DIGITS if settings.encoding == "onehot" else 1
    if settings.model == "rnn":
        return RNN(input_size, settings.hidden_size, DIGITS)
    model = LSTM(input_size, settings.hidden_size, DIGITS, kernel=settings.kernel)
    if settings.initialisation == "length":
        model.initialise_for_length(settings.length)
    return model
