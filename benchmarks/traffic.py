"""What each process hands to the collectives in a step, for each model.

python benchmarks/traffic.py
"""

from common import Row, store
from torch.nn.modules.batchnorm import _BatchNorm

from cs324dist.distributed.batch_norm import freeze_cancelled_biases
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.models.gan import Discriminator, Generator
from cs324dist.models.lstm import LSTM


def traffic() -> list[Row]:
    """Bytes for each model: gradients by DDP or exactly, and BatchNorm for each part of the global batch."""
    rows = []
    for model in (Generator(), Discriminator(), LSTM(10), DigitClassifier()):
        freeze_cancelled_biases(model)
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        channels = sum(layer.num_features for layer in model.modules() if isinstance(layer, _BatchNorm))
        exact = 8 * sum(trained) + 4 * len(trained)  # int64, and the largest value of each tensor
        moments = 4 * 4 * channels  # mean and variance forward, two sums backward
        row = {"model": type(model).__name__, "ddp": 4 * sum(trained), "exact": exact, "batch_norm": moments}
        rows.append(row)
    return rows


if __name__ == "__main__":
    store("traffic", {"rows": traffic()})
