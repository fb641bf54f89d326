"""Deliberate faults: mistakes that DDP lets pass without a word. `docs/distributed.md` explains them."""

from torch.nn import functional as F

from cs324dist.data import streams
from cs324dist.tasks import gan, lstm

GLOBAL_BATCH = 16


def local_batch_norm() -> None:
    """Every rank normalises by the statistics of its own share of the batch."""
    gan.convert_sync_batchnorm = lambda model, accelerator: None


def offset_rank() -> None:
    """Every rank's slice begins one sample late: one sample is seen by nobody, another twice."""
    honest = streams.Shard.batch
    streams.Shard.batch = lambda shard, step, batch_size: honest(shard, step, batch_size) + (shard.rank > 0)


def sum_for_mean() -> None:
    """The loss is a sum over the local batch, and DDP averages over ranks: steps shrink with their number."""
    honest = F.cross_entropy
    F.cross_entropy = lambda logits, labels: honest(logits, labels, reduction="sum") / GLOBAL_BATCH


def unreduced_gradients() -> None:
    """The bare module is called in place of the DDP wrapper: no gradient is ever reduced."""
    honest = lstm.LSTMTask.__init__

    def build(task: lstm.LSTMTask, *arguments: object) -> None:
        honest(task, *arguments)
        task.model = task.models[task.settings.model]

    lstm.LSTMTask.__init__ = build


def shuffle_restarted_on_resume() -> None:
    """A DataLoader's shuffle begins anew when a run is continued: here after ten steps."""
    honest = streams.Shard.batch
    streams.Shard.batch = lambda shard, step, batch_size: honest(shard, step % 10, batch_size)


FAULTS = {
    fault.__name__: fault
    for fault in (
        local_batch_norm,
        offset_rank,
        sum_for_mean,
        unreduced_gradients,
        shuffle_restarted_on_resume,
    )
}
