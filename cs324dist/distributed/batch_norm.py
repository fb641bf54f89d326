"""BatchNorm over the global batch, on CPUs and GPUs, so that N processes train as one does.

torch's SyncBatchNorm refuses CPU tensors, and waits for the GPU (pytorch #78549).
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cs324dist.distributed.parts import BACKWARD, FORWARD, Parts, Place, add_in_order, current_place
from cs324dist.errors import UserError


def span_the_batch(model: nn.Module, name: str, parts: Parts) -> None:
    """Let the BatchNorm layers inside `model` take their statistics over all parts; names stay."""
    for inner, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if not isinstance(layer, _BatchNormOverBatch):
            kind = type(layer)
            # isinstance, and what a subclass does besides, stay; SyncBatchNorm has a forward of its own.
            bases = (_BatchNormOverBatch,) if kind is nn.SyncBatchNorm else (kind, _BatchNormOverBatch)
            own = {"_check_input_dim": _BatchNormOverBatch._check_input_dim}
            layer.__class__ = type(kind.__name__, bases, own)
        layer.number = len(parts.layers)  # type: ignore[assignment]
        parts.layers.append(f"{name}.{inner}" if inner else name)
        parts.widest = max(parts.widest, 1 + 2 * layer.num_features)


def tensors_over_batch(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The running statistics that these modules take over the batch."""
    return [
        buffer
        for module in modules
        if isinstance(module, _BatchNormOverBatch)
        for buffer in module.buffers(recurse=False)
    ]


def freeze_cancelled_biases(model: nn.Module) -> None:
    """Do not train biases directly before a BatchNorm, which subtracts them again with the mean.

    Their gradient is zero except for rounding, and Adam scales that rounding up to whole steps: they would
    wander without effect on the output, differently for every number of processes.
    """
    for chain in model.modules():
        if isinstance(chain, nn.Sequential):
            for layer, following in pairwise(chain):
                bias = getattr(layer, "bias", None)
                # In eval mode BatchNorm subtracts the running mean, which leaves the bias; sizes differ where
                # it is not per channel.
                if (
                    isinstance(bias, nn.Parameter)
                    and isinstance(following, _BatchNorm)
                    and following.training
                    and len(bias) == following.num_features
                ):
                    bias.requires_grad_(False)


class _BatchNormOverBatch(_BatchNorm):
    number: int
    """The index of the layer, among those that span the batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # of the class that this layer had before

    # torch.compile would trace into the exchange between the parts.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        place = current_place()
        if not self.training or place is None:
            return super().forward(input)
        if torch._C._are_functorch_transforms_active():
            raise UserError(
                "torch.func (grad, vmap, …) cannot pass BatchNorm over the batch: take torch.autograd.grad, "
                "or GroupNorm, InstanceNorm or LayerNorm"
            )
        output, mean, variance, count = _NormaliseOverBatch.apply(
            input, self.weight, self.bias, self.eps, place, self.number
        )
        if place.is_first and self.running_mean is not None:
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
                dtype = self.running_mean.dtype
                self.running_mean.lerp_(mean.to(dtype), momentum)
                self.running_var.lerp_((variance * (count / (count - 1))).to(dtype), momentum)
        return output


class _NormaliseOverBatch(torch.autograd.Function):
    """One all-gather in each pass: mean and variance of every part forward, two sums per channel backward.

    Variances are put together from centred squares, as E[x²] - E[x]² would lose the digits of a small
    variance beside a large mean. The passes over `x` are those of torch's own kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, place: Place, layer: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        in_full = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 is too coarse for moments
        if not x.numel():
            raise UserError(f"a BatchNorm layer got no values of part {place.index} of the batch")
        moments = torch.batch_norm_update_stats(in_full, None, None, 0.0)  # mean, biased variance
        own_count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        rows = place.gather(layer, FORWARD, torch.cat([own_count, *(part.double() for part in moments)]))
        counts = rows[:, :1]
        means, variances = rows[:, 1:].chunk(2, dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        dtype = in_full.dtype if weight is None else weight.dtype
        mean, variance = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.place, ctx.layer = eps, place, layer
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # `once_differentiable` would lose gradients in silence: autograd.grad passes over its error.
        if torch.is_grad_enabled():  # by create_graph=True
            raise UserError(
                "the loss differentiates a gradient (create_graph=True) that passed BatchNorm over the "
                "batch: take GroupNorm, InstanceNorm or LayerNorm in that network, or a finite difference "
                "of two passes, as the GAN here does"
            )
        x, weight, mean, variance, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # As if mean and variance were constants; what they contribute is taken off below.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # Gradients of parameters stay this part's own: they are averaged later.
        own = torch.stack([grad_bias, grad_weight]).double()
        sums = add_in_order(ctx.place.gather(ctx.layer, BACKWARD, own))
        mean_grad, mean_product = (sums / count).to(scale.dtype)
        inverse_std = (variance + ctx.eps).rsqrt()
        # grad_x - scale·inverse_std·(mean_grad + normalised·mean_product), gathered by powers of x
        slope = scale * inverse_std.square() * mean_product
        offset = scale * inverse_std * mean_grad - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_x.addcmul_(x, slope.view(shape), value=-1).sub_(offset.view(shape))
        own_gradients = (None, None) if weight is None else (grad_weight, grad_bias)
        return grad_x, *own_gradients, None, None, None
