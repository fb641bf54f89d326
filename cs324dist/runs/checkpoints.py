"""Checkpoints: folders that are complete or absent, safetensors and JSON only.

checkpoints/000001000-3/   step 1000, written by owner 3; see `lease`
    generator/{config.json,model.safetensors}  …
    optimizers.safetensors
    task.safetensors   the tensors of the task's own state; only if it has any
    hidden.safetensors  those of `hidden_state`; only if it has any
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
from cs324dist.errors import ReportedError, RunFailed, UserError, printable
from cs324dist.runs.files import Writer, clear, read_json, sha256, sync, write_json
from cs324dist.runs.hidden_state import Hidden, HiddenState
from cs324dist.runs.history import CHECKPOINT, step_of
from cs324dist.runs.models import (
    copy_into,
    kind_of,
    model_tensors,
    read_tensors,
    save_model,
    save_tensors,
    transient_buffers,
)
from cs324dist.runs.optimizers import Optimizers, each, optimizer_tensors, read_optimizers, with_full_state
from cs324dist.runs.state_tree import join, split

TRAINER = "trainer.json"
OPTIMIZERS = "optimizers.safetensors"
TASK = "task.safetensors"
BUFFERS = "buffers.safetensors"
HIDDEN = "hidden.safetensors"
WEIGHTS = "model.safetensors"
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
    task, tensors = split(trained.state_dict())
    if tensors:
        save_tensors(folder / TASK, tensors)
    hidden, tensors = split(state.hidden)
    if tensors:
        save_tensors(folder / HIDDEN, tensors)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in (*files, *(folder / name for name in trained.networks)):
        sync(path)
    digests = {str(path.relative_to(folder)): sha256(path) for path in files}
    content = as_json(replace(state, task=task, hidden=hidden, sha256=digests))
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


def read_checkpoint(
    folder: Path,
    trained: Trained,
    hidden: HiddenState | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> TrainerState:
    """Check a checkpoint and copy it into networks, optimizers and the task's own state, in place.

    Raises:
        UserError: it is damaged, or of other networks, and nothing was copied; or the task refuses its state.
    """
    targets = tensors_by_file(trained)
    del targets[OPTIMIZERS]
    state = verify_checkpoint(folder, targets)
    if hidden:
        found = read_tensors(folder / HIDDEN, None) if HIDDEN in state.sha256 else {}
        hidden.restore(join(state.hidden, found))  # first: an optimizer's groups decide what its state is
    tensors = {file: read_tensors(folder / file, expected) for file, expected in targets.items()}
    load_optimizers = read_optimizers(folder / OPTIMIZERS, trained.optimizers, trained.networks)
    own = tensors.pop(TASK, {})
    for file, read in tensors.items():
        copy_into(targets[file], read)
    load_optimizers()
    try:
        trained.load_state_dict(join(state.task, own))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / TRAINER} holds a state that does not fit: {state.task!r:.200}") from None
    if state.loss_scale and scaler is not None:
        interval = scaler.get_growth_interval()  # torch takes no float, as numbers in a checkpoint are
        scaler.load_state_dict({**state.loss_scale, "growth_interval": interval})
    return state


def check_that_it_can_be_saved(scratch: Path, trained: Trained) -> None:
    """Write a checkpoint with all the state that there will be into a folder, and read it again.

    Raises:
        UserError: something cannot be saved, or the folder cannot be written to.
    """
    clear(scratch)
    try:
        with with_full_state(trained.optimizers):
            write_checkpoint(scratch / "0", trained, TrainerState(0))
            read_checkpoint(scratch / "0", trained)
    except ReportedError:
        raise
    except OSError as error:
        raise unwritable(scratch.parents[1], error) from None
    except Exception as error:
        raise UserError(f"it cannot be saved: {type(error).__name__}: {printable(error)}") from error
    finally:
        clear(scratch)
        with suppress(OSError):  # it holds more
            scratch.parent.rmdir()


def unwritable(run: Path, error: OSError) -> UserError:
    """What to say of an error before the first step."""
    return UserError(f"{run} cannot be written to ({error.strerror}): give another folder")


def tensors_by_file(trained: Trained) -> dict[str, Mapping[str, Tensor]]:
    """The live tensors that a checkpoint is made of, by the file that holds them."""
    files: dict[str, Mapping[str, Tensor]] = {
        f"{name}/{WEIGHTS}": model_tensors(network) for name, network in trained.networks.items()
    }
    for name, network in trained.networks.items():
        if buffers := transient_buffers(network):
            files[f"{name}/{BUFFERS}"] = buffers
    own = split(trained.state_dict())[1]
    return {
        **files,
        OPTIMIZERS: optimizer_tensors(trained.optimizers, trained.networks),
        **({TASK: own} if own else {}),
    }


def layout(trained: Trained) -> dict[str, str]:
    """What a new task expects in a checkpoint: tensors, and the groups of optimizers."""
    named = {f"{name} of the task's state": tensor for name, tensor in split(trained.state_dict())[1].items()}
    for network_name, network in trained.networks.items():
        tensors = model_tensors(network) | transient_buffers(network)
        named |= {f"{network_name}.{name}": tensor for name, tensor in tensors.items()}
    groups = {}
    for name, optimizer in each(trained.optimizers):
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        groups[f"optimizer {name}"] = f"{type(optimizer).__name__} of {sizes} parameters"
    return {name: kind_of(tensor) for name, tensor in named.items()} | groups


def difference(first: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first difference between two layouts, of the start and of now; empty without one."""
    for name in sorted(first.keys() | now.keys()):
        if (was := first.get(name, "no tensor")) != (is_now := now.get(name, "no tensor")):
            return (
                f"{name} is {is_now}, and was {was} at the start, as a resume expects it: create it before "
                f"the start, or keep numbers"
            )
    return ""


def plain_state(trained: Trained) -> dict[str, Any]:
    """The task's own state as `trainer.json` holds it."""
    return split(trained.state_dict())[0]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
