"""The share of right answers."""

from jaxtyping import Float, Int64
from torch import Tensor


def count_correct(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Int64[Tensor, ""]:
    """How many answers of a batch are right."""
    return (logits.argmax(dim=1) == labels).sum()


def accuracy(logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The share of right answers in a batch."""
    return (logits.argmax(dim=1) == labels).float().mean()
