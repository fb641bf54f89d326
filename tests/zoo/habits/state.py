"""State beside weights: what a loss or a step leaves on the task, on modules and elsewhere."""

import torch
from entry import ALSO_PLAIN, REPEATED, equal, refused, unseen
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils

from cs324dist import Evaluation
from habits.base import Points, WithDropout, enter, enter_all, hidden, rank, saving, step, value, with_

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
