"""Data: how they are loaded, drawn, split and looked at before the first step."""

import random
import sqlite3

import numpy as np
import torch
from entry import ON_SEVERAL, RANKS, REPEATED, equal, refused
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, random_split

from cs324dist import Stream, loader
from habits.base import CLASSES, FEATURES, SAMPLES, Points, WithNorm, enter, enter_all, rank, with_

AGAIN, UNLIKE = refused(REPEATED), refused(REPEATED, ON_SEVERAL)
WIDE = 512


class Large(Points):
    """Enough numbers that torch shares them out over its threads."""

    def data(self):
        x = torch.randn(200, WIDE)
        return x, x[:, :CLASSES].argmax(1)

    def network(self):
        net = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, CLASSES))
        self.x = self.look(self.x, net[0].weight)
        return net


enter_all("look", {
    "mean": ("data.mean() in __init__", Large, lambda _, x, weight: x - x.mean()),
    "deviation": ("data.std(0) in __init__", Large, lambda _, x, weight: x / x.std(0)),
    "gram_matrix": ("A Gram matrix in __init__", Large,
        lambda _, x, weight: x @ torch.linalg.eigh(x.T @ x).eigenvectors),
    "svd": ("svd in __init__", Large,
        lambda _, x, weight: x @ torch.linalg.svd(x, full_matrices=False).Vh.T @ x),
    "orthogonal": ("nn.init.orthogonal_", Large,
        lambda _, x, weight: x + nn.init.orthogonal_(weight)[0].detach()),
}, threads=2)  # fmt: skip


class Pairs(Dataset):
    """Samples of which each is changed when it is loaded."""

    def __init__(self, x, y, change):
        self.x, self.y, self.change, self.loaded, self.rng = x, y, change, 0, np.random.RandomState(0)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, item):
        self.loaded += 1
        return self.change(self, self.x[item]), self.y[item]


class Loaded(Points):
    options: dict = {}  # noqa: RUF012
    collate = staticmethod(default_collate)

    def prepare(self):
        data = Pairs(self.x, self.y, type(self).change)
        self.loader = loader(data, self.config.seed, "train", collate=self.collate, **self.options)

    def samples(self, batch):
        return self.loader.batch(batch)

    def change(self, x):
        return x + 0.1 * torch.randn(FEATURES) + 0.1 * np.random.rand() + 0.1 * random.random()


ByWorkers = with_(Loaded, options={"workers": 2})


def collating(change):
    def collate(samples):
        x, y = default_collate(samples)
        return change(x), y

    return staticmethod(collate)


def mixup(x):
    weight = np.random.beta(0.4, 0.4)
    return weight * x + (1 - weight) * x[torch.randperm(len(x))]


enter_all("collate", {
    "augmentation": ("Augmentation in a data set", Loaded, staticmethod(default_collate)),
    "augmentation_by_workers": ("Augmentation by workers", ByWorkers, staticmethod(default_collate)),
    "mixup_in_collate": ("MixUp in collate", Loaded, collating(mixup)),
    "mixup_by_workers": ("MixUp in collate, by workers", ByWorkers, collating(mixup)),
    "masking_in_collate": ("Masking in collate", Loaded, collating(lambda x: x * (torch.rand(4) > 0.2))),
    "own_generator_in_collate": ("np.random.default_rng() in collate", Loaded,
        collating(lambda x: x * np.random.default_rng().random()), AGAIN),
})  # fmt: skip


class Table(Dataset):
    """A table in a file, which is opened when it is needed first."""

    def __init__(self, x, y):
        self.x, self.y, self.opened = x, y, None

    def __len__(self):
        return len(self.y)

    def __getitem__(self, item):
        self.opened = self.opened or sqlite3.connect(":memory:")
        (item,) = self.opened.execute("select ?", (item,)).fetchone()
        return self.x[item], self.y[item]


def with_table(task):
    task.loader = loader(Table(task.x, task.y), task.config.seed, "train")


enter_all("samples", {
    "sqlite": ("A data set in sqlite", Points, lambda task, batch: task.loader.batch(batch)),
    "sqlite_with_norm": ("A data set in sqlite, with BatchNorm", WithNorm,
        lambda task, batch: task.loader.batch(batch), refused("check_same_thread")),
}, prepare=with_table)  # fmt: skip


def kept(data, x):
    known = vars(data).setdefault("known", {})
    key = tuple(x.tolist())
    if key not in known:
        known[key] = x + 0.1 * torch.randn(FEATURES)
    return known[key]


enter("kept_augmentation", "A data set that keeps what it augmented", refused("keeps what it drew"),
      base=Loaded, change=kept)  # fmt: skip
enter("kept_augmentation_by_workers", "A data set that keeps what it augmented, in workers",
      refused("keeps what it drew"), base=ByWorkers, change=kept)  # fmt: skip
enter_all("change", {
    "own_generator_in_data_set": ("np.random.RandomState(0) of a data set", Loaded,
        lambda data, x: x + 0.1 * data.rng.randn(), AGAIN),
    "data_set_that_counts": ("A data set that counts its samples", Loaded,
        lambda data, x: x / data.loaded, AGAIN),
})  # fmt: skip


class Chosen(Points):
    """Samples that __init__ chooses."""

    def prepare(self):
        self.chosen = torch.as_tensor(self.choose())

    def samples(self, batch):
        items = self.chosen[self.order.items(batch) % len(self.chosen)]
        return self.x[items], self.y[items]


enter_all("choose", {
    "random_split": ("random_split without a generator", Chosen,
        lambda task: random_split(range(SAMPLES), [40, 20])[0].indices),
    "numpy_split": ("np.random.permutation", Chosen, lambda task: np.random.permutation(SAMPLES)[:40]),
    "random_choices": ("random.sample", Chosen, lambda task: random.sample(range(SAMPLES), 40)),
    "weighted_choices": ("torch.multinomial", Chosen, lambda task: torch.multinomial(1.0 + task.y, 40)),
    "share_of_rank": ("Samples of each rank's own", Chosen,
        lambda task: torch.arange(rank(), SAMPLES, 3), UNLIKE),
    "other_data_on_one_rank": ("Other data on one rank", Chosen,
        lambda task: torch.arange(SAMPLES).roll(int(rank() == 1)), UNLIKE),
})  # fmt: skip


class Iterating(Points):
    def prepare(self):
        data = DataLoader(TensorDataset(self.x, self.y), 3, shuffle=True)
        self.batches = iter([batch for _ in range(20) for batch in data])


def by_stream(task, batch):
    items = Stream(0, "items").integers(batch.samples, 3, SAMPLES).amin(1)
    return task.x[items], task.y[items]


enter_all("samples", {
    "weighted_sampling": ("Weighted sampling by a Stream", Points, by_stream),
    "own_data_loader": ("next of a DataLoader", Iterating, lambda task, _: next(task.batches), AGAIN),
})  # fmt: skip


class Vocabulary(Points):
    def prepare(self):
        words = [f"word{number % 23}" for number in range(SAMPLES)]
        place = {word: i for i, word in enumerate(self.sort(set(words)))}
        self.x = F.one_hot(torch.tensor([place[word] % FEATURES for word in words]), FEATURES).float()

    def sort(self, words):
        return words


HASHED = refused(f"{RANKS}|{REPEATED}|hash", ON_SEVERAL)
LATER = {"one": "1", "three": "1", "killed": "1", "continued": "2"}
enter("set_of_words", "set(words)", HASHED, base=Vocabulary, hash_seeds={})
enter("set_of_words_after_a_kill", "set(words), hashed in another way after a kill", equal(),
      refused("hash", ("continued",)), base=Vocabulary, hash_seeds=LATER)  # fmt: skip
enter(
    "sorted_words", "sorted(set(words))", base=Vocabulary, sort=lambda _, words: sorted(words), hash_seeds={}
)
