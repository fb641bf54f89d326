"""Tasks without a habit, of which the others override a method or two."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from entry import ZOO, Habit, equal
from torch import nn
from torch.nn import functional as F

from cs324dist import Config, ShuffledEpochs, Task, seeded

CLASSES, FEATURES, SAMPLES = 3, 4, 60
EVERY: Any = {"log_every": 1, "evaluate_every": 4, "checkpoint_every": 4, "keep_last": 9, "peer_timeout": 30}
UNTRACKED = {"wandb": "disabled"} if hasattr(Config, "wandb") else {}
OPTIONS = Config(steps=12, batch_size=12, **EVERY, **UNTRACKED)


class Points(Task[Config]):
    """A net of two layers, and points of three kinds."""

    name = "habit"
    presets: ClassVar = {"fast": OPTIONS}

    def __init__(self, config, device):
        super().__init__(config, device)
        with seeded(0, "data"):
            self.x, self.y = self.data()
        self.order = ShuffledEpochs(config.seed, "data", SAMPLES)
        with seeded(config.seed, "weights"):
            self.net = self.network()
        self.networks = {"net": self.net}
        self.optimizers = {"net": self.optimizer(self.net.parameters())}
        self.prepare()

    def prepare(self):
        """What else __init__ does."""

    def data(self):
        x = torch.randn(SAMPLES, FEATURES)
        return x, x[:, :CLASSES].argmax(1)

    def network(self):
        return hidden()

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)

    def samples(self, batch):
        items = self.order.items(batch)
        return self.x[items], self.y[items]

    def loss(self, batch):
        value = self.value(batch)
        return value, {"loss": value}

    def value(self, batch):
        x, y = self.samples(batch)
        return F.cross_entropy(self.net(x), y)


def hidden(*between, first=lambda layer: layer):
    """A net of two layers with others in between."""
    return nn.Sequential(first(nn.Linear(FEATURES, 8)), *between, nn.ReLU(), nn.Linear(8, CLASSES))


def pictures(task):
    x = torch.randn(SAMPLES, 1, 6, 6)
    return x, x[:, 0, :CLASSES, 0].argmax(1)


def sentences(task):
    x = torch.randint(0, 10, (SAMPLES, 6))
    return x, x[:, 2] % CLASSES


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def with_(base: type, **members: Any) -> type:
    return type(base.__name__, (base,), members)


Pictures, Words = with_(Points, data=pictures), with_(Points, data=sentences)
WithNorm = with_(Points, network=lambda _: hidden(nn.BatchNorm1d(8)))
WithDropout = with_(Points, network=lambda _: hidden(nn.Dropout(0.3)))


def saving(base: type, name: str) -> type:
    """With an attribute that state_dict holds."""
    save = lambda task: {name: getattr(task, name)}  # noqa: E731
    return with_(base, state_dict=save, load_state_dict=lambda task, state: setattr(task, name, state[name]))


def enter(name: str, title: str, *accepted: Any, base: type = Points, with_norm: Any = (), **members: Any):
    """Enter a task, and another one with BatchNorm if it is said what that may come to; by default: equal."""
    how = {key: members.pop(key) for key in {field.name for field in fields(Habit)} & members.keys()}
    assert name not in ZOO, f"two habits are called {name}"
    ZOO[name] = Habit(type(name, (base,), {**members, "__doc__": title}), accepted or [equal()], **how)
    if with_norm:
        enter(f"{name}_with_norm", f"{title}, with BatchNorm", *with_norm, base=WithNorm, **members)


def enter_all(method: str, rows: Mapping[str, tuple[Any, ...]], **others: Any) -> None:
    """Enter tasks by name: a title, the base, the method, and what it may come to."""
    for name, (title, base, function, *accepted) in rows.items():
        enter(name, title, *accepted, base=base, **{method: function}, **others)


def overriding(method: str) -> Callable[..., Any]:
    """A decorator that enters a task of which the function is this method; it takes what `enter` takes."""

    def of(title: str, *accepted: Any, **members: Any):
        def entered(function: Any) -> Any:
            enter(function.__name__, title, *accepted, **{method: function}, **members)
            return function

        return entered

    return of


enter("points", "A net of two layers")
value, loss, step = map(overriding, ("value", "loss", "step"))
