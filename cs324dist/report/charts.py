"""Curves as SVG paths in the data's own coordinates.

They are drawn in a box of 1000 by 1000, which the page scales; one transform maps the data to the box. The
page's script reads the values off the paths, the only copy of the data, and sets other transforms and round
ticks (`page/axes.js`). Without the script, an axis names its two ends.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from cs324dist.report.reading import Run, Series

MOST_POINTS = 800  # of a curve
TABLE_ROWS = 11
FLAT = 1e-12  # the least that two ends of an axis differ by
LARGE = 1e7  # numbers from here on have an exponent
Runs = Sequence[tuple[int, Run]]  # the runs of a section, numbered as their curves are


@dataclass(frozen=True)
class Metric:
    """What a chart shows."""

    name: str
    title: str
    note: str = ""
    unit: str = ""  # % for a share, log for a positive number on a logarithmic axis
    real: float | None = None  # what real digits score


@dataclass(frozen=True)
class Chart:
    """One metric of several runs over their steps."""

    metric: Metric
    runs: Runs
    last: int  # step that is shown; the first is 0

    @cached_property
    def _series(self) -> list[Series]:
        return [run.series(self.metric.name) for _, run in self.runs]

    @cached_property
    def _values(self) -> list[float]:
        found = (self.metric.real, *(value for series in self._series for value in series.values()))
        return [value for value in found if value is not None]

    @cached_property
    def unit(self) -> str:
        """The metric's; no logarithm of what is not positive."""
        return "" if self.metric.unit == "log" and min(self._values) <= 0 else self.metric.unit

    @cached_property
    def axis(self) -> tuple[float, float]:
        """Ends of the axis of values, in the data coordinates that `height` gives."""
        low, high = height(min(self._values), self.unit), height(max(self._values), self.unit)
        return (low, high) if high - low >= FLAT else (low - 1, high + 1)

    @property
    def ends(self) -> list[str]:
        """The lowest and the highest value of the axis."""
        return [formatted(10**end if self.unit == "log" else end, self.unit) for end in self.axis]

    @property
    def transform(self) -> str:
        """From data coordinates to the box, where y points down: the two ends lie at 5 and 95 %."""
        low, high = self.axis
        down = -900 / (high - low)
        return f"matrix({1000 / self.last:.9g} 0 0 {down:.9g} 0 {950 - low * down:.9g})"

    @property
    def description(self) -> str:
        """The chart in words."""
        last = ((run.name, formatted(run.last(self.metric.name), self.unit)) for _, run in self.runs)
        ends = "; ".join(f"{name} ends at {value}" for name, value in last)
        return f"{self.metric.title} over {number(self.last)} steps. {ends}."

    @property
    def table(self) -> list[list[str]]:
        """Values at a few steps: at each, a run's last so far, unless it has ended before."""
        steps = sorted({step for series in self._series for step in series})

        def value(series: Series, step: int) -> str:
            known = [value for at, value in series.items() if at <= step]
            return formatted(known[-1], self.unit) if known and step <= max(series) else ""

        return [
            [number(step), *(value(series, step) for series in self._series)]
            for step in evenly(steps, TABLE_ROWS)
        ]


def charts(runs: Runs, metrics: Iterable[Metric]) -> list[Chart]:
    """A chart for each metric that any run has, all over the same steps, as they are zoomed together."""
    drawn = {metric: [(k, run) for k, run in runs if run.last(metric.name) is not None] for metric in metrics}
    steps = (step for metric, some in drawn.items() for _, run in some for step in run.series(metric.name))
    last = max(steps, default=0)
    return [Chart(metric, some, max(last, 1)) for metric, some in drawn.items() if some]


def height(value: float, unit: str) -> float:
    """A value in data coordinates."""
    return math.log10(value) if unit == "log" else value


def path(series: Series, unit: str) -> str:
    """The line through the values, with a gap where there is none."""
    strokes: list[list[str]] = [[]]
    for step, value in thinned(series):
        if value is None:
            strokes.append([])
        else:
            strokes[-1].append(f"{step} {height(value, unit):.5g}")
    return "".join(f"M{'L'.join(points)}h0" for points in strokes if points)  # h0: a lone point is a dot


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, among them the first and the last."""
    count = min(len(steps), most)
    return [steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)]


def thinned(series: Series) -> Iterable[tuple[int, float | None]]:
    """At most `MOST_POINTS` of the points; of each interval, the lowest and the highest are kept."""
    points = list(series.items())
    if len(points) <= MOST_POINTS:
        return points
    per_interval = math.ceil(len(points) / (MOST_POINTS // 2 - 1))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), per_interval):
        interval = [p for p in points[start : start + per_interval] if p[1] is not None]
        interval.sort(key=lambda point: point[1] or 0.0)
        kept.update(interval[:1] + interval[-1:])
    return sorted(kept, key=lambda point: point[0])


def number(value: int | float) -> str:
    """A number for people: 187 500, 0.0123."""
    if value == int(value) and abs(value) < LARGE:
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")
    return f"{value:.3g}".replace("e+", "e").replace("-", "\N{MINUS SIGN}")


def formatted(value: float | None, unit: str = "") -> str:
    """A value with its unit; a share slightly below 100 % is not rounded up to it."""
    if value is None:
        return "\N{EN DASH}"
    if unit != "%":
        return number(float(f"{value:.3g}")) if abs(value) < 1000 else number(round(value))
    percent = 100 * value
    percent = math.floor(percent * 100) / 100 if 99 < percent < 100 else round(percent, 1)
    return f"{percent:g}\N{NO-BREAK SPACE}%"
