"""Losses: what they return, how they come to a gradient, and what a step does with them."""

import torch
import torch.distributed as dist
from entry import ALSO_PLAIN, ON_SEVERAL, RANKS, REPEATED, equal, refused
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from habits.base import CLASSES, FEATURES, Points, WithNorm, enter, enter_all, loss, rank, step, value

EARLIER = refused("backward|gradient")
OWN = refused(f"{RANKS}|{REPEATED}|did not answer", ON_SEVERAL)


class Wide(Points):
    def network(self):
        between = (nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
        return nn.Sequential(nn.Linear(FEATURES, 128), *between, nn.Linear(128, CLASSES))


class Own(Wide):
    def value(self, batch):
        return self.of(self.net, *self.samples(batch))


def contrastive(task, net, x, y):
    z = F.normalize(net(x), dim=1)
    return F.cross_entropy(z @ (z + 0.1).T / 0.5, torch.arange(len(x)))


def vae(task, net, x, y):
    mean, spread = net(x)[:, :1], net(x)[:, 1:2]
    z = mean + torch.randn_like(mean) * spread.exp()
    return F.mse_loss(z.expand_as(x), x) - 0.5 * (1 + 2 * spread - mean**2 - (2 * spread).exp()).mean()


def gumbel(task, net, x, y):
    return (F.gumbel_softmax(net(x), hard=True)[:, 0] - y).square().mean()


def gradient_in_hook(task, net, x, y):
    features = net[:2](x)

    @torch.enable_grad()
    def with_another(gradient):
        inputs = features.detach().requires_grad_()
        return gradient + torch.autograd.grad(net[2:](inputs).square().mean(), inputs)[0]

    features.register_hook(with_another)
    return F.cross_entropy(net[2:](features), y)


@torch.autocast("cpu", torch.bfloat16)
def autocast(task, net, x, y):
    return torch.fft.fft(net(x).float()).abs().mean()


def of_each_sample(task, net, x, y):
    def loss_of(weights, x, y):
        return F.cross_entropy(torch.func.functional_call(net, weights, x[None]), y[None])

    slopes = torch.func.vmap(torch.func.grad(loss_of), (None, 0, 0))(dict(net.named_parameters()), x, y)
    return F.cross_entropy(net(x), y) + sum(slope.square().mean() for slope in slopes.values())


def of_some(task, net, x, y):
    some = y == 0
    return F.cross_entropy(net(x[some]), y[some]) if some.sum() > 1 else torch.tensor(0.0)


def backward(task, net, x, y):
    value = F.cross_entropy(net(x), y)
    value.backward()
    return value.detach()


def backward_and_more(task, net, x, y):
    value = F.cross_entropy(net(x), y)
    value.backward(retain_graph=True)
    return value


def wrong_gradient(task, net, x, y):
    logits = net(x)
    logits.register_hook(lambda gradient: gradient * (1 + (rank() == 1) * 2**-20))
    return F.cross_entropy(logits, y)


def all_reduce(task, net, x, y):
    value = F.cross_entropy(net(x), y)
    if dist.is_initialized():
        dist.all_reduce(total := value.detach().clone())
        value = value / total
    return value


enter_all("of", {
    "label_smoothing": ("Label smoothing", Own,
        lambda task, net, x, y: F.cross_entropy(net(x), y, label_smoothing=0.1)),
    "contrastive": ("A contrastive loss over the part", Own, contrastive),
    "autoencoder": ("An autoencoder", Own, lambda task, net, x, y: F.mse_loss(net(x), x[:, :CLASSES])),
    "vae": ("A VAE, with randn_like", Own, vae),
    "gumbel": ("gumbel_softmax", Own, gumbel),
    "autocast": ("torch.autocast, and complex numbers, in a loss", Own, autocast),
    "gradient_in_hook": ("autograd.grad inside the backward pass", Own, gradient_in_hook),
    "gradient_of_each_sample": ("torch.func: functional_call, vmap and grad", Own, of_each_sample),
    "constant_in_some_parts": ("A constant loss where no sample is of some class", Own, of_some),
    "backward_in_loss": (".backward() in a loss", Own, backward, EARLIER),
    "backward_and_more_in_loss": (".backward(retain_graph=True) in a loss", Own, backward_and_more, EARLIER),
    "wrong_gradient_of_one_rank": ("A gradient that is wrong in one rank's parts", Own, wrong_gradient,
        refused(REPEATED, ON_SEVERAL)),
    "all_reduce_in_loss": ("dist.all_reduce in a loss", Own, all_reduce, OWN),
})  # fmt: skip
enter_all("value", {
    "constant_in_a_step": ("A constant loss in all parts of a step", Points,
        lambda task, batch: torch.zeros(()) if batch.step == 3 else Points.value(task, batch)),
    "plain_zero": ("return 0.0, {} where there is nothing to learn", Points,
        lambda task, batch: 0.0 if batch.step == 3 else Points.value(task, batch),
        equal(), refused("number|tensor")),
    "becomes_nan": ("A loss that becomes NaN", Points,
        lambda task, batch: Points.value(task, batch) * (float("nan") if batch.step == 3 else 1),
        refused("nan|finite")),
    "part_that_ends_early": ("A part that never comes to BatchNorm", WithNorm,
        lambda task, batch: torch.zeros(()) if batch.index == 2 else Points.value(task, batch),
        refused("norm|layer")),
    "loss_of_step": ("A loss that reads batch.step and batch.index", Points,
        lambda task, batch: Points.value(task, batch) / (1 + batch.step + batch.index)),
})  # fmt: skip
enter("bf16", "--mixed_precision bf16", precision="bf16")


@value("A network that is called for each of two views, with BatchNorm, in bf16", precision="bf16",
       base=WithNorm, network=lambda _: nn.Sequential(  # wide, so that bf16 rounds its sums
           nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES)))  # fmt: skip
def two_views_in_bf16(task, batch):
    x, y = task.samples(batch)
    one, other = (task.net(x + 0.1 * torch.randn_like(x)) for _ in range(2))
    return F.cross_entropy(one, y) + F.cross_entropy(other, y) + F.mse_loss(one, other)


@value("A gradient penalty, with create_graph", with_norm=[refused("BatchNorm")])
def gradient_penalty(task, batch):
    x, y = task.samples(batch)
    (slope,) = torch.autograd.grad(task.net(x.requires_grad_()).square().sum(), x, create_graph=True)
    return F.cross_entropy(task.net(x), y) + (slope.norm(dim=1) - 1).square().mean()


@value("autograd.grad of a loss to all parameters, with a Linear before BatchNorm",
       refused("a bias directly before BatchNorm"), base=WithNorm)  # fmt: skip
def balanced_by_gradients(task, batch):
    value = Points.value(task, batch)
    slopes = torch.autograd.grad(value, list(task.net.parameters()), retain_graph=True)
    return value / (1 + sum(slope.square().sum() for slope in slopes)).sqrt()


@value("parametrize.cached, with BatchNorm", refused("parametrize.cached has kept"), base=WithNorm,
       network=lambda _: nn.Sequential(parametrizations.weight_norm(nn.Linear(FEATURES, 8)),
                                       nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)))  # fmt: skip
def cached_parametrization(task, batch):
    with parametrize.cached():
        return Points.value(task, batch)


@loss("A loss over some samples: (sum, weight)")
def masked(task, batch):
    x, y = task.samples(batch)
    some = x[:, 0] < 0.7
    total = F.cross_entropy(task.net(x[some]), y[some], reduction="sum")
    return (total, some.sum()), {"loss": (total, some.sum())}


@loss("(sum, weight) in some parts, a mean in others", refused(r"pair|\(sum, weight\)"))
def pair_in_some_parts(task, batch):
    value = task.value(batch)
    return (value if batch.index else (value * 3, 3)), {}


@loss("An accuracy where a weight is meant: (loss, accuracy)", equal("weight of a sum"))
def accuracy_as_weight(task, batch):
    x, y = task.samples(batch)
    logits = task.net(x)
    return (F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean() + 0.1), {}


@loss("Three values for a loss", refused("3 values"))
def three_values(task, batch):
    value = task.value(batch)
    return (value, value.detach(), 1), {}


@loss("Metrics that some parts lack", refused("metrics"))
def metrics_of_some_parts(task, batch):
    value = task.value(batch)
    return value, {"loss": value} if batch.index != 1 else {}


class Hooked(Wide):
    """A hook that halves gradients, and that must have been called."""

    called = 0

    def halve(self, gradient):
        Hooked.called += 1
        return gradient / 2

    def step(self, step, trainer):
        before = Hooked.called
        super().step(step, trainer)
        assert Hooked.called > before, "the hook was not called"


def parameter_hook(task):
    for weight in task.net.parameters():
        weight.register_hook(task.halve)


def late_hook(task):
    for weight in task.net.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.copy_(task.halve(weight.grad)))


def module_hook(task):
    task.net[2].register_full_backward_hook(lambda _, inputs, __: tuple(map(task.halve, inputs)))


enter_all("prepare", {
    "parameter_hook": ("weight.register_hook", Hooked, parameter_hook),
    "post_accumulate_hook": ("register_post_accumulate_grad_hook", Hooked, late_hook,
        equal(), refused("accumulate|hook")),
    "module_hook": ("register_full_backward_hook", Hooked, module_hook),
})  # fmt: skip


def adversaries(task):
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, FEATURES))
    drop = nn.Sequential(nn.Linear(FEATURES, 8), nn.LeakyReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    task.networks = {"generator": norm, "judge": drop}
    task.optimizers = {name: torch.optim.Adam(n.parameters(), 0.01) for name, n in task.networks.items()}


@step("A GAN with BatchNorm and dropout, and `measure`", prepare=adversaries)
def gan(task, step, trainer):
    generator, judge = task.networks.values()

    def of_judge(batch):
        fakes = generator(torch.randn(len(batch.samples), 2)).detach()
        return (F.softplus(-judge(task.samples(batch)[0])) + F.softplus(judge(fakes))).mean(), {}

    def of_generator(batch):
        value = F.softplus(-judge(generator(torch.randn(len(batch.samples), 2)))).mean()
        return value, {"generator": value}

    trainer.update("judge", of_judge)
    trainer.update("generator", of_generator)
    trainer.measure(of_generator)


@step(
    "requires_grad_(False) of the judge in a GAN's loss",
    refused("requires a gradient"),
    prepare=adversaries,
)
def frozen_in_loss(task, step, trainer):
    generator, judge = task.networks.values()

    def of_judge(batch):
        judge.requires_grad_(True)
        return F.softplus(judge(generator(torch.randn(len(batch.samples), 2)).detach())).mean(), {}

    def of_generator(batch):
        judge.requires_grad_(False)
        return F.softplus(-judge(generator(torch.randn(len(batch.samples), 2)))).mean(), {}

    trainer.update("judge", of_judge)
    trainer.update("generator", of_generator)


class Noting(Points):
    def value(self, batch):
        self.seen[batch.index] = super().value(batch)
        return self.seen[batch.index]


@step("A decision on the losses of one process", OWN, base=Noting)
def decision_on_own_parts(task, step, trainer):
    task.seen = {}
    trainer.update("net", task.loss)
    if sum(task.seen.values()) / len(task.seen) > 1.1:
        trainer.update("net", task.loss)


@step("A decision on trainer.sum of all parts' losses", base=Noting)
def decision_on_sum(task, step, trainer):
    task.seen = {}
    trainer.update("net", task.loss)
    if trainer.sum({index: value.detach() for index, value in task.seen.items()}) > 4:
        trainer.update("net", task.loss)


class OwnStep(Points):
    """Backward pass and step in Task.step."""

    def step(self, step, trainer):
        items = self.items(12 * step) % len(self.x)
        F.cross_entropy(self.net(self.x[items]), self.y[items]).backward()
        self.optimizers["net"].step()
        self.optimizers["net"].zero_grad()


enter_all("items", {
    "own_step": ("A step of one's own on samples of the process", OwnStep,
        lambda task, first: torch.arange(3) + first + 3 * rank(), refused(RANKS, ALSO_PLAIN)),
    "same_own_step": ("A step of one's own on the same random samples everywhere", OwnStep,
        lambda task, first: torch.randperm(len(task.x))[:12]),
})  # fmt: skip


@step("A gradient that Task.step leaves before an update", EARLIER)
def gradient_before(task, step, trainer):
    task.net(task.x[:12]).square().mean().backward()
    trainer.update("net", task.loss)
