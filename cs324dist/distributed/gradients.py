"""How the gradient of a loss over the global batch is made: by DDP, or exactly by micro-batches."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cs324dist.data.streams import MicroBatch, seed_torch, torch_states
from cs324dist.distributed.exact_mean import ExactMean
from cs324dist.distributed.factored_linear import (
    Factors,
    factor_linear_layers,
    mean_products,
    recorded_factors,
)
from cs324dist.distributed.micro_batches import Threads
from cs324dist.distributed.process import end_openmp_threads
from cs324dist.errors import RunFailed

Networks = tuple[nn.Module, ...]
LossOf = Callable[[MicroBatch], Float[Tensor, ""]]
SeedOf = Callable[[MicroBatch], int]
Batches = Mapping[int, MicroBatch]


class DDPGradients:
    """One micro-batch per process; DDP averages over processes, in floating point."""

    threads: Threads | None = None

    def __init__(self, trained: Iterable[Networks], accelerator: Accelerator) -> None:
        """`trained` are the networks of each update."""
        self._scaler = accelerator.scaler
        place = [accelerator.device] if accelerator.device.type == "cuda" else None
        self._reducers: dict[Networks, nn.Module] = {}
        for networks in dict.fromkeys(trained):
            losses = _Losses(networks)
            self._reducers[networks] = _wrapped(losses, place) if accelerator.num_processes > 1 else losses

    def map(self, work: Callable[[MicroBatch], object], batches: Batches) -> None:
        """Do something with each micro-batch of this process."""
        for batch in batches.values():
            work(batch)

    def compute(self, networks: Networks, loss_of: LossOf, seed_of: SeedOf, batches: Batches) -> None:
        """Leave the mean gradient over all processes in `grad` of the networks' parameters."""
        for batch in batches.values():
            seed_torch(seed_of(batch), batch.device)
            loss = self._reducers[networks](loss_of, batch)
            (self._scaler.scale(loss) if self._scaler else loss).backward()

    def cores_for(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Inside, as many cores as may be used by a step of this optimizer."""
        return nullcontext()


class _Losses(nn.Module):
    """What DDP wraps: networks, and in place of a forward pass the loss that is computed with them."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, loss_of: LossOf, batch: MicroBatch) -> Tensor:
        return loss_of(batch)


def _wrapped(losses: nn.Module, place: list[torch.device] | None) -> nn.Module:
    with warnings.catch_warnings():
        # torch 2.13 has another name for `broadcast_buffers`; zeros below have other strides than gradients.
        warnings.simplefilter("ignore")
        wrapped = DistributedDataParallel(
            losses,
            place,
            broadcast_buffers=False,  # BatchNorm over the batch keeps them equal
            gradient_as_bucket_view=True,
        )
        # DDP adds up its first step in one bucket and later ones in several, in the order of the first. With
        # this pass as the first, a resumed run of three processes adds in the order of one that ran through.
        trained = [parameter for parameter in losses.parameters() if parameter.requires_grad]
        zero = lambda _: torch.stack([(parameter * 0).sum() for parameter in trained]).sum()  # noqa: E731
        wrapped(zero, None).backward()
    for parameter in trained:
        parameter.grad = None
    return wrapped


class ExactGradients:
    """Any number of micro-batches per process; nobody can tell from the mean who computed which of them."""

    def __init__(
        self, networks: Iterable[nn.Module], count: int, own: int, accelerator: Accelerator, *, meet: bool
    ) -> None:
        """`own` of `count` micro-batches are this process's; with `meet`, some layers span the batch.

        Linear layers inside `networks` take the short way where they are wide; see `factored_linear`.
        """
        self._factored = {weight for network in networks for weight in factor_linear_layers(network, count)}
        self._count, self._meet, self._device = count, meet, accelerator.device
        self._cores = torch.get_num_threads()
        torch.set_num_threads(1)  # outside of `all_cores`, as sums depend on the number of threads
        on_gpu = accelerator.device.type == "cuda"
        self.threads = Threads(self._cores, accelerator.device)
        # Layers that meet need a thread for each micro-batch; otherwise a GPU takes them in turn.
        self._workers = Threads(own if meet else 1 if on_gpu else min(own, self._cores), accelerator.device)
        self._one = Threads(1, accelerator.device)
        self._mean = ExactMean(count)
        self._draws: dict[Networks, bool] = {}

    @contextmanager
    def all_cores(self) -> Iterator[None]:
        """Inside, for work whose result does not depend on it, all cores of the process are used."""
        torch.set_num_threads(self._cores)
        try:
            yield
        finally:
            torch.set_num_threads(1)
            end_openmp_threads()  # micro-batches need their cores

    def map(self, work: Callable[[MicroBatch], object], batches: Batches) -> None:
        """Do something with each micro-batch of this process; layers that span the batch meet."""
        self._workers.map(work, batches, self._count, meet=self._meet)

    def cores_for(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Inside, the cores that this optimizer's step may use: a fused one works value by value."""
        fused = all(group.get("fused") for group in optimizer.param_groups)
        return self.all_cores() if fused else nullcontext()

    def compute(self, networks: Networks, loss_of: LossOf, seed_of: SeedOf, batches: Batches) -> None:
        """Leave the mean gradient over all micro-batches in `grad` of the networks' parameters.

        torch's generators serve all threads: losses that draw from them are computed one after the other.

        Raises:
            RunFailed: a loss draws random numbers although its micro-batches must be computed at once.
        """
        shared = dict.fromkeys(p for network in networks for p in network.parameters())
        trained = [parameter for parameter in shared if parameter.requires_grad]
        at_once = self._meet or self._draws.get(networks) is False

        def gradients(batch: MicroBatch) -> tuple[tuple[Tensor | None, ...], Factors]:
            if not at_once:
                seed_torch(seed_of(batch), batch.device)
                seeded = torch_states(batch.device)
            with torch.autograd.set_multithreading_enabled(False):  # so that they can meet on a GPU
                loss = loss_of(batch)
                with recorded_factors() as factors:
                    found = torch.autograd.grad(loss, trained, allow_unused=True)
            if not at_once:
                drew = _differ(seeded, torch_states(batch.device))
                self._draws[networks] = drew or self._draws.get(networks, False)
            return found, factors

        before = torch_states(self._device)
        workers = self._workers if at_once else self._one
        found = workers.map(gradients, batches, self._count, meet=self._meet)
        if at_once and _differ(before, torch_states(self._device)):
            raise RunFailed(
                "with --micro-batches, a loss may not draw from torch's generator in some steps only, nor "
                "beside a BatchNorm: draw from a Stream, or leave --micro-batches out"
            )
        with self.all_cores():
            means = self._mean([parts for parts, _ in found], trained)
        factors = dict(zip(batches, (factors for _, factors in found), strict=True))
        weights = [parameter for parameter in trained if parameter in self._factored]
        products = mean_products(weights, factors, self._count, self.threads)
        for parameter, mean in zip(trained, means, strict=True):
            product = products.get(parameter)
            parameter.grad = mean if product is None else product if mean is None else product + mean


def _differ(states: list[Tensor], others: list[Tensor]) -> bool:
    return not all(map(torch.equal, states, others))
