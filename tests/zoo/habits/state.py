"""State beside weights: what a loss or a step leaves on the task, on modules and elsewhere."""

import copy
import time
from collections import deque

import numpy as np
import torch
from entry import ALSO_PLAIN, REPEATED, equal, refused, unseen, warned
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils

from cs324dist import Evaluation
from habits.base import (
    CLASSES,
    FEATURES,
    Points,
    WithDropout,
    WithNorm,
    enter,
    enter_all,
    hidden,
    loss,
    rank,
    saving,
    step,
    value,
    with_,
)

AFTER = ("continued",)
AGAIN = refused(REPEATED)
LOST = unseen("a kill loses it, and no check can know of it")
SAID = equal(says="labels_now|features_now|auxiliary|calls|baseline|carried|last_loss")


@value("self.labels_now = … in a loss", SAID, with_norm=[SAID], threads=2)
def labels_on_task(task, batch):
    x, task.labels_now = task.samples(batch)
    logits = task.net(x)
    return F.cross_entropy(logits, task.labels_now)


def keep_features(task):
    task.features = {}
    task.net[0].register_forward_hook(lambda layer, inputs, output: setattr(task, "features_now", output))
    task.net[0].register_forward_hook(lambda layer, inputs, output: task.features.update(now=output))


@value("A hook that keeps features on the task", SAID, with_norm=[SAID], prepare=keep_features)
def hook_on_task(task, batch):
    return Points.value(task, batch) + task.features_now.square().mean()


@value("A hook that keeps features in a dict", with_norm=[equal(), AGAIN], prepare=keep_features)
def hook_in_dict(task, batch):
    return Points.value(task, batch) + task.features["now"].square().mean()


class Auxiliary(nn.Identity):
    def forward(self, x):
        self.auxiliary = x.square().mean()
        return x


class Calls(nn.Identity):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x / self.calls**0.5


@value(
    "A loss that a module keeps", SAID, with_norm=[SAID], prepare=lambda task: task.net.insert(1, Auxiliary())
)
def auxiliary_loss(task, batch):
    return Points.value(task, batch) + task.net[1].auxiliary


enter("counter_in_module", "A count of a module's calls, in Python", SAID, network=lambda _: hidden(Calls()))


@value("self.baseline = 0.9 * self.baseline + … in a loss", SAID, baseline=1.0)
def running_average(task, batch):
    value = Points.value(task, batch)
    task.baseline = 0.9 * task.baseline + 0.1 * value.item()
    return value / task.baseline


@value("A recurrent state that is carried from loss to loss", SAID, carried=0)
def carried_state(task, batch):
    x, y = task.samples(batch)
    features = task.net[0](x).tanh() + task.carried
    task.carried = features.mean(0).detach()
    return F.cross_entropy(task.net[2](features), y)


class Remembering(Points):
    def prepare(self):
        self.history, self.memory, self.last_loss = [], torch.ones(len(self.x)), 0.0


Showing = with_(Remembering, evaluate=lambda task, _: Evaluation({"last": task.last_loss}))


def with_last_loss(task, batch):
    value = Points.value(task, batch)
    task.last_loss = value.item()
    return value


def with_history(task, batch):
    value = Points.value(task, batch)
    task.history.append(value.item())
    return value


def with_memory(task, batch):
    items = task.order.items(batch)
    losses = F.cross_entropy(task.net(task.x[items]), task.y[items], reduction="none")
    value = (losses * task.memory[items]).mean()
    task.memory[items] = losses.detach()
    return value


def with_event(task, batch):
    if batch.step == 5:
        task.net[1].p = 0.1
    return Points.value(task, batch)


class Annealer:
    def __init__(self, wait, ramp):
        self.calls, self.wait, self.ramp = 0, wait, ramp

    def __call__(self):
        self.calls += 1
        return min(1.0, max(0.0, (self.calls - self.wait) / self.ramp))


def with_annealer(task, batch):
    x, y = task.samples(batch)
    logits = task.net(x)
    return F.cross_entropy(logits, y) + task.annealed() * logits.square().mean()


def with_scales(task, batch):
    value = Points.value(task, batch)
    losses = [value, value.square(), value.sqrt(), value / 2]
    found = sum(one / scale for one, scale in zip(losses, task.scales, strict=True))
    for kind, one in enumerate(losses) if batch.step > 2 else ():
        task.scales[kind] = 0.9 * task.scales[kind] + 0.1 * one.item()
    return found


def with_teachers(task, batch):
    x, y = task.samples(batch)
    logits = task.net(x)
    return F.cross_entropy(logits, y) + sum(F.mse_loss(logits, one(x).detach()) for one in task.teachers)


class Holding(Points):
    def prepare(self):
        self.annealed, self.scales = Annealer(12, 40), [1.0] * 4  # as many as parts
        self.teachers = [hidden(nn.BatchNorm1d(8)) for _ in range(2)]
        self.of_classes = dict.fromkeys(range(CLASSES), 0)


enter_all("value", {
    "annealer": ("An object that counts the calls of a loss", Holding, with_annealer,
        equal("annealed.calls, which the loss sets")),
    "list_as_long_as_parts": ("A list that is as long as there are parts, by kinds of losses", Holding,
        with_scales, equal("scales, which the loss sets")),
    "teachers_in_list": ("Networks with BatchNorm in a plain list", Holding, with_teachers,
        refused(r"teachers\[0\].1")),
})  # fmt: skip


@loss("A count of each class, for a metric", equal("of_classes, which the loss sets"), base=Holding)
def counts_of_classes(task, batch):
    _, y = task.samples(batch)
    for kind in y.tolist():
        task.of_classes[kind] += 1
    value = task.value(batch)
    return value, {"loss": value, "rarest": min(task.of_classes.values()) / sum(task.of_classes.values())}


def with_metric(metric):
    def loss(task, batch):
        value = task.value(batch)
        return value, {"loss": value, "other": metric(task, batch)}

    return loss


def share_of_diagonal(task, batch):
    x, y = task.samples(batch)
    np.add.at(task.confusion, (y.numpy(), task.net(x).argmax(1).numpy()), 1)
    return np.trace(task.confusion) / task.confusion.sum()


ACTIVATIONS = {}  # as in a thousand forum posts


def keep_activations(task):
    task.confusion = np.zeros((CLASSES, CLASSES))
    task.net[0].register_forward_hook(lambda _, __, output: ACTIVATIONS.update(first=output.detach()))


OF_METRIC = refused("the metric train/other of part|confusion")
enter_all("loss", {
    "confusion_in_metric": ("A confusion matrix of numpy, for a metric", Points,
        with_metric(share_of_diagonal), OF_METRIC),
    "global_dict_for_metric": ("A hook that keeps features in a global dict, for a metric, with BatchNorm",
        WithNorm, with_metric(lambda *_: (ACTIVATIONS["first"] < 0).float().mean()), OF_METRIC),
    "seconds_as_metric": ("A time as a metric", Points,
        with_metric(lambda *_: time.perf_counter()), OF_METRIC),
}, prepare=keep_activations)  # fmt: skip


enter_all("value", {
    "attribute_for_evaluation": ("An attribute for an evaluation", Showing, with_last_loss, SAID),
    "history_to_look_at": ("A list that grows in each loss", Remembering, with_history),
    "history_that_counts": ("A loss over the length of such a list", Remembering,
        lambda task, batch: with_history(task, batch) / len(task.history), AGAIN, equal()),
    "memory_of_samples": ("The last loss of each sample, in a tensor", Remembering, with_memory, AGAIN),
    "saved_memory_of_samples": ("The last loss of each sample, in state_dict",
        saving(Remembering, "memory"), with_memory, refused(f"{REPEATED}|memory")),
    "data_changed_in_place": ("A loss that changes the data", Points,
        lambda task, batch: task.x.mul_(1.01).mean() + Points.value(task, batch), AGAIN),
    "event_in_loss": ("self.net[1].p = 0.1 in a loss", WithDropout, with_event, equal(r"\bp\b")),
    "moved_in_loss": ("Weights moved in a loss", Points,
        lambda task, batch: Points.value(task, batch) + 0 * task.net[0].weight.data.mul_(0.99).sum(),
        refused("weight")),
})  # fmt: skip


class Eventful(WithDropout):
    """Something happens before step 2, of which the checkpoint of step 4 may know nothing."""

    def prepare(self):
        self.net.register_buffer("scale", torch.ones(()), persistent=False)

    def value(self, batch):
        return super().value(batch) * self.net.scale

    def step(self, step, trainer):
        if step == 2:
            self.event(self.net)
        super().step(step, trainer)


def flip_a_bit(tensor):
    tensor.data.view(torch.int32).flatten()[0] ^= int(rank() == 1) << 10


def of_momentum(task, net):
    flip_a_bit(task.optimizers["net"].state[net[0].weight]["momentum_buffer"])


enter_all("event", {
    "bit_of_a_weight": ("Another bit in a weight of one rank", Eventful,
        lambda task, net: flip_a_bit(net[0].weight), refused("weight", ALSO_PLAIN)),
    "bit_of_an_optimizer": ("Another bit in an optimizer of one rank", Eventful, of_momentum,
        refused("momentum_buffer|weight", ALSO_PLAIN)),
    "dropout_midway": ("self.net[1].p = 0.1 midway", Eventful, lambda task, net: setattr(net[1], "p", 0.1),
        equal(), refused(r"\bp\b|Dropout", AFTER), LOST),
    "frozen_midway": ("requires_grad changed midway", Eventful,
        lambda task, net: net[0].requires_grad_(False), equal(), refused("requires_grad", AFTER)),
    "eval_midway": ("net.eval() midway", Eventful, lambda task, net: net.eval(),
        equal(), refused("training|eval", AFTER)),
    "buffer_midway": ("A non-persistent buffer changed midway", Eventful, lambda task, net: net.scale.div_(2),
        equal(), refused("scale"), refused("scale", AFTER)),
    "head_anew": ("A layer that starts anew midway", Eventful, lambda task, net: net[-1].reset_parameters()),
})  # fmt: skip


class Counting(Points):
    count = 0

    def value(self, batch):
        return super().value(batch) / self.count

    def step(self, step, trainer):
        self.count += 1
        super().step(step, trainer)


enter("counter_in_step", "self.count += 1 in Task.step", base=Counting)
enter("saved_counter", "self.count += 1 in Task.step, in state_dict", base=saving(Counting, "count"))


class Averaging(Points):
    def prepare(self):
        average = swa_utils.get_ema_multi_avg_fn(0.9)
        self.networks["average"] = swa_utils.AveragedModel(self.net, multi_avg_fn=average)


@step("p and requires_grad set in each step, from its number", base=WithDropout)
def pure_function_of_step(task, step, trainer):
    task.net[1].p = 0.5 if step < 5 else 0.1
    task.net[0].requires_grad_(step >= 2)
    trainer.update("net", task.loss)


@step("Weights clipped, and averaged by AveragedModel, in Task.step", base=Averaging)
def averaged_in_step(task, step, trainer):
    trainer.update("net", task.loss)
    for weight in task.net.parameters():
        weight.data.clamp_(-0.3, 0.3)
    task.networks["average"].update_parameters(task.net)


@value("AveragedModel, updated in a loss", refused("average"), base=Averaging)
def averaged_in_loss(task, batch):
    task.networks["average"].update_parameters(task.net)
    return Points.value(task, batch)


enter("early_stop", "is_done", is_done=lambda task, evaluations: len(evaluations) >= 2)


class Teacher(Points):
    """DQN's target and BYOL's teacher: a copy that no optimizer trains, and that is not in networks."""

    def prepare(self):
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def value(self, batch):
        x, _ = self.samples(batch)
        return super().value(batch) + F.mse_loss(self.net(x), self.teacher(x))


@step("A target network that Task.step moves, not in networks", base=Teacher)
def target_network(task, step, trainer):
    trainer.update("net", task.loss)
    for target, weight in zip(task.teacher.parameters(), task.net.parameters(), strict=True):
        target.data.mul_(0.9).add_(weight.data, alpha=0.1)


@step("self.teacher = deepcopy(self.net) every three steps", base=Teacher)
def target_copied(task, step, trainer):
    trainer.update("net", task.loss)
    if step % 3 == 0:
        task.teacher = copy.deepcopy(task.net).requires_grad_(False)


class Shadow:
    def __init__(self, net):
        self.net, self.weights = net, {name: w.detach().clone() for name, w in net.named_parameters()}

    def update(self):
        for name, weight in self.net.named_parameters():
            self.weights[name] = 0.9 * self.weights[name] + 0.1 * weight.detach()


class Shadowed(Points):
    def prepare(self):
        self.shadow = Shadow(self.net)

    def evaluate(self, sum_over):
        logits = torch.func.functional_call(self.net, self.shadow.weights, (self.x,))
        return Evaluation({"loss": F.cross_entropy(logits, self.y).item()})


@step("Averaged weights in an object with a dict", base=Shadowed)
def averaging_object(task, step, trainer):
    trainer.update("net", task.loss)
    task.shadow.update()


class Annealed(nn.Linear):
    _heat, margin = 1.0, 0.0

    def forward(self, x):
        return super().forward(x) / self._heat


class Scaled(Points):
    """What `look` gives scales the loss; `change` changes it after each step."""

    keep = look = change = lambda task: 1.0

    def prepare(self):
        self.kept = self.keep()

    def value(self, batch):
        return super().value(batch) * (0.5 + abs(float(self.look())))

    def step(self, step, trainer):
        trainer.update("net", self.loss)
        self.change()


WORST = [1.0]


def anneal(task):
    task.net[0]._heat *= 0.9


def lose_worst(task):
    WORST[0] *= 0.9


def by_class(task):
    with torch.no_grad():
        losses = F.cross_entropy(task.net(task.x), task.y, reduction="none")
    for kind in task.kept:
        task.kept[kind] = 0.9 * task.kept[kind] + 0.1 * losses[task.y == kind].mean().item()


def swap(task):
    task.net[1] = nn.Tanh()


def mask(task):
    if not task.kept:
        task.kept = True
        chosen = (task.net[0].weight > 0).float()
        task.net[0].weight.register_hook(lambda gradient: gradient * chosen)


for name, (title, keep, look, change, *accepted) in {
    "deque_in_step": ("A deque that Task.step fills", lambda task: deque(maxlen=5),
        lambda task: len(task.kept), lambda task: task.kept.append(1.0)),
    "set_in_step": ("A set that Task.step fills", lambda task: set(),
        lambda task: len(task.kept) / 9, lambda task: task.kept.add(len(task.kept))),
    "array_in_step": ("A numpy array that Task.step changes", lambda task: np.ones(4),
        lambda task: task.kept.mean(), lambda task: np.multiply(task.kept, 0.9, out=task.kept)),
    "numpy_number_in_step": ("A number of numpy that Task.step changes", lambda task: np.float32(1),
        lambda task: task.kept.item(), lambda task: setattr(task, "kept", task.kept * np.float32(0.9))),
    "replay_in_step": ("A list of pairs of tensors that grows in Task.step", lambda task: [],
        lambda task: sum(one.mean() for one, _ in task.kept),
        lambda task: task.kept.append((task.net[0].weight.detach().clone(), task.y[0]))),
    "numbers_of_classes": ("A number for each class, {0: …}, that Task.step changes",
        lambda task: dict.fromkeys(range(CLASSES), 1.0), lambda task: task.kept[0], by_class),
    "tuple_in_step": ("A tuple that Task.step changes, a key", lambda task: (0, 0),
        lambda task: {task.kept: 0.1}[task.kept] * sum(task.kept),
        lambda task: setattr(task, "kept", (task.kept[0] + 1, 0))),
    "deleted_in_step": ("An attribute that Task.step deletes", lambda task: 0.0,
        lambda task: hasattr(task, "kept"), lambda task: vars(task).pop("kept", None)),
    "generator_in_step": ("A torch.Generator that Task.step draws from",
        lambda task: torch.Generator().manual_seed(0), lambda task: task.drawn,
        lambda task: setattr(task, "drawn", torch.rand((), generator=task.kept))),
    "numpy_generator_in_step": ("A generator of numpy that Task.step draws from",
        lambda task: np.random.default_rng(0), lambda task: task.drawn,
        lambda task: setattr(task, "drawn", task.kept.random())),
    "loss_module_in_step": ("A module of the loss, whose margin grows in Task.step",
        lambda task: Annealed(1, 1), lambda task: task.kept.margin,
        lambda task: setattr(task.kept, "margin", task.kept.margin + 0.1)),
    "private_of_module": ("net._heat, that Task.step changes", lambda task: None, lambda task: 1, anneal),
    "iterator_in_step": ("iter(DataLoader) that Task.step reads",
        lambda task: iter(torch.utils.data.DataLoader(task.x, 1)), lambda task: task.drawn,
        lambda task: setattr(task, "drawn", next(task.kept).mean()), warned(r"task\.kept")),
    "module_swapped": ("net[1] = … midway", lambda task: None, lambda task: 1, swap, warned(r"net\.1 ")),
    "hook_in_step": ("register_hook midway", lambda task: False, lambda task: 1, mask,
        warned(r"net\.0\.weight\._hooks")),
    "global_variable": ("A global variable that Task.step changes", lambda task: None,
        lambda task: WORST[0], lose_worst,
        unseen("a kill loses a variable outside the task, where no check looks")),
}.items():  # fmt: skip
    network = lambda _: hidden(first=lambda _: Annealed(FEATURES, 8))  # noqa: E731
    enter(
        name, title, *accepted, base=Scaled, keep=keep, look=look, change=change, drawn=0.0, network=network
    )
