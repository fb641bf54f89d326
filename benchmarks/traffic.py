"""What DDP moves for each model in a step: the bytes each process hands to the collectives.

python benchmarks/traffic.py
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cs324dist.distributed.batch_norm import freeze_cancelled_biases
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.models.gan import Discriminator, Generator
from cs324dist.models.lstm import LSTM

MODELS = {
    "generator": Generator(),
    "discriminator": Discriminator(),
    "lstm, one-hot": LSTM(10),
    "digit classifier": DigitClassifier(),
}


def gradient_bytes(model: nn.Module) -> int:
    """One all-reduce over every trained parameter, float32."""
    freeze_cancelled_biases(model)
    return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


def batch_norm_bytes(model: nn.Module) -> int:
    """Mean and variance of each channel forward, two sums of each backward, float32."""
    return sum(4 * 4 * m.num_features for m in model.modules() if isinstance(m, _BatchNorm))


if __name__ == "__main__":
    print("| model | gradients, bytes a step | BatchNorm, bytes a step |", "|---|---|---|", sep="\n")
    for name, model in MODELS.items():
        print(f"| {name} | {gradient_bytes(model):,} | {batch_norm_bytes(model):,} |")
