"""Options and records: frozen dataclasses whose annotations say what is allowed, read from JSON strictly."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from annotated_types import Interval
from pydantic import TypeAdapter, ValidationError

from cs324dist.errors import UserError, printable

Record = TypeVar("Record")
_adapter: Any = cache(TypeAdapter)

MUTABLE = object()
"""For an option's annotation: it may have another value when a run is continued."""

POSITIONAL = object()
"""For an option's annotation: it stands on the command line without a name."""

Count = Annotated[int, Interval(ge=1, le=10**9)]
Positive = Annotated[float, Interval(gt=0, le=1e9)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
BatchSize = Annotated[int, Interval(ge=1, le=1_000_000)]
ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True)
class Config:
    """The options that every task has."""

    preset: Annotated[str, MUTABLE] = ""
    """Named recipe that the other defaults come from."""

    run_dir: Annotated[Path | None, MUTABLE] = None
    """Run folder. To continue a run, give the same command again."""

    steps: Annotated[Count, MUTABLE] = 1000
    """Optimization steps in total."""

    log_every: Annotated[Count, MUTABLE] = 50
    """Steps between lines of metrics; those of training are of this one step."""

    evaluate_every: Annotated[Count, MUTABLE] = 1000
    """Steps between evaluations; the last step is always evaluated."""

    checkpoint_every: Annotated[Count, MUTABLE] = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_last: Annotated[Count, MUTABLE] = 3
    """Number of newest checkpoints that are kept."""

    keep_best: Annotated[str, MUTABLE] = ""
    """Metric of which the best checkpoint is kept as well, such as eval/accuracy, or eval/loss:min for the
    smallest. A checkpoint is then written after each evaluation."""

    peer_timeout: Annotated[Count, MUTABLE] = 600
    """Seconds without an answer from another process after which the run ends."""

    precision: Annotated[Literal["no", "fp16", "bf16"] | None, MUTABLE] = None
    """Mixed precision; no: float32. By default what the launcher was asked for; or else a continued run keeps
    its own, and a new one takes its task's, where the processor is fast in it."""

    wandb: Annotated[Literal["online", "offline", "disabled"], MUTABLE] = "online"
    """Weights & Biases: online (offline if there is no login or network), offline or disabled."""

    tensorboard: Annotated[bool, MUTABLE] = False
    """Write the metrics for TensorBoard too, into tensorboard/ of the run folder."""

    dry_run: Annotated[bool, MUTABLE] = False
    """Print the settings that would be used, and stop."""

    seed: Seed = 0
    """Seed of everything random."""

    batch_size: BatchSize = 64
    """Samples in the global batch, which the processes share."""

    micro_batches: Count | None = None
    """Equal parts that the global batch is cut into. The result is then equal to the last bit on any number
    of processes up to this one. Without it: one part per process, averaged by DDP in floating point."""

    check_every: Annotated[int, Interval(ge=0, le=10**9), MUTABLE] = 100
    """Steps between two in which gradients are computed a second time and compared to the last bit, with
    --micro-batches; the first step of each start is one. 0: never."""

    schedule: ScheduleName = "constant"
    """Learning rate over the steps: constant; linear or cosine, which fall to zero linearly or along half a
    cosine; wsd, constant over the first half and then falling to zero linearly."""

    warmup_steps: Annotated[int, Interval(ge=0, le=10**9)] = 0
    """Steps over which the learning rate rises linearly at the start."""

    max_grad_norm: Positive | None = None
    """Largest norm of a network's gradient; larger ones are scaled down. none: no limit."""

    groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "model": ("model", "kernel", "hidden_size", "latent_dim", "initialisation"),
        "data": ("seed", "dataset", "data_root", "data", "length", "encoding"),
        "run": ("run_dir", "micro_batches", "check_every", "precision", "log_every", "evaluate_every",
                "checkpoint_every", "keep_last", "keep_best", "peer_timeout", "wandb", "tensorboard",
                "dry_run"),
    }  # fmt: skip
    """Headings of the help page and the options below them; all others are below `recipe`."""

    default_precision: ClassVar[Literal["no", "bf16"]] = "no"
    """Mixed precision where none is asked for. bf16: if the machine is faster in it."""

    def learning_rate_factor(self, step: int) -> float:
        """The factor on every learning rate at `step`, counted from 0: a warm-up, then the schedule."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        at, end = step - self.warmup_steps, max(self.steps - self.warmup_steps, 1)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1 - at / end
            case "cosine":  # half of one (Loshchilov and Hutter 2017)
                return 0.5 * (1 + math.cos(math.pi * at / end))
            case "wsd":  # warmup, stable, decay (Hu et al. 2024)
                return min(1.0, 2 * (1 - at / end))

    def is_due(self, completed: int, every: int) -> bool:
        """Whether something done every `every` steps is due now; after the last step it always is."""
        return completed % every == 0 or completed == self.steps

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.run_dir is not None, "set by `from_command_line`"
        return self.run_dir


ConfigT = TypeVar("ConfigT", bound=Config)


def option(field: str) -> str:
    """The command line's name of a field."""
    return "--" + field.replace("_", "-")


def conflicts(config: Config, stored: Config) -> list[str]:
    """One line for each option of a stored run that this command would change halfway."""
    hints = hints_of(type(config))
    lines = [
        f"{option(name)} {'none' if value is None else value} differs from the run's "
        f"{printable(getattr(stored, name))}: give the run's value, or another --run-dir"
        for name, value in vars(config).items()
        if MUTABLE not in get_args(hints[name]) and value != getattr(stored, name)
    ]
    sampled = range(0, stored.steps, -(-stored.steps // 1000))
    if any(config.learning_rate_factor(step) != stored.learning_rate_factor(step) for step in sampled):
        if config.steps != stored.steps:
            lines.append(
                f"--steps {config.steps} differs from the run's {stored.steps}, which its learning rate "
                f"depends on: give the run's value, or another --run-dir"
            )
    elif config.steps < stored.steps:
        lines.append(
            f"--steps {config.steps} is less than the run's {stored.steps}: give at least {stored.steps}, "
            f"or another --run-dir"
        )
    return lines


def hints_of(record_type: Any) -> dict[str, Any]:
    """The annotation of each field."""
    hints = get_type_hints(record_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(record_type)}


def as_json(record: Any) -> dict[str, Any]:
    """A record as JSON values."""
    return _adapter(type(record)).dump_python(record, mode="json")


def from_json(record_type: type[Record], content: Any, source: str) -> Record:
    """The record in the content of a JSON file, read strictly; an error names `source` and what is wrong."""
    hints, content = hints_of(record_type), content if isinstance(content, dict) else {}
    if "format" in hints and content.get("format") != (supported := get_args(hints["format"])[0]):
        raise UserError(
            f"{source} has format {printable(content.get('format'))}, this version reads format {supported}: "
            f"use the version that wrote it, or give another folder"
        )
    if unknown := sorted(content.keys() - hints.keys()):
        raise UserError(f"{source}: {printable(unknown[0])} is unknown: it is damaged, or of a newer version")
    try:
        return _adapter(record_type).validate_json(json.dumps(content), strict=True)
    except ValidationError as invalid:
        if invalid.errors()[0]["type"] == "json_invalid":  # nested too deeply, or half of a surrogate pair
            raise UserError(f"{source} is damaged, or not a file of this project") from None
        lines = [
            f"{source}: {'.'.join(printable(part) for part in error['loc'])} is "
            f"{'missing' if error['type'] == 'missing' else printable(error['input'])}"
            for error in invalid.errors(include_url=False)
        ]
        raise UserError(*lines) from None
