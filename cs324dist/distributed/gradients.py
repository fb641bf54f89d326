"""How the gradient of a loss over the global batch is made: by DDP, or exactly by parts added in order."""

import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cs324dist.data.streams import MicroBatch, seed_everything
from cs324dist.distributed.batch_norm import freeze_cancelled_biases, span_the_batch
from cs324dist.distributed.parts import Parts, add_in_order, gather_rows
from cs324dist.errors import UserError

Mean = Float[Tensor, ""] | tuple[Float[Tensor, ""], Tensor | float]
"""The mean over the samples of a part; or a sum and its weight, such as the number of tokens."""

LossOf = Callable[[MicroBatch], Mean]
Networks = tuple[nn.Module, ...]


class Gradients:
    """What both ways share: the parts of this process, in which layers may span the batch."""

    is_exact = False

    def __init__(self, count: int, seed: int, accelerator: Accelerator, peer_timeout: int) -> None:
        self.parts = Parts(count, accelerator.device, peer_timeout)
        self.networks: dict[str, nn.Module] = {}
        self._seed, self._accelerator, self.device = seed, accelerator, accelerator.device

    def prepare(self, network: nn.Module, name: str = "") -> nn.Module:
        """Place a network, and let its BatchNorm layers span the batch; not DDP's wrapper.

        Raises:
            UserError: it is wrapped already, or its parameters have no shapes yet.
        """
        name = name or f"{type(network).__name__}{len(self.networks) or ''}"
        if isinstance(network, DistributedDataParallel):
            raise UserError(f"{name} is wrapped by DDP (accelerator.prepare): give the network itself")
        refuse_lazy(name, network)
        freeze_cancelled_biases(network)
        if self.parts.count > 1 or self.is_exact:
            span_the_batch(network, name, self.parts)
        self.networks[name] = network
        prepared: nn.Module = self._accelerator.prepare_model(network, evaluation_mode=True)  # not yet DDP
        return prepared

    def explanation(self, attribute: str | None) -> str:
        """Why a task lacks an attribute that its loss has set; empty if it has not."""
        return ""

    def batch(self, index: int, step: int, batch_size: int, *, is_check: bool = False) -> MicroBatch:
        """Part `index` of the batch of a step."""
        return MicroBatch(step, batch_size, index, self.parts.count, self.device, is_check)

    def seed(self, step: int, name: str, index: int) -> None:
        """Seed what a part's loss draws, such as dropout."""
        seed_everything(self._seed, f"step {step}/{name}/{index}", self.device)

    def names(self, parameters: Iterable[Tensor]) -> list[str]:
        """The parameters' names."""
        known = {
            p: f"{name}.{inner}" for name, n in self.networks.items() for inner, p in n.named_parameters()
        }
        return [known.get(parameter, "a parameter of no network") for parameter in parameters]  # type: ignore[call-overload]


def refuse_lazy(name: str, network: nn.Module) -> None:
    """Refuse a network whose parameters have no shapes yet.

    Raises:
        UserError: naming one.
    """
    if lazy := [n for n, p in network.named_parameters() if nn.parameter.is_lazy(p)]:
        raise UserError(
            f"{name}.{lazy[0]} is lazy, without a shape before the first forward pass: give its layer "
            f"its sizes, or pass a batch through the network first"
        )


class DDPGradients(Gradients):
    """One part per process; DDP averages over processes, in floating point."""

    def __init__(self, seed: int, accelerator: Accelerator, peer_timeout: int = 600) -> None:
        super().__init__(accelerator.num_processes, seed, accelerator, peer_timeout)
        self._scaler = accelerator.scaler
        self._reducers: dict[Networks, nn.Module] = {}

    def wrap(self, trained: Iterable[Networks]) -> None:
        """Let DDP reduce the gradients of the networks of each update."""
        place = [self.device] if self.device.type == "cuda" else None
        for networks in dict.fromkeys(trained):
            losses = _Losses(networks)
            self._reducers[networks] = _wrapped(losses, place) if self.parts.processes > 1 else losses

    def map(self, work: Callable[[MicroBatch], object], step: int, batch_size: int) -> None:
        """Do something with the part of this process."""
        list(self.parts.each(lambda i: work(self.batch(i, step, batch_size)), self.parts.of()))

    def backward(self, loss_of: LossOf, step: int, batch_size: int, networks: Networks, name: str) -> None:
        """Leave the mean gradient over all processes in `grad` of the networks' parameters."""
        weights: dict[int, Tensor] = {}

        def mean_of(part: MicroBatch) -> Tensor:
            self.seed(step, name, part.index)
            value, weight = pair(loss_of(part))
            if weight is not None:
                weights[part.index] = torch.as_tensor(weight, dtype=torch.float64, device=self.device)
            return value

        def work(index: int) -> None:
            loss = self._reducers[networks](mean_of, self.batch(index, step, batch_size))
            (self._scaler.scale(loss) if self._scaler else loss).backward()

        list(self.parts.each(work, self.parts.of()))
        if weights:
            scale(networks, self.parts.count / add_in_order(gather_rows(weights, self.parts.count)))


def pair(found: Any) -> tuple[Tensor, Tensor | float | None]:
    """A loss, and its weight if it is a sum.

    Raises:
        UserError: one of them is not one number, or the weight has a gradient, which would be lost.
    """
    if isinstance(found, tuple) and len(found) != 2:
        raise UserError(
            f"a loss returned {len(found)} values: return a mean, or a sum and its weight, and no others"
        )
    value, weight = found if isinstance(found, tuple) else (found, None)
    if not isinstance(value, Tensor):
        raise UserError(
            f"a loss has to be a tensor, and is a {type(value).__name__}: return what torch computed"
        )
    if value.dim():
        raise UserError(f"a loss has to be one number, and has shape {tuple(value.shape)}: return its mean")
    is_weight = weight is None or isinstance(weight, Real)
    if isinstance(weight, Tensor):
        is_weight = not (weight.dim() or weight.requires_grad)
    if not is_weight:
        raise UserError(
            f"a loss returned a second value, which has to be the weight of a sum, one number without a "
            f"gradient, and is {_described(weight)}: return the loss alone"
        )
    return value, weight


def _described(weight: object) -> str:
    if not isinstance(weight, Tensor):
        return f"a {type(weight).__name__}"
    return f"of shape {tuple(weight.shape)}" if weight.dim() else "a tensor with a gradient"


def scale(networks: Networks, factor: Tensor) -> None:
    """Make the mean of sums the mean over all samples."""
    parameters = dict.fromkeys(p for network in networks for p in network.parameters())
    if gradients := [p.grad for p in parameters if p.grad is not None]:
        torch._foreach_mul_(gradients, factor)


class _Losses(nn.Module):
    """What DDP wraps: networks, and in place of a forward pass the loss that is computed with them."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, loss_of: Callable[[MicroBatch], Tensor], batch: MicroBatch) -> Tensor:
        return loss_of(batch)


def _wrapped(losses: nn.Module, place: list[torch.device] | None) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 has another name for `broadcast_buffers`; zeros below have other strides than gradients.
        warnings.simplefilter("ignore")
        wrapped = DistributedDataParallel(
            losses,
            place,
            broadcast_buffers=False,  # BatchNorm over the batch keeps them equal
            gradient_as_bucket_view=True,
        )
        fix_the_order_of(wrapped)
    return wrapped


def fix_the_order_of(wrapped: DistributedDataParallel) -> None:
    """Take a backward pass of zeros; every process calls it.

    DDP adds up its first pass in one bucket and later ones in several, in the order of the first. With this
    pass as the first, a resumed run of three processes adds in the order of one that ran through.
    """
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    attributes, device = vars(wrapped.module), trained[0].device
    replaced = ("forward", "_compiled_call_impl", "_forward_hooks", "_forward_pre_hooks")
    held = {name: attributes.pop(name) for name in replaced if name in attributes}
    attributes |= {"_forward_hooks": {}, "_forward_pre_hooks": {}}
    zeros = lambda: ((parameter * 0).abs().sum().to(device) for parameter in trained)  # noqa: E731
    attributes["forward"] = lambda *_: torch.stack([*zeros()]).sum()
    try:
        wrapped(None).backward()
    finally:
        del attributes["forward"]
        attributes.update(held)
    for parameter in trained:
        parameter.grad = None
