"""Results that are made in parts: the command line that chooses them, and how each is stored."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cs324dist.runs.environment import environment

Part = Callable[[], list[dict[str, Any]]]


def make(description: str, parts: Mapping[str, Part], folder: Path) -> None:
    """Make the parts that the command line names, all by default, and write each to `folder`/PART.json."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_written)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    chosen = parser.parse_args().parts or list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    folder.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        began = time.monotonic()
        trials = parts[part]()
        minutes = round((time.monotonic() - began) / 60, 1)
        stored = {
            "environment": {**environment(), "cores": os.cpu_count()},
            "minutes": minutes,
            "trials": trials,
        }
        (folder / f"{part}.json").write_text(json.dumps(stored) + "\n")
        print(f"{part}: {minutes} min", file=sys.stderr)
