"""Run the commands of README.md and docs/*.md, those of each page in a fresh copy of the repository.

python docs/check.py docs/usage.md

Without words, all pages. Blocks that are fenced as bash, console or python are run in their order; Python
whose first line names a file (`# my_task.py`) is written there first. A comment in the line before leaves a
block out, `<!-- not run: REASON -->`; `<!-- not run on this page: REASON -->` leaves out all.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```(bash|console|python)\n(.*?)^```$", re.M | re.S)
WHOLE_PAGE = re.compile(r"^<!-- not run on this page: (.+) -->$", re.MULTILINE)
LIMIT = 600  # seconds of a block
PACKAGE = ".package"  # a folder with the copy's package alone: files of the reader's are not installed


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    language: str
    code: str
    reason: str
    """Why it is not run; empty if it is."""


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, in its order."""
    of_page = WHOLE_PAGE.search(text)
    return [Block(m[2], m[3], of_page[1] if of_page else m[1] or "") for m in BLOCK.finditer(text)]


def words_of(block: Block, folder: Path) -> list[str]:
    """The command that runs a block; Python that names its file is written into the folder."""
    if block.language == "python":
        named = re.match(r"# (\w+\.py)\n", block.code)
        if not named:
            return [sys.executable, "-c", block.code]
        (folder / named[1]).write_text(block.code)
        return [sys.executable, named[1]]
    lines = block.code.splitlines()
    if block.language == "console":  # its other lines are what the commands print
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def failure_of(block: Block, folder: Path, limit: float = LIMIT) -> str:
    """Run a block; returns what it said last if it failed or took too long, and nothing otherwise."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / PACKAGE),
        "WANDB_MODE": "offline",
    }
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            words_of(block, folder),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            end = f"exit code {code}" if (code := process.wait(limit)) else ""
        except subprocess.TimeoutExpired:
            end = f"not done after {limit} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return "\n".join([*said.read().splitlines()[-12:], end]) if end else ""


def copy_to(folder: Path) -> None:
    """A checkout as it would be cloned, with the data sets that are here."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, text=True
    )
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).exists():
            shutil.copy2(REPOSITORY / name, folder / name, follow_symlinks=False)
    (folder / PACKAGE).mkdir()
    (folder / PACKAGE / "cs324dist").symlink_to(folder / "cs324dist")
    if (REPOSITORY / "data").is_dir():
        (folder / "data").symlink_to(REPOSITORY / "data")


def main(pages: list[Path]) -> int:
    """Check the pages and print a table; returns how many blocks failed."""
    failures, left_out = 0, Counter[str]()
    print(f"{'page':28} {'run':>4} {'left out':>9} {'failed':>7} {'seconds':>8}", flush=True)
    for page in pages:
        blocks, start, failed = blocks_of(page.read_text()), time.monotonic(), []
        left_out.update(block.reason for block in blocks if block.reason)
        runnable = [block for block in blocks if not block.reason]
        with tempfile.TemporaryDirectory() as name:
            if runnable:
                copy_to(Path(name))
            for block in runnable:
                if said := failure_of(block, Path(name)):
                    failed.append(f"{block.code}{said}\n")
        seconds = time.monotonic() - start
        counts = f"{len(runnable):4} {len(blocks) - len(runnable):9} {len(failed):7} {seconds:8.0f}"
        print(f"{page.name:28} {counts}", flush=True)
        print("".join(failed), end="", flush=True)
        failures += len(failed)
    for reason, count in left_out.most_common():
        print(f"left out: {count:3}  {reason}")
    return failures


if __name__ == "__main__":
    sys.exit(main([Path(word) for word in sys.argv[1:]] or PAGES) > 0)
