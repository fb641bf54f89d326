"""BatchNorm over the global batch, on CPUs and GPUs, so that N processes train as one does.

torch's SyncBatchNorm refuses CPU tensors, and waits for the GPU (pytorch #78549).
"""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def convert_sync_batchnorm(model: nn.Module) -> None:
    """Let the BatchNorm layers inside `model` take their statistics over all ranks; their names stay."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.__class__ = _SyncBatchNorm


def freeze_cancelled_biases(model: nn.Module) -> None:
    """Do not train biases directly before a BatchNorm, which subtracts them again with the mean.

    Their gradient is zero except for rounding, and Adam scales that rounding up to whole steps: they would
    wander without effect on the output, differently for every number of processes.
    """
    for chain in model.modules():
        if isinstance(chain, nn.Sequential):
            for layer, following in pairwise(chain):
                bias = getattr(layer, "bias", None)
                if isinstance(following, _BatchNorm) and isinstance(bias, nn.Parameter):
                    bias.requires_grad_(False)


class _SyncBatchNorm(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass  # of the class that this layer had before

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        output, mean, variance, count = _NormaliseOverRanks.apply(input, self.weight, self.bias, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return output


class _NormaliseOverRanks(torch.autograd.Function):
    """One collective each way: every rank's mean and variance forward, two sums per channel backward.

    Variances are put together from centred squares, as E[x²] - E[x]² would lose the digits of a small
    variance beside a large mean. Ranks hold equally many samples. The passes over `x` are those of torch's
    own kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        world_size = dist.get_world_size()
        in_full = x.to(weight.dtype)  # the kernel takes no other
        moments = torch.stack(
            torch.batch_norm_update_stats(in_full, None, None, 0.0)
        )  # mean, biased variance
        of_all_ranks = moments.new_empty(world_size, *moments.shape)
        dist.all_gather(list(of_all_ranks), moments)
        means, variances = of_all_ranks.unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count = eps, x.numel() // x.shape[1] * world_size
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = ctx.saved_tensors
        # As if mean and variance were constants; what they contribute is taken off below.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)  # parameters' gradients stay local: DDP reduces those
        mean_grad, mean_product = sums / ctx.count
        inverse_std = (variance + ctx.eps).rsqrt()
        # grad_x - weight·inverse_std·(mean_grad + normalised·mean_product), gathered by powers of x
        slope = weight * inverse_std.square() * mean_product
        offset = weight * inverse_std * mean_grad - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_x.addcmul_(x, slope.view(shape), value=-1).sub_(offset.view(shape))
        return grad_x, grad_weight, grad_bias, None
