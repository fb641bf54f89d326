"""Take intervals of a run again and compare what they end in, bit for bit.

python launch/audit.py runs/gan-fast-0

python launch/audit.py runs/lstm-length50-fast-0 --from-start

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/audit.py RUN_OF_TWO_PROCESSES
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cs324dist import fix_hash_seed
from cs324dist.audit import audit
from cs324dist.command_line import parse
from cs324dist.config import POSITIONAL
from cs324dist.errors import errors_as_exit_codes, exit_process


@dataclass(frozen=True)
class Audit:
    """What to replay."""

    run: Annotated[Path, POSITIONAL]
    """A run folder; nothing in it is changed."""

    task: str | None = None
    """The task of a run of your own: path/to/file.py:Class or package.module:Class."""

    from_start: bool = False
    """Replay not only between kept checkpoints, but also from the first step to the oldest of them."""

    data_root: Path = Path("data")
    """Folder of the data sets, whatever the run names."""


if __name__ == "__main__":
    fix_hash_seed()  # as it was in the run
    with errors_as_exit_codes():
        options = parse(Audit, __doc__)
        audit(options.run, options.task, options.from_start, options.data_root)
        exit_process(0)
