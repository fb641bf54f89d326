"""BatchNorm over the global batch, on CPUs and GPUs, so that N processes train as one does.

torch's SyncBatchNorm refuses CPU tensors, and waits for the GPU (pytorch #78549).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cs324dist.distributed.micro_batches import Place, add_in_order, current_place


def convert_sync_batchnorm(model: nn.Module) -> None:
    """Let the BatchNorm layers inside `model` take their statistics over the global batch; names stay."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _SyncBatchNorm):
            kind = type(layer)
            if kind.__module__ == nn.BatchNorm1d.__module__:
                layer.__class__ = _SyncBatchNorm
            else:  # what a subclass does besides stays
                own = {"_check_input_dim": _SyncBatchNorm._check_input_dim}
                layer.__class__ = type(kind.__name__, (kind, _SyncBatchNorm), own)


def spans_the_batch(model: nn.Module) -> bool:
    """Whether there are BatchNorm layers inside `model`."""
    return any(isinstance(layer, _BatchNorm) for layer in model.modules())


def freeze_cancelled_biases(model: nn.Module) -> None:
    """Do not train biases directly before a BatchNorm, which subtracts them again with the mean.

    Their gradient is zero except for rounding, and Adam scales that rounding up to whole steps: they would
    wander without effect on the output, differently for every number of processes.
    """
    for chain in model.modules():
        if isinstance(chain, nn.Sequential):
            for layer, following in pairwise(chain):
                bias = getattr(layer, "bias", None)
                # In eval mode it subtracts another mean; a bias of another size is not one for each channel.
                if (
                    isinstance(bias, nn.Parameter)
                    and isinstance(following, _BatchNorm)
                    and following.training
                    and len(bias) == following.num_features
                ):
                    bias.requires_grad_(False)


class _SyncBatchNorm(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass  # of the class that this layer had before

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        place = current_place()
        output, mean, variance, count = _NormaliseOverBatch.apply(
            input, self.weight, self.bias, self.eps, place
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
    """One gathering each way: every part's mean and variance forward, two sums per channel backward.

    Variances are put together from centred squares, as E[x²] - E[x]² would lose the digits of a small
    variance beside a large mean. Parts hold equally many samples. The passes over `x` are those of torch's
    own kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, place: Place
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        in_full = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 is too coarse for moments
        moments = torch.stack(
            torch.batch_norm_update_stats(in_full, None, None, 0.0)
        )  # mean, biased variance
        means, variances = place.gather(moments).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if weight is not None:
            mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.place, ctx.count = eps, place, x.numel() // x.shape[1] * len(means)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # As if mean and variance were constants; what they contribute is taken off below.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        # Gradients of parameters stay this part's own: they are averaged later.
        sums = add_in_order(ctx.place.gather(torch.stack([grad_bias, grad_weight])))
        mean_grad, mean_product = sums / ctx.count
        inverse_std = (variance + ctx.eps).rsqrt()
        # grad_x - scale·inverse_std·(mean_grad + normalised·mean_product), gathered by powers of x
        slope = scale * inverse_std.square() * mean_product
        offset = scale * inverse_std * mean_grad - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_x.addcmul_(x, slope.view(shape), value=-1).sub_(offset.view(shape))
        own = (None, None) if weight is None else (grad_weight, grad_bias)
        return grad_x, *own, None, None
