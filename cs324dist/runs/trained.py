"""Finding the trained networks of a run."""

from collections.abc import Sequence
from pathlib import Path

from cs324dist.errors import UserError
from cs324dist.runs.checkpoints import TRAINER, WEIGHTS, verify_checkpoint
from cs324dist.runs.history import checkpoints_in
from cs324dist.runs.models import Model, load_model
from cs324dist.runs.run_dir import RunDir


def load_network(
    run_or_checkpoint: str | Path, name: str, model: type[Model], *, best: bool = False
) -> Model:
    """The network `name` of a run's newest checkpoint, or of a checkpoint, in eval mode on the CPU.

    Args:
        run_or_checkpoint: a run folder, one of its `checkpoints/STEP-OWNER`, or a network's folder.
        name: what the task calls it in `networks`.
        model: its class, whose arguments the network had in its `config`.
        best: take the run's best checkpoint, as its --keep-best says, in place of the newest.

    Raises:
        UserError: there is no such checkpoint or network, or it is damaged.
    """
    return load_model(find_network(run_or_checkpoint, (name,), best=best), model)


def find_network(run_or_checkpoint: str | Path, names: Sequence[str], *, best: bool = False) -> Path:
    """The folder of the first of these networks that there is; raises as `load_network` does."""
    path = Path(run_or_checkpoint)
    if best and ((path / WEIGHTS).is_file() or (path / TRAINER).is_file()):
        raise UserError(f"{path} is no run, of which the best checkpoint can be taken: give a run folder")
    if (path / WEIGHTS).is_file():
        return path
    checkpoint = find_checkpoint(path, best=best)
    name = next((name for name in names if (checkpoint / name).is_dir()), None)
    if name is None:
        there = sorted(path.parent.name for path in checkpoint.glob(f"*/{WEIGHTS}"))
        raise UserError(
            f"{checkpoint} holds {', '.join(there)}, and no {names[-1]}: give a run of a task that trains one"
        )
    verify_checkpoint(checkpoint, [f"{name}/config.json", f"{name}/{WEIGHTS}"])
    return checkpoint / name


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """A run's newest or best checkpoint, or the checkpoint that it is; raises as `load_network` does."""
    if (path / TRAINER).is_file():
        return path
    run = RunDir(path)
    if not run.exists:
        raise UserError(
            f"{path} is neither a run nor a checkpoint: give a run folder, such as runs/gan-fast-0"
        )
    checkpoints = checkpoints_in(run.checkpoints)
    if not checkpoints:
        raise UserError(f"{path} has no checkpoint yet: train it for longer, or lower its --checkpoint-every")
    return _best_of(run) if best else checkpoints[0]


def _best_of(run: RunDir) -> Path:
    if not (wanted := run.read_record().keep_best):
        raise UserError(
            f"{run} was trained without --keep-best (in a loop of your own keep_best): take its newest "
            f"checkpoint, or train it with --keep-best eval/accuracy"
        )
    if (found := run.best(wanted)) is None:
        raise UserError(f"no checkpoint of {run} has a value of {wanted}: train it until it is evaluated")
    return found[0]
