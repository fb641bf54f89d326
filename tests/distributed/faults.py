"""The tasks in float64, with or without a deliberate fault: mistakes that DDP lets pass without a word.

    FAULT=sum_for_mean torchrun --nproc_per_node 2 launch/train.py tests/distributed/faults.py:LSTM

`docs/distributed.md` explains them.
"""

import os

import torch
from torch import Tensor

from cs324dist import Evaluation, MicroBatch
from cs324dist.distributed import gradients
from cs324dist.tasks.gan.task import GANTask
from cs324dist.tasks.lstm.task import LSTMTask

FAULT = os.environ.get("FAULT", "")
torch.set_default_dtype(torch.float64)
if backend := os.environ.get("BACKEND"):  # of the process group, where it is not the device's own
    torch.distributed.init_process_group(backend)


class LSTM(LSTMTask):
    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(batch)
        if FAULT == "sum_for_mean":
            # A sum over the local batch, and DDP averages over ranks: steps shrink with their number.
            loss = loss * len(batch.samples) / batch.batch_size
        return loss, metrics


class GAN(GANTask):
    def evaluate(self, sum_over: object) -> Evaluation:
        return Evaluation({})  # the classifier's weights are float32


honest = MicroBatch.samples.func
if FAULT == "offset_rank":
    # Every rank's slice begins one sample late: one sample is seen by nobody, another twice.
    MicroBatch.samples = property(lambda batch: honest(batch) + (batch.index > 0))
elif FAULT == "shuffle_restarted_on_resume":
    # A DataLoader's shuffle begins anew when a run is continued: here after ten steps.
    MicroBatch.samples = property(lambda batch: honest(batch) - batch.step // 10 * 10 * batch.batch_size)
elif FAULT == "unreduced_gradients":
    # The bare module is called in place of the DDP wrapper: no gradient is ever reduced.
    gradients._wrapped = lambda losses, place: losses
elif FAULT == "local_batch_norm":
    # Every rank normalises by the statistics of its own share of the batch.
    gradients.span_the_batch = lambda *_: None
else:
    assert FAULT in ("", "sum_for_mean"), FAULT
