"""An LSTM that is proven to name the first digit of every palindrome, of any length.

python examples/proven.py

The proof is an induction over the time steps. Each first digit has a box: an interval for each component of
the hidden state and of the cells. The first step leads into the box of its digit. Whatever digit is read
next, a step from the box ends in the box. And wherever in the box the state is, the digit's logit is the
largest. The evaluation looks for such boxes by interval arithmetic, and counts the digits that have one.

For models trained on palindromes alone, it finds none. This task trains on the worst logits within the boxes,
too (interval bound propagation, Gowal et al. 2018, https://arxiv.org/abs/1810.12715).
"""

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from annotated_types import Interval as ValidRange
from torch import Tensor
from torch.nn import functional as F

from cs324dist import Evaluation, MicroBatch, UserError, main
from cs324dist.tasks.lstm.networks import LSTM
from cs324dist.tasks.lstm.palindromes import palindromes
from cs324dist.tasks.lstm.task import LSTMConfig, LSTMTask

FUNCTION = 16  # errors of an operation that there is room for in sigmoid and tanh; measured: below 5
TINY = 2.0**-100  # absolute error that there is room for, as float32 has no relative precision near zero
HUGE = 2.0**100  # no sum gets so large, far below float32's largest number
MOST_STEPS = 5_000  # attempts to make boxes large enough
FLAT = 5.0  # a cell's bound beyond it is made infinite; its tanh is almost 1 anyway

FADE = 0.3  # share of a cell that may be lost in a step of training: a digit has to be refreshed, not kept
OPEN = 1.0  # of a forget gate before its sigmoid: if it opens further, old intervals shrink too slowly
SURE = 0.01  # loss of the worst case below which the palindromes of training get longer


class Arithmetic(NamedTuple):
    """How inexactly a model is computed: the largest relative errors."""

    stored: float = 0.0
    """Of a number that is written down: a weight, a state, a gate, a logit."""

    inside: float = 0.0
    """Of an operation within a sum or a function, before its result is written down."""

    @classmethod
    def of(cls, bits: int) -> "Arithmetic":
        """Numbers are stored with so many bits; sums and functions are computed in float32."""
        return cls(2.0**-bits, 2.0**-24)


EXACT, FLOAT32, BF16 = Arithmetic(), Arithmetic.of(24), Arithmetic.of(8)


class Interval(NamedTuple):
    """All numbers from `low` to `high`, component by component."""

    low: Tensor
    high: Tensor

    def __or__(self, other: "Interval") -> "Interval":
        """The smallest interval around both."""
        return Interval(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def plus(self, other: "Interval") -> "Interval":
        """All sums."""
        return Interval(self.low + other.low, self.high + other.high)

    def times(self, positive: "Interval") -> "Interval":
        """All products with numbers that are not below zero."""
        low = torch.minimum(self.low * positive.low, self.low * positive.high)
        return Interval(low, torch.maximum(self.high * positive.low, self.high * positive.high))

    def widened(self, relative: float, absolute: Tensor | float = 0.0) -> "Interval":
        """With room for an error on both sides."""
        if relative:
            absolute = absolute + TINY
        low = self.low - self.low.abs() * relative - absolute
        return Interval(low, self.high + self.high.abs() * relative + absolute)

    def sigmoid(self, by: Arithmetic) -> "Interval":
        """All values of the function."""
        low, high = Interval(self.low.sigmoid(), self.high.sigmoid()).widened(_error_of_function(by))
        return Interval(low.clamp(min=0), high)

    def tanh(self, by: Arithmetic) -> "Interval":
        """All values of the function."""
        return Interval(self.low.tanh(), self.high.tanh()).widened(_error_of_function(by))


class Box(NamedTuple):
    """States, with a row for each first digit: [digit hidden]."""

    h: Interval
    c: Interval

    def __or__(self, other: "Box") -> "Box":
        """The smallest box around both."""
        return Box(self.h | other.h, self.c | other.c)

    def holds(self, other: "Box") -> Tensor:
        """Whether all of the other box is in this one: [digit]."""
        inside = [
            (mine.low <= its.low) & (its.high <= mine.high) for mine, its in zip(self, other, strict=True)
        ]
        return torch.stack(inside).all(dim=0).all(dim=1)


def first_states(model: LSTM, by: Arithmetic = EXACT) -> Box:
    """The states after the first digit."""
    zeros = model.W_x.new_zeros(model.W_x.shape[1], model.W_h.shape[1])
    nothing = Interval(zeros, zeros)
    return _states(gates(model, nothing, Interval(model.W_x.T, model.W_x.T), by), nothing, by)


def next_states(model: LSTM, box: Box, by: Arithmetic = EXACT) -> Box:
    """The states that any digit leads to from the box.

    Args:
        model: reads one-hot digits.
        box: states before.
        by: the arithmetic that the model is computed with.
    """
    return _states(gates(model, box.h, any_digit(model), by), box.c, by)


def any_digit(model: LSTM) -> Interval:
    """What a digit adds to the gates: [4·hidden]."""
    return Interval(model.W_x.amin(1), model.W_x.amax(1))


def gates(model: LSTM, h: Interval, from_input: Interval, by: Arithmetic = EXACT) -> list[Interval]:
    """The gates i, f, g, o before their functions."""
    W_x, W_h, b = model.W_x, model.W_h, model.b
    middle, radius = (h.low + h.high) / 2, (h.high - h.low) / 2
    from_middle, spread = middle @ W_h.T + b, radius @ W_h.abs().T
    together = Interval(from_input.low + from_middle - spread, from_input.high + from_middle + spread)
    largest = W_x.abs().amax(1) + (middle.abs() + radius) @ W_h.abs().T + b.abs()
    together = together.widened(by.stored, largest * _error_of_sum(W_x.shape[1] + W_h.shape[1] + 1, by))
    return [Interval(*bounds) for bounds in zip(*(bound.chunk(4, dim=-1) for bound in together), strict=True)]


def _states(gates: list[Interval], c: Interval, by: Arithmetic) -> Box:
    i, f, g, o = gates
    rounding = 2 * by.stored
    written = g.tanh(by).times(i.sigmoid(by)).widened(rounding)
    kept = c.times(f.sigmoid(by)).widened(rounding)
    c = written.plus(kept).widened(rounding)
    return Box(c.tanh(by).times(o.sigmoid(by)).widened(rounding), c)


def _error_of_function(by: Arithmetic) -> float:
    return FUNCTION * by.inside + by.stored


def _error_of_sum(terms: int, by: Arithmetic) -> float:
    """A bound of the error of a sum of products, in any order, relative to the sum of their sizes.

    Of a product's way, four numbers may be written down: both factors, a sum of some products, and of all.
    """
    return 2 * terms * by.inside + 5 * by.stored


def margins(model: LSTM, h: Interval, by: Arithmetic = EXACT) -> Tensor:
    """By how much the logit of each first digit is above that of each digit, at least: [digit digit]."""
    weight, bias = model.output.weight, model.output.bias
    middle, radius = (h.low + h.high) / 2, (h.high - h.low) / 2
    logits = middle @ weight.T + bias
    spread = torch.einsum("dh,dkh->dk", radius, (weight[:, None] - weight).abs())
    largest = (middle.abs() + radius) @ weight.abs().T + bias.abs()
    room = (largest.diagonal()[:, None] + largest) * _error_of_sum(weight.shape[1] + 1, by)
    return logits.diagonal()[:, None] - logits - spread - room


def least(margins: Tensor) -> Tensor:
    """Of each digit's margins above the others: [digit]."""
    return margins.clone().fill_diagonal_(torch.inf).amin(1)


@torch.no_grad()
def prove(model: LSTM, by: Arithmetic = FLOAT32) -> Tensor:
    """The least margin of each first digit, in all palindromes of all lengths: [digit].

    Where it is above zero, the model is proven to name the digit, if it is computed by this arithmetic or a
    better one, with sums in any order. It is -inf where no box is found that steps stay in. The boxes are
    computed in float64, whose errors are 2^-29 of the room that is made for those of float32.
    """
    if sum(parameter.abs().sum() for parameter in model.parameters()) > HUGE:
        return model.b.new_full((len(model.output.bias),), -torch.inf)
    model = copy.deepcopy(model).double()
    box = first_states(model, by)
    for _ in range(MOST_STEPS):
        tried, after = box, next_states(model, box, by)
        closed = tried.holds(after)
        if closed.all():
            break
        h, (low, high) = tried | after
        low, high = low.masked_fill(low < -FLAT, -torch.inf), high.masked_fill(high > FLAT, torch.inf)
        box = Box(h, Interval(low, high))
    return least(margins(model, tried.h, by)).where(closed, -torch.inf)


@dataclass(frozen=True)
class ProvenConfig(LSTMConfig):
    """Train an LSTM on palindromes and prove that it is right on all of them."""

    bits: Annotated[int, ValidRange(ge=2, le=24)] = 24
    """Bits that numbers are stored with, in the boxes and in the proof: 24 as in float32, 8 as in bf16."""


class ProvenTask(LSTMTask):
    """One step: palindromes, and boxes over as many steps."""

    name = "proven"
    presets: ClassVar = {
        "fast": ProvenConfig(
            steps=300,
            evaluate_every=100,
            checkpoint_every=100,
            length=20,
            curriculum=1.05,
            initialisation="linear",
            learning_rate=1e-2,
        )
    }

    def __init__(self, config: LSTMConfig, device: torch.device) -> None:
        if (config.model, config.encoding) != ("lstm", "onehot"):
            raise UserError("only --model lstm with --encoding onehot can be proven")
        super().__init__(config, device)
        self.shortest = self.length = 1
        with torch.no_grad():
            self.model.W_h *= 0.1  # boxes stay small, at the start

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the last digit and of the worst logits, and what forget gates exceed `OPEN` by."""
        digits, last = palindromes(self.data, batch.samples, self.length)
        loss = F.cross_entropy(self.model(digits), last)

        by, model = Arithmetic.of(self.config.bits), self.model
        box = first_states(model, by)
        kept = Interval(box.c.low.new_full((), 1 - FADE), box.c.low.new_ones(()))
        for _ in range(self.length - 1):
            box = box | next_states(model, Box(box.h, box.c.times(kept)), by)
        above = margins(model, box.h, by)
        worst = F.cross_entropy(-above, torch.arange(len(above), device=above.device))
        _, f, _, _ = gates(model, box.h, any_digit(model), by)
        too_open = (f.high - OPEN).relu().mean()

        self.right[batch.index] = (worst < SURE) * len(batch.samples)
        return loss + worst + 3 * too_open, {"loss": loss, "worst_case": worst, "too_open": too_open}

    def evaluate(self, sum_over) -> Evaluation:
        """Accuracy at the full length, and how many first digits `prove` proves for every length."""
        proven = (prove(self.model, Arithmetic.of(self.config.bits)) > 0).sum().item()
        return Evaluation({**super().evaluate(sum_over).metrics, "proven": proven})


if __name__ == "__main__":
    main(ProvenTask, __doc__)
