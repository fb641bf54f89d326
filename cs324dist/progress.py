"""How far a run is: a bar in a terminal, plain lines elsewhere, on the main process only."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from cs324dist.settings import RunSettings


class Progress:
    """Reads the metrics of a step, adds the throughput since the last reading, and shows both."""

    def __init__(self, start: int, settings: RunSettings, accelerator: Accelerator) -> None:
        self._settings, self._accelerator = settings, accelerator
        self._last_step, self._last_time = start, time.perf_counter()
        self._in_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=settings.steps,
            initial=start,
            unit="step",
            disable=not (accelerator.is_main_process and self._in_terminal),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def read(self, completed: int, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics of this step averaged over ranks, as numbers: here the device is waited for."""
        values = averaged_over_ranks(metrics, self._accelerator)
        now = time.perf_counter()
        rate = (completed - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_time = now
        self._show(completed, values, rate)
        self._last_step = completed
        return {**values, "throughput/samples_per_second": rate * self._settings.batch_size}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside out of the throughput."""
        before = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - before

    def _show(self, completed: int, values: Mapping[str, float], rate: float) -> None:
        brief = {name.removeprefix("train/"): f"{value:.4f}" for name, value in values.items()}
        if self._in_terminal:
            self._bar.set_postfix(brief, refresh=False)
            self._bar.update(completed - self._last_step)
        elif self._accelerator.is_main_process:
            left = (self._settings.steps - completed) / rate
            print(
                f"step {completed}/{self._settings.steps}",
                *(f"{name} {value}" for name, value in brief.items()),
                f"{rate:.1f} steps/s",
                f"{left / 60:.1f} min left",
                sep="  ",
                file=sys.stderr,
                flush=True,
            )


def averaged_over_ranks(metrics: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Each rank's metrics to the numbers that are logged."""
    stacked = torch.stack([metric.detach().double() for metric in metrics.values()])
    return dict(zip(metrics, accelerator.reduce(stacked, "mean").tolist(), strict=True))
