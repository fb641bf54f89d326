"""Takes some steps of every task with --micro-batches, and writes digests of what must be the same.

    torchrun --nproc_per_node 3 tests/exact_steps.py OUT [FAULT]

FAULT is one of the functions below, which each undo one mechanism: a test compares digests, and must fail.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs324dist import trainer as trainer_module
from cs324dist.distributed import exact_mean, factored_linear, micro_batches, sum_over
from cs324dist.distributed.process import start_accelerator
from cs324dist.errors import exit_process
from cs324dist.runs.checkpoints import tensors_by_file
from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

MICRO_BATCHES, STEPS = 4, 6
FAULTY = ("lstm", "gan")  # the tasks that a fault is planted in
EXAMPLES = Path(__file__).parents[1] / "examples"


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "lstm": ("lstm", {"batch_size": 32, "length": 9}),
        "gan": ("gan", {"dataset": "fake", "batch_size": 16, "max_grad_norm": 0.05}),
        "mlp": (f"{EXAMPLES / 'mlp.py'}:MLPTask", {"batch_size": 32, "data": EXAMPLES / "spirals.csv"}),
    }


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def digests(name: str, changed: dict[str, Any], accelerator: Any) -> dict[str, Any]:
    """Of the tensors and metrics after a few steps, and of an evaluation."""
    task_type = find_task(name)
    config = replace(
        next(iter(task_type.presets.values())), micro_batches=MICRO_BATCHES, steps=STEPS, **changed
    )
    task = task_type(config, accelerator.device)
    trainer = Trainer(task, accelerator)
    metrics = []
    for step in range(STEPS):
        trainer.step(step, is_logged=True)
        metrics.append(trainer.read_metrics())
    with trainer.evaluating():
        evaluation = task.evaluate(trainer.sum_over()).metrics
    files = tensors_by_file(task)
    return {
        "tensors": {file: digest(dict(some)) for file, some in files.items()},
        "metrics": metrics,
        "evaluation": evaluation,
    }


# Faults


def float_sums() -> None:
    """Gradients added up as they are."""

    def mean(self: Any, found: Any, parameters: Any) -> list[Tensor | None]:
        used = (
            [gradient for gradient in of_all if gradient is not None] for of_all in zip(*found, strict=True)
        )
        sums = [torch.stack(some).sum(0) if some else None for some in used]
        for one in sums if dist.is_initialized() else ():
            if one is not None:
                dist.all_reduce(one)
        return [None if one is None else one / MICRO_BATCHES for one in sums]

    exact_mean.ExactMean.__call__ = mean  # type: ignore[method-assign]


def products_by_process() -> None:
    """Of wide linear layers, the product of this process's own factors, added up over processes."""

    def product(weight: Tensor, parts: Any, rows: int, own: Any, count: int, threads: Any) -> Tensor:
        factors = torch.cat(list(parts.values()))
        x, deltas = factors.split([weight.shape[1], weight.shape[0]], dim=1)
        mean = deltas.T @ x / count
        if dist.is_initialized():
            dist.all_reduce(mean)
        return mean

    factored_linear._mean_product = product


def batch_norm_per_process() -> None:
    """BatchNorm over the micro-batches of this process alone."""

    def gather(rows: Any, count: int) -> Tensor:
        return torch.stack(list(rows.values()))

    micro_batches.gather_rows = gather


def norm_by_threads() -> None:
    """The norm for clipping added up by all cores."""

    def clip(parameters: list[Tensor], largest: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch.set_num_threads(int(os.environ["CS324DIST_THREADS"]))
        norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
        torch.set_num_threads(1)
        for gradient in gradients:
            gradient *= largest / norm

    trainer_module.clip_grad_norm_ = clip


def metrics_by_process() -> None:
    """Metrics averaged within a process first, and then over processes."""

    def gather(rows: Any, count: int) -> Tensor:
        own = torch.stack(list(rows.values())).float().mean(0)
        if dist.is_initialized():
            dist.all_reduce(own)
            own /= dist.get_world_size()
        return own.double().expand(count, -1) if own.dim() else own.double().expand(count)

    trainer_module.gather_rows = gather


def evaluation_by_process() -> None:
    """Evaluations cut by process in place of fixed pieces."""
    call = sum_over.SumOver.__call__

    def by_process(self: Any, measure: Any, count: int, piece: int = 500) -> Any:
        return call(self, measure, count, -(-count // self._processes))

    sum_over.SumOver.__call__ = by_process  # type: ignore[method-assign]


def main(out: Path, fault: str | None) -> None:
    if fault:
        globals()[fault]()
    accelerator = start_accelerator()
    taken = [(title, case) for title, case in cases().items() if not fault or title in FAULTY]
    found = {title: digests(name, changed, accelerator) for title, (name, changed) in taken}
    if accelerator.is_main_process:
        out.write_text(json.dumps(found, indent=1, sort_keys=True))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
