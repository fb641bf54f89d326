"""Evaluations: over pieces, on one process, with draws, and with an effect on what is trained."""

import numpy as np
import torch
import torch.distributed as dist
from entry import ON_SEVERAL, RANKS, refused, unseen
from torch.nn import functional as F

from cs324dist import Evaluation, count_correct
from habits.base import SAMPLES, Points, WithNorm, enter_all, overriding, with_

evaluate = overriding("evaluate")


def right(task, items, noise=0):
    return count_correct(task.net(task.x[items] + noise), task.y[items])


def right_of_all(task, noise=0):
    return right(task, torch.arange(SAMPLES), noise).item()


def masked(task, items):
    mask = task.x[items] > 0
    return torch.stack([(task.x[items] * mask).sum(), mask.sum()])


def to_the_longest(task, items):
    longest = int(task.y[items].max()) + 1
    return F.cross_entropy(task.net(task.x[items]), task.y[items]) * longest


def while_training(task, items):
    task.net.train()
    return right(task, items)


class InPieces(Points):
    """An evaluation that is the sum over all pieces."""

    def evaluate(self, sum_over):
        found = sum_over(lambda items: {"sum": self.measure(items)}, SAMPLES, 7)["sum"]
        return Evaluation({f"sum{i}": value for i, value in enumerate(found.flatten().tolist())})


MOVED = [refused(f"{RANKS}|running_"), refused(f"{RANKS}|running_", ON_SEVERAL)]
enter_all("measure", {
    "accuracy": ("An accuracy over pieces", InPieces, right),
    "draws_in_pieces": ("torch.randn in each piece", InPieces,
        lambda task, items: right(task, items, torch.randn(4))),
    "numpy_in_pieces": ("np.random in each piece", InPieces,
        lambda task, items: right(task, items, np.random.randn())),
    "masks_in_pieces": ("Masks in each piece", InPieces, masked),
    "lengths_in_pieces": ("Pieces padded to their longest", InPieces, to_the_longest),
    "classes_in_pieces": ("A sum for each class", InPieces,
        lambda task, items: F.one_hot(task.net(task.x[items]).argmax(1), 3).sum(0)),
    "shapes_in_pieces": ("A result of another shape in each piece", InPieces,
        lambda task, items: (task.y[items] == 0).nonzero(), refused("shape|same")),
    "norm_in_pieces": ("Running statistics that pieces move", with_(InPieces, network=WithNorm.network),
        while_training, *MOVED),
})  # fmt: skip


@evaluate("Draws beside pieces")
def draws_in_evaluation(task, sum_over):
    return Evaluation({"right": right_of_all(task, torch.randn(4) + np.random.randn())})


@evaluate("A total that pieces add up themselves", refused(f"{RANKS}|eval|metric", ON_SEVERAL))
def total_of_pieces(task, sum_over):
    totals = []
    sum_over(lambda items: {"none": totals.append(right(task, items)) or torch.zeros(())}, SAMPLES, 7)
    return Evaluation({"right": sum(totals)})


@evaluate("An evaluation on rank 0 alone", refused(RANKS, ON_SEVERAL))
def evaluation_of_one_rank(task, sum_over):
    first = not dist.is_initialized() or dist.get_rank() == 0
    return Evaluation({"right": right_of_all(task) if first else 0.0})


@evaluate(
    "DDP's evaluation: a share of the samples each, and all_reduce",
    unseen("the last digits, and a run has one number of processes; take sum_over"),
)
def all_reduce_in_evaluation(task, sum_over):
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    items = torch.arange(rank, SAMPLES, count)
    total = F.cross_entropy(task.net(task.x[items]), task.y[items], reduction="sum")
    if count > 1:
        dist.all_reduce(total)
    return Evaluation({"loss": total.item() / SAMPLES})


@evaluate("A total of all evaluations, on the task", total=0)
def total_of_evaluations(task, sum_over):
    task.total += right_of_all(task)
    return Evaluation({"total": task.total})
