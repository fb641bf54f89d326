"""A trainer's updates as CUDA graphs: the host launches one graph, in place of hundreds of kernels.

A graph repeats the same operations on the same memory. What changes from step to step is therefore on the
device, and set beforehand: the step (`Clock`), learning rates, the seed of torch's generator.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cs324dist.data.streams import Clock
from cs324dist.errors import UserError

WARM_UP = 3  # updates before one is captured, in which libraries and optimizers allocate what they keep
Answer = TypeVar("Answer")


class Graphs:
    """Captures what is run for the fourth time under a key, and then replays it."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self._on_gpu = device.type == "cuda"
        self._runs: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, tuple[Any, Any]] = {}

    def clear(self) -> None:
        """Forget all graphs, as tensors that they use have been replaced."""
        self._runs.clear()
        self._captured.clear()

    def run(self, key: Hashable, work: Callable[[], Answer]) -> Answer:
        """Do the work, which is the same for the same key; its answer holds the same tensors each time.

        Raises:
            UserError: it cannot be captured.
        """
        self._runs[key] += 1
        if self._runs[key] <= WARM_UP:
            return work()
        if key in self._captured:
            self._captured[key][0].replay()
        else:
            try:
                self._captured[key] = self._capture(work)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                text = str(error).partition("\n")[0]
                raise UserError(f"this task cannot be captured: {text}: leave --cuda-graph out") from error
        return self._captured[key][1]

    def _capture(self, work: Callable[[], Answer]) -> tuple[Any, Answer]:
        if self._on_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = work()
            graph.replay()  # what is captured has not been done
            return graph, answer
        with _Tape() as tape:
            return tape, work()

    def prepare(self, optimizer: Optimizer) -> None:
        """Keep the optimizer's learning rates and counters on the device."""
        for group in optimizer.param_groups:
            # CUDA's kernels take float32 alone; on a CPU the bits stay those of a float.
            dtype = torch.float32 if self._on_gpu else torch.float64
            group["lr"] = torch.tensor(group["lr"], dtype=dtype, device=self.clock.step.device)
            if self._on_gpu and "capturable" in group:
                group["capturable"] = True
        # torch warns of steps that are not captured, such as the first.
        cast(Any, optimizer)._warned_capturable_if_run_uncaptured = True


class _Tape(TorchDispatchMode):
    """In place of a graph on a CPU: records operations, and does them again on the same memory.

    It forgets what a graph forgets, numbers and attributes that Python sets, and refuses to read a value.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("it reads a value from the device")
        found = operation(*args, **(kwargs or {}))
        self._operations.append((operation, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for operation, args, kwargs, found in self._operations:
                again = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
