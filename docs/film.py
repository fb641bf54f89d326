"""Record the README's film: a run is killed, goes on with other processes, and is audited.

    python docs/film.py docs/images/film.svg

The commands run as they are shown; what they print is in the film, without its pauses.
"""

import html
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RUN = "launch/lstm.py --length 50 --steps 40 --micro-batches 4 --log-every 5 --checkpoint-every 10"
MODEL = "checkpoints/000000040-*/lstm/model.safetensors"
SCENES = (  # a command, and the line after which it is killed
    (f"torchrun --nproc_per_node 2 {RUN} --run-dir runs/a", "step 25/"),
    (f"torchrun --nproc_per_node 3 {RUN} --run-dir runs/a", None),
    (f"python {RUN} --run-dir runs/b", None),
    (f"sha256sum runs/a/{MODEL} runs/b/{MODEL}", None),
    ("python launch/audit.py runs/a --from-start", None),
)
WANTED = r"step|evaluation|runs/|continuing|[0-9a-f]{64}|.*(\^C|Killed)"
COLUMNS, ROWS, LINE, LETTER = 120, 22, 18, 7.83
LONGEST_PAUSE, END = 0.7, 6.0  # seconds
WRAPPER = textwrap.TextWrapper(COLUMNS, subsequent_indent=4 * " ", break_on_hyphens=False)
Line = tuple[float, str]  # the seconds before it, and what it says


def record(command: str, killed_after: str | None) -> list[Line]:
    """Run a command, and kill all its processes after a line that begins so."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        shell=True,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "CS324DIST_THREADS": "1", "WANDB_MODE": "disabled"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    found, before = [(1.0, ""), (0.5, f"$ {command}")], time.monotonic()
    for text in process.stdout:
        if re.match(WANTED, text):
            found.append((min(time.monotonic() - before, LONGEST_PAUSE), text.rstrip()))
            before = time.monotonic()
        if killed_after and text.startswith(killed_after):
            subprocess.run(["pkill", "-KILL", "-f", "runs/a"], check=False)
            os.killpg(process.pid, signal.SIGKILL)
            return [*found, (0.5, "# kill -9, to all of its processes")]
    if process.wait():
        sys.exit(f"{command} ended with exit code {process.returncode}")
    return found


def wrapped(lines: list[Line]) -> list[Line]:
    """The lines, cut where the terminal is too narrow."""
    return [
        (0.0 if number else pause, part)
        for pause, text in lines
        for number, part in enumerate(WRAPPER.wrap(text) or [""])
    ]


def drawn(lines: list[Line]) -> str:
    """An animated SVG: a column of all lines, which moves up past a window by a line at a time."""
    length = sum(pause for pause, _ in lines) + END
    width, height = COLUMNS * LETTER + 32, ROWS * LINE + 12  # the next line stays out of sight
    now, keys, texts = 0.0, [], []
    for number, (pause, text) in enumerate(lines, 1):
        now += pause
        keys.append(f"{100 * now / length:.2f}% {{ transform: translateY({-number * LINE}px) }}")
        kind = {"$": "command", "#": "remark"}.get(text[:1], "")
        y = ROWS * LINE + number * LINE + 6
        texts.append(f'<text class="{kind}" x="16" y="{y}">{html.escape(text)}</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">
<title>A run is killed, goes on with three processes, and ends with the bits of a run that was not</title>
<style>
text {{ font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }}
text {{ fill: #d7dce2; white-space: pre }}
.command {{ fill: #8fd18f; font-weight: bold }}
.remark {{ fill: #ff9d80 }}
#lines {{ animation: film {length:.1f}s step-end infinite }}
@keyframes film {{ 0% {{ transform: none }} {" ".join(keys)} }}
@media (prefers-reduced-motion: reduce) {{
  #lines {{ animation: none; transform: translateY({-len(lines) * LINE}px) }}
}}
</style>
<rect width="100%" height="100%" rx="8" fill="#1b1f24"/>
<g id="lines">
{chr(10).join(texts)}
</g>
</svg>
"""


if __name__ == "__main__":
    for name in ("a", "b"):
        shutil.rmtree(REPOSITORY / "runs" / name, ignore_errors=True)
    scenes = [line for scene in SCENES for line in record(*scene)]
    Path(sys.argv[1]).write_text(drawn(wrapped(scenes)))
