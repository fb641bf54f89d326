"""Checkpoints: folders that are complete or absent, safetensors and JSON only.

checkpoints/000001000/
    generator/{config.json,model.safetensors}  …
    optimizers.safetensors
    trainer.json    step, world size, counters, loss scale, SHA-256 of every file
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cs324dist.errors import Refused
from cs324dist.runs.files import read_json, sha256, sync, write_json
from cs324dist.runs.models import load_tensors_into, save_model, save_tensors

TRAINER = "trainer.json"
OPTIMIZERS = "optimizers.safetensors"


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


def write_checkpoint(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, Tensor], state: TrainerState
) -> None:
    """Write a checkpoint under a temporary name beside `folder`, sync it, and rename it to `folder`."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, model in models.items():
        save_model(temporary / name, model)
    save_tensors(temporary / OPTIMIZERS, optimizers)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    for name in models:
        sync(temporary / name)
    content = {**asdict(state), "sha256": {str(path.relative_to(temporary)): sha256(path) for path in files}}
    write_json(temporary / TRAINER, {**content, "own_sha256": _digest(content)})
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # one that was found damaged, or of a run that went back
    temporary.replace(folder)
    sync(folder.parent)


def verify_checkpoint(folder: Path) -> TrainerState:
    """Check every file's digest.

    Raises:
        Refused: naming the first file that is missing or damaged.
    """
    content = read_json(folder / TRAINER)
    if content.pop("own_sha256", None) != _digest(content):
        raise Refused(f"{folder / TRAINER} is damaged: its content is not what its digest says")
    digests = content.pop("sha256", None)
    if not isinstance(digests, dict) or OPTIMIZERS not in digests:
        raise Refused(f"{folder / TRAINER} lists no files: it is damaged, or not a file of this project")
    for name, expected in digests.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Refused(f"{folder / TRAINER} names {name!r}, outside the checkpoint")
        if not path.is_file():
            raise Refused(f"{path} is missing")
        if sha256(path) != expected:
            raise Refused(f"{path} is damaged: its SHA-256 is not the one in {TRAINER}")
    return _trainer_state(folder, content)


def read_checkpoint(
    folder: Path, models: Mapping[str, nn.Module], optimizers: Mapping[str, Tensor]
) -> TrainerState:
    """Check a checkpoint and copy it into models and optimizer state, in place.

    Raises:
        Refused: damaged, or written for other models.
    """
    state = verify_checkpoint(folder)
    for name, model in models.items():
        load_tensors_into(folder / name / "model.safetensors", model.state_dict())
    load_tensors_into(folder / OPTIMIZERS, optimizers)
    return state


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, newest first."""
    found = (path for path in folder.glob("[0-9]*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints, and what a killed writer left behind."""
    for path in [*checkpoints_in(folder)[count:], *folder.glob(".*.tmp")]:
        shutil.rmtree(path)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _trainer_state(folder: Path, content: Mapping[str, Any]) -> TrainerState:
    step, world_size = content.get("step"), content.get("world_size")
    counters, loss_scale = content.get("counters"), content.get("loss_scale")
    if (
        not _are(int, [step, world_size])
        or not isinstance(counters, dict)
        or not _are(int, counters.values())
        or not isinstance(loss_scale, dict)
        or not _are((int, float), loss_scale.values())
    ):
        raise Refused(f"{folder / TRAINER} has values of the wrong type: it is damaged")
    return TrainerState(step, world_size, counters, loss_scale)  # type: ignore[arg-type]


def _are(kind: type | tuple[type, ...], values: Iterable[Any]) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
