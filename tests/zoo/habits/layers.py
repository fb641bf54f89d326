"""Architectures, and layers that change in the forward pass."""

import torch
from entry import equal, refused
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from habits.base import (
    CLASSES,
    FEATURES,
    Pictures,
    Points,
    WithDropout,
    WithNorm,
    Words,
    enter,
    enter_all,
    hidden,
    value,
)  # fmt: skip

ELSEWHERE = refused("norm|layer")


class Sentence(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(10, 8), body, nn.Linear(8, CLASSES)

    def forward(self, x):
        found = self.body(self.embed(x))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class SkippedAtRandom(Residual):
    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.5 else super().forward(x)


class Mixture(nn.ModuleList):
    """Experts, of which a part uses those that its samples ask for."""

    def forward(self, x):
        choice = x.abs().argmax(1)
        found = x.new_zeros(len(x), CLASSES)
        for i in choice.unique().tolist():
            found = found.index_put((choice == i,), self[i](x[choice == i]))
        return found


class Tied(nn.Embedding):
    def forward(self, x):
        return F.linear(super().forward(x).mean(1), self.weight)[:, :CLASSES]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(FEATURES, 8), torch.randn(8, CLASSES), torch.ones(2)])
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x):
        return (x @ self.weights[0]).mul_(self.scale).relu_() @ self.weights[1]


class Changing(nn.Module):
    """A layer that changes a buffer of this name in its forward pass."""

    def __init__(self, name, buffer, change):
        super().__init__()
        self.name, self.change = name, change
        self.register_buffer(name, buffer)

    def forward(self, x):
        buffer = getattr(self, self.name)
        found = x + buffer.mean(0)
        if self.training:
            setattr(self, self.name, self.change(buffer, x.detach()))
        return found


def closer(codebook, x):
    codes = torch.cdist(x, codebook).argmin(1)
    return codebook.index_put_((codes,), codebook[codes].lerp(x, 0.1))


class HalfNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def convolution(*between):
    head = (nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, CLASSES))
    return nn.Sequential(nn.Conv2d(1, 4, 3), *between, *head)


def residual(kind):
    return convolution(kind(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def compiled(net):
    net.compile(backend="aot_eager")  # inductor takes seconds, and needs a C++ compiler
    return net


def completed(task):
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(CLASSES))
    net(task.x)
    return net


enter_all("network", {
    "convolutions": ("A convolutional net", Pictures, lambda _: convolution()),
    "norm": ("BatchNorm2d", Pictures, lambda _: convolution(nn.BatchNorm2d(4))),
    "image_classifier": ("BatchNorm2d with dropout", Pictures,
        lambda _: convolution(nn.BatchNorm2d(4), nn.Dropout2d(0.2))),
    "residual_net": ("A residual net with BatchNorm", Pictures, lambda _: residual(Residual)),
    "group_norm": ("GroupNorm", Pictures, lambda _: convolution(nn.GroupNorm(2, 4))),
    "instance_norm": ("InstanceNorm", Pictures, lambda _: convolution(nn.InstanceNorm2d(4, affine=True))),
    "layer_norm": ("LayerNorm", Points, lambda _: hidden(nn.LayerNorm(8))),
    "dropout": ("Dropout", Points, lambda _: hidden(nn.Dropout(0.3))),
    "norm_and_dropout": ("BatchNorm, dropout", Points, lambda _: hidden(nn.BatchNorm1d(8), nn.Dropout(0.3))),
    "norm_without_statistics": ("BatchNorm without running statistics", Points,
        lambda _: hidden(nn.BatchNorm1d(8, affine=False, track_running_stats=False))),
    "norm_that_is_frozen": ("BatchNorm in eval mode", Points, lambda _: hidden(nn.BatchNorm1d(8).eval())),
    "norm_of_torch": ("SyncBatchNorm.convert_sync_batchnorm", Points,
        lambda _: nn.SyncBatchNorm.convert_sync_batchnorm(hidden(nn.BatchNorm1d(8)))),
    "gru": ("nn.GRU", Words, lambda _: Sentence(nn.GRU(8, 8, batch_first=True))),
    "lstm": ("LSTM with dropout", Words, lambda _: Sentence(nn.LSTM(8, 8, 2, dropout=0.2, batch_first=True))),
    "transformer": ("A transformer encoder with dropout", Words, lambda _: Sentence(encoder())),
    "embedding_bag": ("EmbeddingBag", Words,
        lambda _: nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, CLASSES))),
    "tied_weights": ("An output layer with the embedding's weight", Words, lambda _: Tied(10, 8)),
    "weight_norm": ("weight_norm", Points, lambda _: hidden(first=parametrizations.weight_norm)),
    "pruned": ("prune, which sets `weight` in each forward pass", Points,
        lambda _: hidden(first=lambda layer: prune.l1_unstructured(layer, "weight", 0.5))),
    "experts": ("A mixture of experts: parts use different parameters", Points,
        lambda _: Mixture(nn.Linear(FEATURES, CLASSES) for _ in range(5))),
    "listed": ("ParameterList with one that is not used, a constant buffer, operations in place", Points,
        lambda _: Listed()),
    "frozen_layer": ("A frozen layer", Points, lambda _: hidden(first=lambda one: one.requires_grad_(False))),
    "stochastic_depth": ("Layers that are skipped at random", Points,
        lambda _: nn.Sequential(SkippedAtRandom(nn.Linear(FEATURES, 4)), nn.Linear(4, CLASSES))),
    "max_norm": ("An embedding with max_norm", Words, lambda _:
        nn.Sequential(nn.EmbeddingBag(10, 8, max_norm=0.5), nn.Linear(8, CLASSES)), refused("weight")),
    "spectral_norm": ("spectral_norm", Points,
        lambda _: hidden(first=parametrizations.spectral_norm), refused(r"_u\b|_v\b")),
    "old_spectral_norm": ("nn.utils.spectral_norm", Points,
        lambda _: hidden(first=nn.utils.spectral_norm), refused(r"_u\b|_v\b")),
    "instance_norm_with_statistics": ("InstanceNorm with running statistics", Pictures,
        lambda _: convolution(nn.InstanceNorm2d(4, track_running_stats=True)), refused("running_")),
    "own_norm": ("A BatchNorm of one's own", Points, lambda _: hidden(Changing(
        "running_mean", torch.zeros(1, 8), lambda old, x: old.lerp(x.mean(0), 0.1))), refused("running_me")),
    "codebook": ("VQ's codebook of averages", Points,
        lambda _: hidden(Changing("codebook", torch.randn(4, 8), closer)), refused("codebook")),
    "queue": ("MoCo's queue", Points, lambda _: hidden(Changing(
        "queue", torch.randn(16, 8), lambda old, x: torch.cat([old[len(x) :], x]))), refused("queue")),
    "counter_in_buffer": ("A buffer that counts calls", Points, lambda _: hidden(Changing(
        "calls", torch.zeros(1, 1), lambda old, x: old.add_(1))), refused("calls")),
    "norm_in_branch": ("BatchNorm in a branch that depends on the data", Points,
        lambda _: hidden(HalfNorm(8)), ELSEWHERE),
    "norm_skipped_at_random": ("BatchNorm in layers that are skipped at random", Pictures,
        lambda _: residual(SkippedAtRandom), ELSEWHERE),
    "lazy_layer": ("nn.LazyLinear that the first loss completes", Points, lambda _:
        nn.Sequential(nn.LazyLinear(8), nn.Linear(8, CLASSES)), equal(), refused("lazy|uninitialized")),
    "compiled": ("net.compile()", Points, lambda _: compiled(hidden(nn.Dropout(0.3)))),
    "compiled_norm": ("net.compile(), with BatchNorm and dropout", Points,
        lambda _: compiled(hidden(nn.BatchNorm1d(8), nn.Dropout(0.3)))),
    "completed_lazy_layer": ("nn.LazyLinear that __init__ completes", Points, completed),
})  # fmt: skip
enter("norm_of_each_part", "sync_batch_norm = False", equal(), refused("running_"), base=WithNorm,
      sync_batch_norm=False)  # fmt: skip


@value("net.eval() and net.train() in a loss, with BatchNorm", base=WithNorm)
def eval_and_train(task, batch):
    value = Points.value(task, batch)
    task.net.eval()
    value = value + Points.value(task, batch)
    task.net.train()
    return value


@value("Layers that a loss passes through twice", with_norm=[equal()])
def siamese(task, batch):
    x, y = task.samples(batch)
    apart = (task.net(x) - task.net(x.flip(0))).square().mean(1)
    return torch.where(y == y.flip(0), apart, (1 - apart).relu()).mean()


class FrozenStem(Points):
    def prepare(self):
        self.net[0].requires_grad_(False)


@value("torch.utils.checkpoint with use_reentrant=True", refused("use_reentrant=False"), base=FrozenStem)
def reentrant_checkpoint(task, batch):
    x, y = task.samples(batch)
    features = task.net[0](x).requires_grad_()  # as Hugging Face's enable_input_require_grads
    return F.cross_entropy(checkpoint(task.net[1:], features, use_reentrant=True), y)


@value("torch.func.grad through BatchNorm", refused("torch.func"), base=WithNorm)
def functional_gradient_with_norm(task, batch):
    x, y = task.samples(batch)
    slope = torch.func.grad(lambda x: F.cross_entropy(task.net(x), y))(x)
    return F.cross_entropy(task.net(x + 0.1 * slope.sign()), y)


@value("torch.utils.checkpoint", base=WithDropout, with_norm=[equal(), ELSEWHERE])
def checkpointed(task, batch):
    x, y = task.samples(batch)
    return F.cross_entropy(checkpoint(task.net, x, use_reentrant=False), y)
