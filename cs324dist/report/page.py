"""From runs to one HTML file."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cs324dist.errors import UserError
from cs324dist.report import provenance
from cs324dist.report.charts import Chart, Reference, chart, formatted, number
from cs324dist.report.pictures import MOST_FRAMES, Film, Walk, film, walk
from cs324dist.report.reading import Run, plain, read_runs
from cs324dist.runs.files import replaced

ASSETS = files("cs324dist.report") / "page"
MOST_FRAMES_OF_A_RUN = 60
COLOURS, DASHES = 7, 5  # of curves, in page/style.css
BAND = (0.08, 0.12)  # of a digit's share
# What real digits score in the package's own classifier; tests/report/test_floor.py measures it again.
FRECHET_FLOOR = 3.46  # the first 10 000 training images; other tens of thousands: 2.10 to 3.85
SURE_OF_REAL = 0.974  # of the test images
Indexed = Sequence[tuple[int, Run]]  # the runs of a section, numbered as their curves are
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Generation:
    """What the page shows of one GAN run, beside its curves."""

    run: Run
    film: Film
    walk: Walk | None
    why_no_walk: str

    @property
    def frames(self) -> Markup:
        """The film's frames for the script."""
        return _as_json([vars(frame) for frame in self.film.frames])

    @property
    def steps(self) -> Markup:
        """The walk's frames for the script."""
        return _as_json([vars(frame) for frame in self.walk.frames] if self.walk else [])


def write_report(paths: tuple[Path, ...], out: Path) -> list[str]:
    """Write the page of the runs among `paths`; returns a line for each path that is none.

    Raises:
        UserError: none of them is a run.
        OSError: the file cannot be written.
    """
    runs, others = read_runs(paths)
    page = render(runs)
    with replaced(out) as temporary:
        temporary.write_bytes(page.encode(errors="replace"))
    return others


def render(runs: Sequence[Run]) -> str:
    """The page."""
    order = {"lstm": 0, "gan": 1}
    runs = sorted(runs, key=lambda run: (order.get(run.task, 2), run.task, *_by_length(run), run.name))
    of_task = {task: list(enumerate(some)) for task, some in groupby(runs, key=lambda run: run.task)}
    gans = of_task.pop("gan", [])
    lstms = of_task.pop("lstm", [])
    script = ASSETS.joinpath("script.js").read_text()
    environment = Environment(
        loader=PackageLoader("cs324dist.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "provenance": provenance, "number": number, "formatted": formatted, "COLOURS": COLOURS, "DASHES": DASHES
    }  # fmt: skip
    return environment.get_template("page.html").render(
        headline=headline(runs),
        written=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M"),
        runs=runs,
        lstms=lstms,
        lstm_charts=_aligned(
            chart("Accuracy", "of each training batch that was logged", "train/accuracy", "%", lstms),
            chart("Loss", "cross-entropy of the last digit", "train/loss", "", lstms),
        ),
        lstm_rows=[(run, *_steps_to_all_right(run)) for _, run in lstms],
        gans=gans,
        gan_charts=_gan_charts(gans),
        generations=[_generation(run, MOST_FRAMES // len(gans)) for _, run in gans],
        band=BAND,
        others=[(task, some, _every_metric(some)) for task, some in of_task.items()],
        style=Markup(ASSETS.joinpath("style.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def headline(runs: Sequence[Run]) -> str:
    """How many runs there are, and in what state."""
    states = Counter(run.state for run in runs)
    total = f"{_word(len(runs))} run{'s' if len(runs) > 1 else ''}".capitalize()
    if len(states) == 1:
        return f"{total}, {'all ' if len(runs) > 1 else ''}{runs[0].state}"
    parts = [f"{_word(count)} {state}" for state, count in states.most_common()]
    return f"{total}: {', '.join(parts)}"


def _word(count: int) -> str:
    return WORDS[count] if count < len(WORDS) else str(count)


def _by_length(run: Run) -> tuple[int, str]:
    length = run.settings.get("length")
    return (length if type(length) is int else 0), run.setting("model")


def _steps_to_all_right(run: Run) -> tuple[int | None, int | None]:
    """The first logged step whose batch, at full length, is all right; the first evaluation that is."""
    batch = None if run.settings.get("curriculum") != 1 else _first(run, "train/accuracy")
    return batch, _first(run, "eval/accuracy")


def _first(run: Run, metric: str) -> int | None:
    return next((step for step, value in run.series(metric).items() if value == 1), None)


def _gan_charts(gans: Indexed) -> list[Chart]:
    digits = all(run.settings.get("dataset") == "mnist" for _, run in gans)
    floor = Reference(FRECHET_FLOOR, f"real digits {FRECHET_FLOOR}") if digits else None
    sure = Reference(SURE_OF_REAL, f"real digits {formatted(SURE_OF_REAL, '%')}") if digits else None
    return _aligned(
        chart(
            "Fréchet distance",
            "from 10 000 samples to the test images; less is better",
            "eval/frechet_distance", "log", gans, floor,
        ),
        chart("Readable digits", "samples that the classifier is sure of", "eval/sure", "%", gans, sure),
        chart("Loss of the generator", "binary cross-entropy", "train/generator_loss", "", gans),
        chart(
            "Loss of the discriminator", "binary cross-entropy, and the penalty if there is one",
            "train/discriminator_loss", "", gans,
        ),
    )  # fmt: skip


def _every_metric(runs: Indexed) -> list[Chart]:
    names = dict.fromkeys(name for _, run in runs for name in run.metrics)
    return _aligned(*(chart(name, "", name, "%" if "accuracy" in name else "", runs) for name in names))


def _aligned(*charts: Chart | None) -> list[Chart]:
    """The charts that there are, with one axis of steps, as they are zoomed together."""
    drawn = [one for one in charts if one is not None]
    return [replace(one, x=max((other.x for other in drawn), key=lambda x: x.high)) for one in drawn]


def _generation(run: Run, most_frames: int) -> Generation:
    walked, why = None, ""
    try:
        walked = walk(run)
    except (UserError, OSError) as error:
        why = plain(str(error))
    return Generation(run, film(run, max(3, min(most_frames, MOST_FRAMES_OF_A_RUN))), walked, why)


def _as_json(value: Any) -> Markup:
    """JSON that stands in a script element: nothing in it ends that."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))
