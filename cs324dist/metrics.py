"""Metrics as numbers, and the share of right answers."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from cs324dist.errors import UserError, printable


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers; a `UserError` names one that is none."""
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            text = printable(repr(value)).partition("\n")[0]
            raise UserError(f"the metric {name} = {text:.99} is no number: give one") from None
    return found


def count_correct(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Int64[Tensor, ""]:
    """How many answers of a batch are right."""
    return (logits.argmax(dim=1) == labels).sum()


def accuracy(logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The share of right answers in a batch."""
    return (logits.argmax(dim=1) == labels).float().mean()
