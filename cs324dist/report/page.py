"""From runs to one HTML file."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cs324dist.errors import UserError
from cs324dist.report import provenance
from cs324dist.report.charts import Metric, Runs, charts, formatted, height, number, path
from cs324dist.report.pictures import Frame, Walk, film, walk
from cs324dist.report.reading import Run, plain, read_runs
from cs324dist.runs.files import replaced

ASSETS = files("cs324dist.report") / "page"
MOST_FRAMES = 160  # of the films of a page
# What real digits score with the package's own classifier; tests/report/test_floor.py measures it again.
FRECHET_FLOOR = 3.46  # the first 10 000 training images; other tens of thousands: 2.10 to 3.85
SURE_OF_REAL = 0.974  # of the test images
PALINDROMES = (
    Metric("train/accuracy", "Accuracy", "of each logged training batch", "%"),
    Metric("train/loss", "Loss", "cross-entropy of the last digit"),
)
DIGITS = (
    Metric("eval/frechet_distance", "Fréchet distance",
           "from 10 000 samples to the test images; lower is better", "log", FRECHET_FLOOR),
    Metric("eval/sure", "Readable digits",
           "share of samples that the classifier is sure of", "%", SURE_OF_REAL),
    Metric("train/generator_loss", "Generator loss", "binary cross-entropy"),
    Metric("train/discriminator_loss", "Discriminator loss",
           "binary cross-entropy, and the gradient penalty if there is one"),
    Metric("train/generator_class_loss", "Generator's class loss",
           "cross-entropy of each sample's likeliest class"),
    Metric("train/discriminator_class_loss", "Discriminator's class loss",
           "cross-entropy of the real images' labels"),
)  # fmt: skip
METRICS = {"lstm": PALINDROMES, "gan": DIGITS}
TITLES = {"lstm": ("Palindromes", "palindromes"), "gan": ("Digits", "digits")}
TEMPLATES = Environment(
    loader=PackageLoader("cs324dist.report", "page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"default": vars}  # of dataclasses
TEMPLATES.globals |= {"provenance": provenance}
TEMPLATES.globals |= {f.__name__: f for f in (formatted, height, number, path, plain)}


def write_report(paths: tuple[Path, ...], out: Path) -> list[str]:
    """Write the page of the runs among `paths`; returns a line for each path that is no run, or damaged."""
    runs, others = read_runs(paths)
    page = render(runs)
    with replaced(out) as temporary:
        temporary.write_bytes(page.encode(errors="replace"))
    damaged = (run for run in runs if run.state_shown == "damaged")
    return [*(f"{line}: left out" for line in others), *(run.problems[0] for run in damaged)]


def render(runs: Sequence[Run]) -> str:
    """The page."""
    runs = sorted(runs, key=_place)
    most = MOST_FRAMES // max(3, sum(bool(run.samples) for run in runs))
    tasks = [(task, list(enumerate(some))) for task, some in groupby(runs, key=lambda run: run.task)]
    script = "".join(ASSETS.joinpath(name).read_text() for name in ("axes.js", "script.js"))
    return TEMPLATES.get_template("page.html").render(
        headline=headline(runs),
        written=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M"),
        runs=runs,
        sections=[_section(f"task-{k}", task, some, most) for k, (task, some) in enumerate(tasks, 1)],
        first_perfect=_first_perfect,
        style=Markup(ASSETS.joinpath("style.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _section(place: str, task: str, runs: Runs, most_frames: int) -> dict[str, Any]:
    """What the page shows of a task."""
    found = (name for _, run in runs for name in run.metrics)
    names = dict.fromkeys(name for name in found if not name.startswith("throughput/"))
    metrics = METRICS.get(task) or [Metric(name, name, unit="%" * ("accuracy" in name)) for name in names]
    if any(run.setting("dataset") != "mnist" for _, run in runs):
        metrics = [replace(metric, real=None) for metric in metrics]
    title, anchor = TITLES.get(task, (task, place))
    pictures = [_pictures(run, most_frames) for _, run in runs if run.samples or task == "gan"]
    drawn = charts(runs, metrics)
    return {"id": anchor, "title": title, "task": task, "runs": runs, "charts": drawn, "pictures": pictures}


def headline(runs: Sequence[Run]) -> str:
    """How many runs there are, and in what state."""
    total, several = f"{len(runs)} run", len(runs) > 1
    states = Counter(run.state_shown for run in runs).most_common()
    if len(states) == 1:
        return f"{total}{'s, all' if several else ','} {states[0][0]}"
    return f"{total}s: " + ", ".join(f"{count}\N{NO-BREAK SPACE}{state}" for state, count in states)


def _place(run: Run) -> tuple[int, str, int, str, str, str]:
    task = {"lstm": 0, "gan": 1}.get(run.task, 2)
    length = run.setting("length")  # shorter texts of numbers are smaller numbers
    return task, run.task, len(length), length, run.setting("model"), run.name


def _first_perfect(run: Run, metric: str) -> int | None:
    """The first step at which all was correct."""
    return next((step for step, value in run.series(metric).items() if value == 1), None)


def _pictures(run: Run, most_frames: int) -> tuple[Run, list[Frame], Walk | None, str]:
    """The run's film, and of a GAN the walk or why there is none."""
    shown = film(run, max(3, most_frames))
    try:
        return run, shown, walk(run) if run.task == "gan" else None, ""
    except (UserError, OSError) as error:
        return run, shown, None, plain(str(error))
