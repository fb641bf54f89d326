"""fp16's loss scaling: what it left out."""

from typing import Any

import torch
from torch import Tensor


class SkippedSteps:
    """Counts, on the device, the steps in which a gradient overflowed, so that an optimizer did not move.

    The scaler halves its scale after each; Accelerate's `step_was_skipped` misses them with fused Adam.
    """

    def __init__(self, scaler: Any, device: torch.device) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self._scaler is not None:
            self._scale = torch.tensor(self._scaler.get_scale(), device=device)
            self._count = torch.zeros((), device=device)

    def observe(self) -> dict[str, Tensor]:
        """Look at the scale after a step; the count since this process started, nothing without a scaler."""
        if self._scaler is None:
            return {}
        scale = self._scaler._get_scale_async().clone()  # the public `get_scale` waits for the device
        self._count = self._count + (scale < self._scale)
        self._scale = scale
        return {"train/skipped_steps": self._count}
