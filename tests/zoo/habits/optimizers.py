"""Optimizers, groups of parameters, rates, and the dtypes of parameters."""

import os
from dataclasses import replace

import torch
from entry import equal, refused, unseen
from torch import nn, optim

from habits.base import CLASSES, FEATURES, OPTIONS, Pictures, Points, Words, enter, enter_all, step, with_
from habits.state import AFTER, Eventful


def rate_of_world(weights):
    return optim.SGD(weights, 0.1 * int(os.environ.get("WORLD_SIZE", "1")))


class Own(optim.Optimizer):
    """With state in Python numbers as well."""

    def __init__(self, weights):
        super().__init__(weights, {"lr": 0.01, "taken": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] += 1
            for weight in group["params"]:
                state = self.state[weight]
                state["moves"] = state.get("moves", 0.0) + 0.5
                state.setdefault("average", torch.zeros_like(weight)).lerp_(weight.grad, 0.1)
                weight -= group["lr"] / group["taken"] / state["moves"] * state["average"].sign()


class Numbered(optim.Optimizer):
    """Counts its steps in an attribute of its own."""

    def __init__(self, weights):
        super().__init__(weights, {"lr": 0.1})
        self.taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        for weight in self.param_groups[0]["params"]:
            weight -= self.param_groups[0]["lr"] / self.taken * weight.grad


class Rated(optim.Optimizer):
    """Schedule-Free has a rate of its own in each group, and others, such as Adafactor, may have none."""

    def __init__(self, weights, **group):
        super().__init__(weights, {"scheduled_lr": 0.0, **group})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["scheduled_lr"] = (group.get("lr") or 0.1) / 2
            for weight in group["params"]:
                self.state[weight].setdefault("sum", torch.zeros_like(weight)).add_(weight.grad)
                weight.sub_(self.state[weight]["sum"], alpha=0.1 * group["scheduled_lr"])


class Worded(optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        self.state["taken"] = 1


class Lookahead(optim.SGD):
    """Slow weights that come at the sixth step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        group = self.param_groups[0]
        group["taken"] = group.get("taken", 0) + 1
        for weight in group["params"] if group["taken"] % 6 == 0 else ():
            slow = self.state[weight].setdefault("slow", weight.detach().clone())
            weight.copy_(slow.lerp_(weight, 0.5))


class Wrapping(Lookahead):
    """Steps another optimizer."""

    def __init__(self, weights):
        weights = list(weights)
        super().__init__(weights, 0.1)
        self.inner = optim.Adam(weights)


def clipping(weights):
    def clip(optimizer, *_):
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)

    (optimizer := optim.SGD(weights, 0.1)).register_step_pre_hook(clip)
    return optimizer


def grouped(weights):
    weights = list(weights)
    groups = [{"params": weights[::2], "weight_decay": 0.1, "lr": 0.05}, {"params": weights[1::2]}]
    return optim.AdamW(groups, 0.01, weight_decay=0)


def several(weights):
    weights = list(weights)
    return optim.Muon(weights[::2]), optim.AdamW(weights[1::2])


def scheduled(weights):
    optim.lr_scheduler.StepLR(optimizer := optim.SGD(weights, 0.1), 2)
    return optimizer


KINDS = {
    "adam": (optim.Adam,),
    "fused_adam": (lambda weights: optim.Adam(weights, fused=True),),
    "foreach_adam": (lambda weights: optim.Adam(weights, foreach=True, amsgrad=True),),
    "adamw": (optim.AdamW,),
    "nesterov": (lambda weights: optim.SGD(weights, 0.1, momentum=0.9, nesterov=True),),
    "rmsprop": (lambda weights: optim.RMSprop(weights, momentum=0.9, centered=True),),
    "adagrad": (optim.Adagrad,),
    "adadelta": (optim.Adadelta,),
    "adamax": (optim.Adamax,),
    "nadam": (optim.NAdam,),
    "radam": (optim.RAdam,),
    "asgd": (optim.ASGD,),
    "rprop": (optim.Rprop,),
    "adafactor": (optim.Adafactor,),
    "lbfgs": (optim.LBFGS, refused("closure|LBFGS")),
    "own_optimizer": (Own,),
    "schedule_free": (lambda weights: Rated(weights, lr=0.1),),
    "rate_of_none": (lambda weights: Rated(weights, lr=None),),
    "no_rate": (Rated,),
    "optimizer_with_state_by_word": (Worded, refused("taken")),
    "optimizer_that_counts": (Numbered,),
    "optimizer_with_late_state": (Lookahead, refused("slow")),
    "optimizer_in_an_optimizer": (Wrapping, refused("inner")),
    "groups_with_rates_and_decays": (grouped,),
    "two_optimizers_for_one_update": (several,),
    "optimizer_of_some_parameters": (lambda weights: optim.SGD(list(weights)[2:], 0.1),),
    "optimizer_that_clips": (clipping,),
    "scheduler": (scheduled, refused("scheduler")),
}
for name, (kind, *accepted) in KINDS.items():
    enter(name, name.replace("_", " "), *accepted, optimizer=lambda task, weights, kind=kind: kind(weights))


AdamOfSome = with_(Eventful, optimizer=lambda _, weights: optim.Adam(list(weights)[:2], 0.01))


def in_group(key, value):
    return lambda task, net: task.optimizers["net"].param_groups[0].update({key: value})


def late_scheduler(task, net):
    optim.lr_scheduler.StepLR(task.optimizers["net"], 2)


def new_group(**entries):
    return lambda task, net: task.optimizers["net"].add_param_group(
        {"params": [*net[-1].parameters()], **entries}
    )


def late_optimizer(task, net):
    task.optimizers["net"] = optim.Adam(net.parameters())


enter_all("event", {
    "initial_rate_midway": ("initial_lr set midway", AdamOfSome, in_group("initial_lr", 0.1),
        equal(), refused("initial_lr", AFTER)),
    "decay_midway": ("A weight decay changed midway", AdamOfSome, in_group("weight_decay", 0.1)),
    "betas_midway": ("betas changed midway", AdamOfSome, in_group("betas", (0.5, 0.9)),
        equal(), refused("betas", AFTER)),
    "scheduler_midway": ("A scheduler made midway", Eventful, late_scheduler, refused("scheduler|rate")),
    "group_midway": ("add_param_group midway", AdamOfSome, new_group(), refused("group|optimizer")),
    "whole_group_midway": ("add_param_group midway, with initial_lr", AdamOfSome, new_group(initial_lr=0.01),
        refused("group|optimizer")),
    "optimizer_midway": ("Another optimizer midway", Eventful, late_optimizer,
        equal(), refused("group|optimizer")),
    "state_cleared_midway": ("optimizer.state.clear() midway", AdamOfSome,
        lambda task, net: task.optimizers["net"].state.clear()),
})  # fmt: skip


class Plateau(Points):
    def prepare(self):
        self.plateau = optim.lr_scheduler.ReduceLROnPlateau(self.optimizers["net"], patience=0, threshold=1)


enter("plateau", "ReduceLROnPlateau", refused("scheduler"), base=Plateau)


class Hooked(Points):
    """A hook of the optimizer counts its steps."""

    updates = 0

    def prepare(self):
        self.optimizers["net"].register_step_post_hook(lambda *_: self.count())

    def count(self):
        self.updates += 1

    def value(self, batch):
        return super().value(batch) / (1 + self.updates)


enter("optimizer_hook_that_counts", "A count in register_step_post_hook", base=Hooked)


@step("A rate set by hand, in group['lr']", refused(r"\blr\b|\brates?\b"))
def rate_by_hand(task, step, trainer):
    task.optimizers["net"].param_groups[0]["lr"] = 0.1 / (1 + step)
    trainer.update("net", task.loss)


class To(nn.Linear):
    """A layer of another dtype."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def of_dtypes(*dtypes):
    return lambda task: nn.Sequential(To(FEATURES, 8, dtype=dtypes[0]), To(8, CLASSES, dtype=dtypes[-1]))


Plainly = with_(Words, optimizer=lambda _, weights: optim.SGD(weights, 0.1))
LIMITED = replace(OPTIONS, max_grad_norm=0.1, schedule="cosine", warmup_steps=3)
enter_all("network", {
    "float64": ("Parameters of float64", Points, of_dtypes(torch.float64)),
    "float16": ("Parameters of float16", Points, of_dtypes(torch.float16)),
    "bfloat16": ("Parameters of bfloat16", Points, of_dtypes(torch.bfloat16)),
    "two_dtypes": ("Parameters of float64 and float32", Points, of_dtypes(torch.float64, torch.float32)),
    "complex": ("Complex parameters", Points, of_dtypes(torch.cfloat, torch.float32)),
    "sparse_gradients": ("Sparse gradients of an embedding", Plainly,
        lambda _: nn.Sequential(nn.EmbeddingBag(10, 8, sparse=True), To(8, CLASSES)), refused("sparse")),
    "limited": ("--max-grad-norm, and a schedule with warm-up", with_(Pictures, presets={"fast": LIMITED}),
        lambda _: nn.Sequential(nn.Flatten(), nn.Linear(36, 1024), nn.Linear(1024, CLASSES))),
}, threads=2)  # fmt: skip


enter(
    "rate_of_world",
    "A rate that is multiplied by WORLD_SIZE, as for DDP",
    unseen("a run has one number of processes; the batch is the same on any, so leave the rate"),
    optimizer=lambda _, weights: rate_of_world(weights),
)
