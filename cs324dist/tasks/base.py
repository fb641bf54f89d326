"""What a task is: networks, optimizers, a loss. The trainer does the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn
from torch.optim import Optimizer

from cs324dist.config import ConfigT
from cs324dist.data.streams import MicroBatch
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import UserError

Mean = Float[Tensor, ""] | tuple[Float[Tensor, ""], Shaped[Tensor, ""] | float]
"""The mean over the samples of a micro-batch; or a sum and its weight, such as the number of tokens, of which
the mean over the global batch is the sum of the sums over the sum of the weights."""

Metrics = Mapping[str, Mean | float]
Loss = Callable[[MicroBatch], tuple[Mean, Metrics]]
Picture = UInt8[Tensor, "channels height width"]
"""Grey (one channel) or RGB."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every process."""

    metrics: Mapping[str, float]
    picture: Tensor | None = None
    """A `Picture`; every process draws it, and the main one writes it."""
    strip: Callable[[], Picture] | None = None
    """Draws another picture; called only where somebody looks at it."""

    def __post_init__(self) -> None:
        """Check the picture.

        Raises:
            UserError: it has another dtype or shape.
        """
        if (drawn := self.picture) is not None and not (
            drawn.dtype == torch.uint8 and drawn.dim() == 3 and len(drawn) in (1, 3)
        ):
            raise UserError(
                f"the picture of an evaluation is {drawn.dtype} {tuple(drawn.shape)}: give torch.uint8 of "
                f"(1 or 3, height, width)"
            )


@runtime_checkable
class Updater(Protocol):
    """What a step can ask the trainer to do."""

    def update(self, name: str, loss: Loss) -> None:
        """Take one step of the optimizers `name` with the gradient of `loss` over the global batch.

        `loss` returns the mean loss of a micro-batch, and metrics to log; see `Mean`.
        """

    def measure(self, loss: Loss) -> None:
        """Only log the metrics of `loss`, in the steps that are logged."""

    def sum(self, values: Mapping[int, Tensor]) -> Tensor:
        """The sum over all micro-batches of what each of this process's has, by its index."""


class Task(Generic[ConfigT]):
    """A model to train. Subclass it, fill `networks` and `optimizers`, and define `loss`.

    Every other method is optional.
    """

    name: ClassVar[str]
    """What its runs are called."""

    presets: ClassVar[Mapping[str, Any]]
    """Recipes by name, each a `Config`; the first is the default."""

    def __init__(self, config: ConfigT, device: torch.device) -> None:
        """Build the networks, their optimizers, and the data on `device`.

        This one sets `self.config` and `self.device`.
        """
        self.config, self.device = config, device
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer | Sequence[Optimizer]] = {}

    @classmethod
    def run_name(cls, config: ConfigT) -> str:
        """The name of a run's default folder."""
        return f"{cls.name}-{config.preset}-{config.seed}"

    def step(self, step: int, trainer: Updater) -> None:
        """Take step `step`, counted from 0: by default one update of the only optimizers there are."""
        (name,) = self.optimizers
        trainer.update(name, self.loss)

    def loss(self, batch: MicroBatch) -> tuple[Mean, Metrics]:
        """The loss of a micro-batch, and metrics to log: means over its samples, or pairs (sum, weight)."""
        raise NotImplementedError

    def evaluate(self, sum_over: SumOver) -> Evaluation:
        """Measure the networks; by default, nothing is measured.

        Those in `networks` are in eval mode and compute in full precision, without gradients.
        """
        return Evaluation({})

    def is_done(self, evaluations: Sequence[Mapping[str, float]]) -> bool:
        """Whether training ends here; asked after each evaluation, on the main process.

        Args:
            evaluations: the metrics of all evaluations so far, NaN where one was not finite.
        """
        return False

    def state_dict(self) -> dict[str, Any]:
        """Whatever else belongs to the state: tensors, numbers and words, nested in dicts and lists.

        Tensors keep their places, shapes and dtypes from the start to the end; lists of numbers may grow.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError, KeyError, TypeError, ValueError: it is not a state of this task.
        """
