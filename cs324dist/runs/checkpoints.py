"""Checkpoints: folders that are complete or absent, safetensors and JSON only.

checkpoints/000001000/
    generator/{config.json,model.safetensors}  …
    optimizers.safetensors
    trainer.json    step, generation, world size, counters, …, SHA-256 of every file
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cs324dist.errors import RunFailed, UserError
from cs324dist.runs.files import clear, is_number, read_json, sha256, sync, write_json
from cs324dist.runs.models import copy_into, read_tensors, save_model, save_tensors

TRAINER = "trainer.json"
OPTIMIZERS = "optimizers.safetensors"
WEIGHTS = "model.safetensors"
LARGEST_GENERATION = 999_999_990
NAME = r"\w{1,99}"  # of a model


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint knows beside tensors."""

    step: int
    """Completed steps."""

    world_size: int
    """Processes that wrote it; another number may read it."""

    counters: Mapping[str, int] = field(default_factory=dict)
    """A task's own integers, such as a curriculum's length."""

    loss_scale: Mapping[str, float] = field(default_factory=dict)
    """State of the fp16 gradient scaler; empty otherwise."""

    generation: int = 1
    """The owner that wrote it; see `ownership`."""

    metrics_lines: int = 0
    """Lines of `metrics.jsonl` that belong to the completed steps."""

    evaluation_owed: bool = False
    """Whether a signal cut this step's evaluation short."""


def check_names(models: Iterable[str]) -> None:
    """Find that a checkpoint can hold models of these names.

    Raises:
        UserError: it cannot.
    """
    for name in models:
        if not re.fullmatch(NAME, name, re.ASCII):
            raise UserError(f"a model cannot be called {name!r}: give letters, digits and underscores")


def write_checkpoint(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, Tensor], state: TrainerState
) -> None:
    """Write a checkpoint under a temporary name beside `folder`, sync it, and rename it to `folder`.

    Raises:
        RunFailed: a tensor is not finite.
        OSError: it cannot be written, or a later owner has written it; nothing of it is left.
    """
    for file, tensors in tensors_by_file(models, optimizers).items():
        if not _all_finite(tensors.values()):
            name = "optimizer" if file == OPTIMIZERS else file.partition("/")[0]
            raise RunFailed(f"after step {state.step}, the {name} holds values that are not finite")
    temporary = folder.with_name(f".{folder.name}.{state.generation}.tmp")
    clear(temporary)
    try:
        _write_files(temporary, models, optimizers, state)
        if _generation(folder) <= state.generation:
            _delete(folder)  # damaged, or left by an owner that was cut off
        temporary.rename(folder)
    finally:
        clear(temporary)
    sync(folder.parent)


def _write_files(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, Tensor], state: TrainerState
) -> None:
    folder.mkdir(parents=True)
    for name, model in models.items():
        save_model(folder / name, model)
    save_tensors(folder / OPTIMIZERS, optimizers)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    for name in models:
        sync(folder / name)
    _write_trainer(folder, state, {str(path.relative_to(folder)): sha256(path) for path in files})


@torch.no_grad()
def _all_finite(tensors: Iterable[Tensor]) -> bool:
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    largest = torch._foreach_norm(floats, math.inf) if floats else ()  # NaN, if there is one
    return all(math.isfinite(x) for x in largest)


def rewrite_state(folder: Path, state: TrainerState) -> None:
    """Replace what a checkpoint knows beside tensors."""
    _write_trainer(folder, state, read_json(folder / TRAINER)["sha256"])


def _write_trainer(folder: Path, state: TrainerState, digests: Mapping[str, str]) -> None:
    content = {**asdict(state), "sha256": digests}
    write_json(folder / TRAINER, {**content, "own_sha256": _digest(content)})
    sync(folder)


def verify_checkpoint(folder: Path, needed: Iterable[str] = ()) -> TrainerState:
    """Check every file's digest, and that the files `needed` are among them.

    Raises:
        UserError: naming the first file that is missing or damaged.
    """
    content = read_json(folder / TRAINER)
    if content.pop("own_sha256", None) != _digest(content):
        raise UserError(f"{folder / TRAINER} is damaged: its content is not what its digest says")
    digests = content.pop("sha256", None)
    if not isinstance(digests, dict) or OPTIMIZERS not in digests:
        raise UserError(f"{folder / TRAINER} lists no files: it is damaged, or not a file of this project")
    for name, expected in digests.items():
        if not re.fullmatch(rf"({NAME}/)?{NAME}\.(json|safetensors)", name, re.ASCII):
            raise UserError(f"{folder / TRAINER} names {name[:200]!r}, which is no file of a checkpoint")
        path = folder / name
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise UserError(f"{folder / TRAINER} names {name!r}, outside the checkpoint")
        if not path.is_file():
            raise UserError(f"{path} is missing")
        try:
            found = sha256(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if found != expected:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in {TRAINER}")
    for name in needed:
        if name not in digests:
            raise UserError(f"{folder} holds no {name}: it is a checkpoint of another task")
    state = _trainer_state(folder, content)
    if folder.name.isdecimal() and int(folder.name) != state.step:
        raise UserError(f"{folder / TRAINER} is of step {state.step}: it was moved here, or is damaged")
    return state


def read_checkpoint(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, Tensor]
) -> TrainerState:
    """Check a checkpoint and copy it into models and optimizer state, in place.

    Raises:
        UserError: damaged, or written for other models; nothing was copied then.
    """
    targets = tensors_by_file(models, optimizers)
    state = verify_checkpoint(folder, targets)
    tensors = {file: read_tensors(folder / file, expected) for file, expected in targets.items()}
    for file, expected in targets.items():
        copy_into(expected, tensors[file])
    return state


def tensors_by_file(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Tensor]
) -> dict[str, Mapping[str, Tensor]]:
    """The live tensors that a checkpoint is made of, by the file that holds them."""
    files: dict[str, Mapping[str, Tensor]] = {
        f"{name}/{WEIGHTS}": model.state_dict() for name, model in models.items()
    }
    return {**files, OPTIMIZERS: optimizers}


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints below `folder`: those of the latest owner first, and of one owner the newest first.

    Before them those that do not say who wrote them, so that the damage is seen.
    """
    written_by = _written_by(folder)
    return sorted(written_by, key=lambda path: (written_by[path] or math.inf, int(path.name)), reverse=True)


def _written_by(folder: Path) -> dict[Path, int]:
    """The checkpoints below `folder`, and the owner that wrote each; 0 where it does not say so."""
    found = folder.iterdir() if folder.is_dir() else ()
    named = (path for path in found if re.fullmatch("[0-9]{9}|1[0-9]{9}", path.name))
    return {path: _generation(path) for path in named if path.is_dir() and not path.is_symlink()}


def keep_newest(folder: Path, count: int, generation: int = 1) -> None:
    """Delete all but the newest `count` checkpoints, and what a killed writer left behind.

    What later generations than this wrote stays.
    """
    written_by = _written_by(folder)
    newest_first = sorted(written_by, key=lambda path: (written_by[path], int(path.name)), reverse=True)
    for path in newest_first[count:]:
        if written_by[path] <= generation:
            _delete(path)
    for path in folder.glob(".*.tmp"):
        writer = re.fullmatch(r"\.[0-9]+\.([0-9]{1,9})\.tmp", path.name)
        if writer is None or int(writer[1]) <= generation:
            clear(path)


def _delete(checkpoint: Path) -> None:
    """Under another name, or a process that is killed at it would leave a damaged checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted.tmp")
    clear(doomed)
    if os.path.lexists(checkpoint):
        checkpoint.rename(doomed)
        clear(doomed)


def newest_generation(folder: Path) -> int:
    """The latest owner that wrote one of the checkpoints below `folder`; 0 without one."""
    return max(_written_by(folder).values(), default=0)


def _generation(checkpoint: Path) -> int:
    try:
        generation = read_json(checkpoint / TRAINER).get("generation")
    except UserError:
        return 0
    return generation if type(generation) is int and 0 < generation <= LARGEST_GENERATION else 0


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _trainer_state(folder: Path, content: Mapping[str, Any]) -> TrainerState:
    try:
        state = TrainerState(**content)
        complete = len(content) == len(fields(state))
        counts = [state.step, state.world_size, state.generation, state.metrics_lines]
        well_formed = (
            complete
            and all(type(n) is int and is_number(n) for n in [*counts, *state.counters.values()])
            and min(counts) >= 0
            and state.world_size > 0
            and 0 < state.generation <= LARGEST_GENERATION
            and all(is_number(x) for x in state.loss_scale.values())
            and type(state.evaluation_owed) is bool
        )
    except (TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise UserError(f"{folder / TRAINER} has values of the wrong type: it is damaged")
    return state
