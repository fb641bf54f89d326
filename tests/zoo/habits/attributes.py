"""Tasks with attributes of rare kinds, and with some that Task.step changes."""

import copy
from collections import OrderedDict, defaultdict, deque

import numpy as np
import torch
from entry import equal, refused, warned
from torch import nn
from torch.nn import functional as F

from cs324dist import Evaluation
from habits.base import CLASSES, FEATURES, Points, enter, hidden

QUIET = equal(r"^(?!(.|\n)*warning: \w+\.odd)")  # torch may warn of its own


class Kept(Points):
    """The loss depends on what Task.step has changed."""

    kept = None

    def value(self, batch):
        return super().value(batch) * (0.5 + abs(float(self.weight())))

    def step(self, step, trainer):
        trainer.update("net", self.loss)
        with torch.no_grad():
            self.change(step)


def prototypes(task, step):
    found = task.net(task.x)
    for kind in range(CLASSES):
        mean = found[task.y == kind].mean(0)
        task.kept[kind] = 0.9 * task.kept[kind] + 0.1 * mean if kind in task.kept else mean


def shadows(task, step):
    weights = list(task.net.parameters())
    task.kept = task.kept or [weight.clone() for weight in weights]
    for shadow, weight in zip(task.kept, weights, strict=True):
        shadow.lerp_(weight, 0.1)


def late_teacher(task, step):
    task.kept = task.kept or copy.deepcopy(task.net)
    for shadow, weight in zip(task.kept.parameters(), task.net.parameters(), strict=True):
        shadow.lerp_(weight, 0.1)


def perturbation(task, step):
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(F.cross_entropy(task.net(task.x + task.kept), task.y), task.kept)
    task.kept = (task.kept + 0.01 * slope.sign()).detach().requires_grad_()


def transposed(task, step):
    task.kept = (torch.randn(101, 37, generator=torch.Generator().manual_seed(step)) * 1e3).t()


def long_list(task, step):
    task.kept[step % 3] *= 0.9


for name, title, function, first, weight, *accepted in (
    ("prototypes", "A mean for each class, by its number", prototypes, {}, lambda kept: kept[0].mean()),
    ("shadows", "A list of averaged weights", shadows, None, lambda kept: kept[0].mean()),
    ("late_teacher", "An averaged copy that the first step makes", late_teacher, None,
        lambda kept: kept[0].weight.mean(), warned(r"kept\.0\.weight")),
    ("perturbation", "A perturbation that requires a gradient", perturbation,
        torch.zeros(FEATURES, requires_grad=True), lambda kept: kept.detach().mean()),
    ("transposed", "A transposed tensor, set in each step", transposed, None, lambda kept: kept.sum() % 1),
    ("long_list", "A list of 20 000 numbers, changed in Task.step", long_list, [1.0] * 20_000,
        lambda kept: kept[0], warned("kept")),
):  # fmt: skip
    enter(name, title, *accepted, base=Kept, change=function,
        weight=lambda task, of=weight: of(task.kept) if task.kept is not None and len(task.kept) else 1,
        prepare=lambda task, first=first: setattr(task, "kept", copy.deepcopy(first)))  # fmt: skip


class Replay(deque):
    def __init__(self, name, most):
        super().__init__(maxlen=most)
        self.name = name


class OwnByName(defaultdict):
    def __init__(self):
        super().__init__(int)


class Limited(OrderedDict):
    def __init__(self, most):
        super().__init__()
        self.most = most


def family():
    """Nodes that know each other."""
    root = {"parent": None, "children": []}
    for _ in range(3):
        child = {"parent": root, "children": []}
        root["children"].append(child)
        child["children"] += [{"parent": child, "children": []} for _ in range(4)]
    return root


for name, title, make in (
    ("sparse", "A sparse tensor", lambda: torch.eye(8).to_sparse()),
    ("sparse_rows", "A sparse tensor by rows", lambda: torch.eye(8).to_sparse_csr()),
    ("quantised", "A quantised tensor",
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    ("conjugated", "A conjugated tensor", lambda: torch.fft.rfft(torch.arange(8.0)).conj()),
    ("many_words", "An array of many words", lambda: np.array(["a", "bc"] * 10_000)),
    ("many_complex", "An array of many complex numbers", lambda: np.ones(20_000, "complex64")),
    ("own_deque", "A deque with a constructor of its own", lambda: Replay("a", 3)),
    ("own_defaultdict", "A defaultdict with a constructor of its own", OwnByName),
    ("own_in_list", "Ordered dicts with constructors of their own, in a list", lambda: [Limited(3)]),
    ("own_ordered", "An OrderedDict with a constructor of its own", lambda: Limited(3)),
    ("family", "Dicts that hold their parents", family),
    ("script", "A module of TorchScript", lambda: torch.jit.script(hidden())),
    ("lazy_attribute", "A lazy layer outside networks", lambda: nn.LazyLinear(3)),
):  # fmt: skip
    enter(name, f"{title} on the task", QUIET, prepare=lambda task, make=make: setattr(task, "odd", make()))


class Counted(Points):
    def prepare(self):
        self.counts, self.weights = {"seen": np.zeros(CLASSES)}, torch.ones(CLASSES)

    def value(self, batch):
        x, y = self.samples(batch)
        self.counts["seen"] += np.bincount(y, minlength=CLASSES)
        return F.cross_entropy(self.net(x), y, weight=self.weights, reduction="sum") / len(y)

    def step(self, step, trainer):
        trainer.update("net", self.loss)
        self.weights = torch.tensor(self.counts["seen"].sum() / (1 + self.counts["seen"])).float()


enter("numpy_counts", "Counts in an array, for the next step", refused("counts"), base=Counted)


class FrozenNorm(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


class Fixed(Points):
    """The usual line of fine-tuning freezes BatchNorm."""

    def network(self):
        return FrozenNorm(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

    def step(self, step, trainer):
        self.net.train()
        trainer.update("net", self.loss)
        assert not self.net[1].running_mean.any()


enter("frozen_norm", "BatchNorm that train() leaves in eval mode, by its class", base=Fixed)


def scaled(task):
    net = hidden()
    net.forward = lambda x: nn.Sequential.forward(net, x) * 5
    return net


def compared(task, sum_over):
    is_own = torch.equal(task.net(task.x), nn.Sequential.forward(task.net, task.x) * 5)
    return Evaluation({"own": float(is_own) / is_own})


enter(
    "own_forward",
    "net.forward = …, in an evaluation too",
    network=scaled,
    evaluate=compared,
)
