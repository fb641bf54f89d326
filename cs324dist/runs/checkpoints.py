"""Checkpoints: folders that are complete or absent, safetensors and JSON only.

checkpoints/000001000-3/   step 1000, written by owner 3; see `lease`
    generator/{config.json,model.safetensors}  …
    optimizers.safetensors
    task.safetensors   the tensors of the task's own state; only if it has any
    trainer.json       step, the task's other state, …, SHA-256 of every file

No two owners write under the same name, so none can replace or delete what a later one wrote.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Interval
from torch import Tensor, nn

from cs324dist.config import as_json, from_json
from cs324dist.errors import RunFailed, UserError, printable
from cs324dist.runs.files import Writer, clear, matches, read_json, sha256, sync, write_json
from cs324dist.runs.hidden_state import Hidden, HiddenState
from cs324dist.runs.models import (
    copy_into,
    kind_of,
    model_tensors,
    read_tensors,
    save_model,
    save_tensors,
    transient_buffers,
)
from cs324dist.runs.optimizers import Optimizers, each, optimizer_tensors, read_optimizers

TRAINER = "trainer.json"
OPTIMIZERS = "optimizers.safetensors"
TASK = "task.safetensors"
BUFFERS = "buffers.safetensors"
WEIGHTS = "model.safetensors"
CHECKPOINT = r"([0-9]{9}|1[0-9]{9})-([1-9][0-9]*)"  # step, and the owner that wrote it
NAME = r"\w{1,99}"  # of a network
Number = Annotated[int, Interval(ge=0, le=1 << 53)]


@runtime_checkable
class Trained(Protocol):
    """What a checkpoint holds: a task, as far as this module knows it."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Networks by name."""

    @property
    def optimizers(self) -> Optimizers:
        """Optimizers by name."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, words and tensors, nested in dictionaries and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint knows beside tensors."""

    step: Number
    """Completed steps."""

    processes: Annotated[int, Interval(ge=1, le=1 << 53)] = 1
    """Processes that wrote it; another number may read it."""

    task: dict[str, Any] = field(default_factory=dict)
    """The task's own state, such as a curriculum's length; `{"$tensor": NAME}` stands for a tensor,
    `{"$numbered": [[KEY, VALUE], …]}` for a dictionary with whole numbers as keys."""

    hidden: Hidden = field(default_factory=dict)
    """What differs from a new task, and no `state_dict` holds; see `hidden_state`."""

    loss_scale: dict[str, float] = field(default_factory=dict)
    """State of the fp16 gradient scaler; empty otherwise."""

    metrics_lines: Number = 0
    """Lines of `metrics.jsonl` that belong to the completed steps."""

    is_over: bool = False
    """Whether the loop has ended before its last step."""

    sha256: dict[str, str] = field(default_factory=dict)
    """Digests of the other files, by path."""

    format: Literal[4] = 4


def checkpoint_name(step: int, generation: int) -> str:
    """The name of a checkpoint: its step, and the owner that writes it."""
    return f"{step:09d}-{generation}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.partition("-")[0])


def generation_of(checkpoint: Path) -> int:
    """The owner in a checkpoint's name."""
    return int(checkpoint.name.partition("-")[2])


def check_names(networks: Iterable[str]) -> None:
    """Check that a checkpoint can hold networks of these names.

    Raises:
        UserError: it cannot.
    """
    for name in networks:
        if not re.fullmatch(NAME, name, re.ASCII):
            raise UserError(f"a network cannot be called {name!r}: give letters, digits and underscores")


def write_checkpoint(
    folder: Path, trained: Trained, state: TrainerState, writer: Writer | None = None
) -> None:
    """Write a checkpoint under a temporary name beside `folder`, sync it, and rename it to `folder`.

    The writer is checked right before that.

    Raises:
        RunFailed: a tensor is not finite.
        UserError: something that no checkpoint can hold.
        OSError: it cannot be written, or there is one of this name; nothing of it is left.
    """
    _check_finite(trained, state.step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    clear(temporary)
    try:
        _write_files(temporary, trained, state)
        if writer:
            writer.check_owned()
        temporary.rename(folder)
    finally:
        clear(temporary)
    sync(folder.parent)


def _write_files(folder: Path, trained: Trained, state: TrainerState) -> None:
    folder.mkdir(parents=True)
    for name, network in trained.networks.items():
        save_model(folder / name, network)
        if buffers := transient_buffers(network):
            save_tensors(folder / name / BUFFERS, buffers)
    save_tensors(folder / OPTIMIZERS, optimizer_tensors(trained.optimizers, trained.networks))
    task, tensors = _split(trained.state_dict())
    if tensors:
        save_tensors(folder / TASK, tensors)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in (*files, *(folder / name for name in trained.networks)):
        sync(path)
    digests = {str(path.relative_to(folder)): sha256(path) for path in files}
    content = as_json(replace(state, task=task, sha256=digests))
    write_json(folder / TRAINER, {**content, "own_sha256": _digest(content)})


@torch.no_grad()
def _check_finite(trained: Trained, step: int) -> None:
    for file, tensors in tensors_by_file(trained).items():
        floats = [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.numel()]
        largest = torch._foreach_norm(floats, math.inf) if floats else ()  # NaN, if there is one
        for tensor, value in zip(floats, largest, strict=True):
            may_be_infinite = file != OPTIMIZERS and not isinstance(tensor, nn.Parameter)  # as a mask is
            if value.isnan() or (value.isinf() and not may_be_infinite):
                name = {OPTIMIZERS: "optimizer", TASK: "task's state"}.get(file, file.partition("/")[0])
                raise RunFailed(f"after step {step}, the {name} holds values that are not finite")


def _split(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nested state as JSON, and the tensors in it by their place, such as `history.3`.

    Raises:
        UserError: something in it is neither.
    """
    if isinstance(tree, Tensor):
        return {"$tensor": prefix}, {prefix: tree}
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        parts = {key: _split(part, f"{prefix}.{key}" if prefix else str(key)) for key, part in items}
        tensors = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
        if len(tensors) < sum(len(found) for _, found in parts.values()):
            raise UserError(f"two tensors of the task's state are both {prefix}…: give keys without dots")
        if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
            return {key: plain for key, (plain, _) in parts.items()}, tensors
        if not isinstance(tree, dict):
            return [plain for plain, _ in parts.values()], tensors
        if all(type(key) is int for key in tree):  # such as the milestones of a MultiStepLR
            return {"$numbered": [[key, plain] for key, (plain, _) in parts.items()]}, tensors
    elif type(tree) is float and math.isinf(tree):  # such as the best loss before the first
        return {"$float": str(tree)}, {}
    elif tree is None or type(tree) in (bool, int, str) or (type(tree) is float and math.isfinite(tree)):
        return tree, {}
    raise UserError(
        f"the task's state holds {prefix} = {printable(repr(tree)):.99}: give tensors, numbers and words"
    )


def _join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, dict):
        if set(plain) == {"$tensor"}:
            return tensors[plain["$tensor"]]
        if set(plain) == {"$float"}:
            return float(plain["$float"])
        if set(plain) == {"$numbered"}:
            return {key: _join(part, tensors) for key, part in plain["$numbered"]}
        return {key: _join(part, tensors) for key, part in plain.items()}
    return [_join(part, tensors) for part in plain] if isinstance(plain, list) else plain


def read_state(folder: Path) -> TrainerState:
    """What a checkpoint knows beside tensors.

    Raises:
        UserError: `trainer.json` is missing or damaged.
    """
    content = read_json(folder / TRAINER)
    if content.pop("own_sha256", None) != _digest(content):
        raise UserError(f"{folder / TRAINER} is damaged: its content is not what its digest says")
    return from_json(TrainerState, content, str(folder / TRAINER))


def verify_checkpoint(folder: Path, needed: Iterable[str] = ()) -> TrainerState:
    """Check every file's digest, and that the files `needed` are among them.

    Raises:
        UserError: naming the first file that is missing or damaged.
        OSError: a file cannot be read now; it may be whole.
    """
    state = read_state(folder)
    for name, expected in state.sha256.items():
        if not re.fullmatch(rf"({NAME}/)?{NAME}\.(json|safetensors)", name, re.ASCII):
            raise UserError(f"{folder / TRAINER} names {name[:200]!r}, which is no file of a checkpoint")
        if sha256(folder / name) != expected:
            raise UserError(f"{folder / name} is damaged: its SHA-256 is not the one in {TRAINER}")
    for name in (OPTIMIZERS, *needed):
        if name not in state.sha256:
            raise UserError(f"{folder} holds no {name}: it is a checkpoint of another task")
    if re.fullmatch(CHECKPOINT, folder.name) and step_of(folder) != state.step:
        raise UserError(f"{folder / TRAINER} is of step {state.step}: it was moved here, or is damaged")
    return state


def read_checkpoint(folder: Path, trained: Trained, hidden: HiddenState | None = None) -> TrainerState:
    """Check a checkpoint and copy it into networks, optimizers and the task's own state, in place.

    Raises:
        UserError: it is damaged, or of other networks, and nothing was copied; or the task refuses its state.
    """
    targets = tensors_by_file(trained)
    del targets[OPTIMIZERS]
    state = verify_checkpoint(folder, targets)
    if hidden:
        hidden.restore(state.hidden)  # first: an optimizer's groups decide what its state is
    tensors = {file: read_tensors(folder / file, expected) for file, expected in targets.items()}
    load_optimizers = read_optimizers(folder / OPTIMIZERS, trained.optimizers, trained.networks)
    own = tensors.pop(TASK, {})
    for file, read in tensors.items():
        copy_into(targets[file], read)
    load_optimizers()
    try:
        trained.load_state_dict(_join(state.task, own))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / TRAINER} holds a state that does not fit: {state.task!r:.200}") from None
    return state


def tensors_by_file(trained: Trained) -> dict[str, Mapping[str, Tensor]]:
    """The live tensors that a checkpoint is made of, by the file that holds them."""
    files: dict[str, Mapping[str, Tensor]] = {
        f"{name}/{WEIGHTS}": model_tensors(network) for name, network in trained.networks.items()
    }
    for name, network in trained.networks.items():
        if buffers := transient_buffers(network):
            files[f"{name}/{BUFFERS}"] = buffers
    own = _split(trained.state_dict())[1]
    return {
        **files,
        OPTIMIZERS: optimizer_tensors(trained.optimizers, trained.networks),
        **({TASK: own} if own else {}),
    }


def layout(trained: Trained) -> dict[str, str]:
    """What a new task expects in a checkpoint: tensors, and the groups of optimizers."""
    named = {
        f"{name} of the task's state": tensor for name, tensor in _split(trained.state_dict())[1].items()
    }
    for network_name, network in trained.networks.items():
        tensors = model_tensors(network) | transient_buffers(network)
        named |= {f"{network_name}.{name}": tensor for name, tensor in tensors.items()}
    groups = {}
    for name, optimizer in each(trained.optimizers):
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        groups[f"optimizer {name}"] = f"{type(optimizer).__name__} of {sizes} parameters"
    return {name: kind_of(tensor) for name, tensor in named.items()} | groups


def plain_state(trained: Trained) -> dict[str, Any]:
    """The task's own state as `trainer.json` holds it."""
    return _split(trained.state_dict())[0]


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints below `folder`: those of the latest owner first, and of one owner the newest first."""
    found = (folder / match[0] for match in matches(folder, CHECKPOINT))
    return sorted(found, key=lambda path: (generation_of(path), step_of(path)), reverse=True)


def history_of(folder: Path) -> list[Path]:
    """The newest checkpoint, and those that led to it: each of an earlier step than the one before.

    An owner that was cut off may have written others of the same and of later steps.
    """
    history: list[Path] = []
    for path in checkpoints_in(folder):
        if not history or step_of(path) < step_of(history[-1]):
            history.append(path)
    return history


def keep_newest(folder: Path, count: int, generation: int, *, best: int | None = None) -> None:
    """Delete all but the newest `count` checkpoints and that of step `best`, and a killed writer's leavings.

    What owners after `generation` wrote stays.
    """
    history = history_of(folder)
    kept = [*history[:count], *(path for path in history if step_of(path) == best)]
    for path in checkpoints_in(folder):
        if path not in kept and generation_of(path) <= generation:
            _delete(path, path.name)
    clear_unfinished(folder, generation)


def clear_unfinished(folder: Path, generation: int) -> None:
    """Remove what killed writers left below `folder`, if they were no later owners than `generation`."""
    for match in matches(folder, r"\..*\.tmp"):
        path, of = folder / match[0], re.fullmatch(rf"\.({CHECKPOINT})(\.deleted)?\.tmp", match[0])
        if of is None:
            clear(path)
        elif int(of[3]) <= generation:
            _delete(path, of[1])


def _delete(path: Path, name: str) -> None:
    """Under another name: a kill leaves no half of it, and who still writes there writes to nothing."""
    doomed = path.with_name(f".{name}.deleted.tmp")
    if path != doomed:
        clear(doomed)
        with suppress(FileNotFoundError):
            path.rename(doomed)
    clear(doomed)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
