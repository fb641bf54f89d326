"""What `config.json` and `status.json` of a run hold."""

import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from cs324dist.runs.checkpoints import Number

State = Literal["running", "stopped", "finished", "failed"]
LOOP = "loop"  # the task of a loop of one's own, whose settings have names of their own


@dataclass(frozen=True)
class RunRecord:
    """What `config.json` holds."""

    task: str
    script: str
    """The script that trains it, as it was started."""

    config: dict[str, Any]
    """Every option."""

    changed: dict[str, Any]
    """Options whose value is not their preset's, with the preset's value."""

    tracker_run_id: Annotated[str, StringConstraints(pattern="^[0-9a-f]{8}$")] = field(
        default_factory=lambda: secrets.token_hex(4)
    )
    """Id of the run at Weights & Biases."""

    task_given: str = ""
    """The task as it was given to the script; empty for a script of one task."""

    made_of: dict[str, str] = field(default_factory=dict)
    """Of a loop of one's own: how gradients are made, the kinds of optimizers and states, its `keep_best`."""

    arguments: tuple[str, ...] = ()
    """Of a loop of one's own: the words after the script's name."""

    format: Literal[4] = 4

    @property
    def keep_best(self) -> str:
        """Its --keep-best, or of a loop of one's own its `keep_best`."""
        return str({**self.config, **self.made_of}.get("keep_best") or "")


@dataclass(frozen=True)
class Status:
    """What `status.json` holds: where the run stands, for batch scripts."""

    state: State
    step: Number
    """Completed steps of which a checkpoint exists."""

    why: str = ""
