"""What DDP moves for each model in a step: the bytes each process hands to the collectives.

python benchmarks/traffic.py
"""

from torch.nn.modules.batchnorm import _BatchNorm

from cs324dist.distributed.batch_norm import freeze_cancelled_biases
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.models.gan import Discriminator, Generator
from cs324dist.models.lstm import LSTM

FLOAT32 = 4  # bytes

print("| model | gradients, bytes per step | BatchNorm, bytes per step |", "|---|---|---|", sep="\n")
for model in (Generator(), Discriminator(), LSTM(10), DigitClassifier()):
    freeze_cancelled_biases(model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Mean and variance of each channel forward, two sums of each backward.
    moments = sum(4 * m.num_features for m in model.modules() if isinstance(m, _BatchNorm))
    print(f"| {type(model).__name__} | {FLOAT32 * parameters:,} | {FLOAT32 * moments:,} |")
