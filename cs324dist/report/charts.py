"""Curves as SVG paths in the data's own coordinates.

They are drawn in a box of 1000 by 1000, which the page scales; one transform maps the data to the box. The
page's script sets another transform to zoom, and reads the values off the paths, the only copy of the data.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from cs324dist.report.reading import Run, Series

BOX = 1000
MOST_POINTS = 800  # of a curve
TABLE_ROWS = 11
FAR = 4  # times the usual highest value
LARGE = 1e7  # numbers from here on have an exponent
Runs = Sequence[tuple[int, Run]]  # the runs of a section, numbered as their curves are


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, in data coordinates."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies, in percent of the axis."""
        return 100 * (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Reference:
    """A value to compare a curve with."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """One metric of several runs over their steps."""

    title: str
    note: str
    unit: str  # "": a plain number, "%": a share, "log": a positive number on a logarithmic axis
    x: Axis
    y: Axis
    curves: Mapping[int, str]
    """SVG paths by the number of the run."""

    description: str
    header: list[str]
    table: list[list[str]]
    reference: Reference | None = None

    @property
    def transform(self) -> str:
        """From data coordinates to the box; y points down there."""
        across, down = BOX / (self.x.high - self.x.low), BOX / (self.y.low - self.y.high)
        return f"matrix({across:.9g} 0 0 {down:.9g} {-self.x.low * across:.9g} {-self.y.high * down:.9g})"

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Where to label steps, in percent of the axis, and the labels."""
        return [(self.x.share(v), number(v)) for v in ticks(self.x) if v == int(v)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Where to label values, in percent of the axis, and the labels."""
        values = log_ticks(self.y) if self.unit == "log" else ticks(self.y)
        return [(self.y.share(self.height(v)), formatted(v, self.unit)) for v in values]

    def height(self, value: float) -> float:
        """A value in data coordinates."""
        return math.log10(value) if self.unit == "log" else value


def chart(
    title: str, note: str, metric: str, unit: str, runs: Runs, reference: Reference | None = None
) -> Chart | None:
    """The curves of the runs that have the metric; None if none has."""
    drawn = {index: run for index, run in runs if run.last(metric) is not None}
    if not drawn:
        return None
    all_series = {index: run.series(metric) for index, run in drawn.items()}
    shown = [[value for value in series.values() if value is not None] for series in all_series.values()]
    shown += [[reference.value]] if reference else []
    if unit == "log" and min(map(min, shown)) <= 0:
        unit = ""
    last = max(step for series in all_series.values() for step in series)
    ends = [f"{run.name} ends at {formatted(run.last(metric), unit)}" for run in drawn.values()]
    return Chart(
        title=title,
        note=note,
        unit=unit,
        x=Axis(0.0, float(max(last, 1))),
        y=limits([[math.log10(v) if unit == "log" else v for v in values] for values in shown], unit),
        curves={index: path(series, unit == "log") for index, series in all_series.items()},
        description=f"{title} over {number(last)} steps. {'; '.join(ends)}.",
        header=[run.name for run in drawn.values()],
        table=_table(list(all_series.values()), unit),
        reference=reference,
    )


def limits(curves: Sequence[Sequence[float]], unit: str) -> Axis:
    """An axis that holds the curves with a little room; a share's goes from 0 to 100 %.

    A curve that is far higher than the others, such as one that diverges, leaves the picture.
    """
    low, high = min(map(min, curves)), max(map(max, curves))
    if unit == "" and (usual := median_low(map(max, curves))) > 0:
        high = min(high, FAR * usual)
    if unit == "%" and low >= 0 and high <= 1:
        return Axis(-0.03, 1.03)
    if unit != "log" and 0 < low < high / 2:
        low = 0.0
    room = 0.05 * (high - low) or abs(high) / 2 or 1.0
    return Axis(low - room, high + room)


def path(series: Series, log: bool) -> str:
    """The line through the values, with a gap where there is none."""
    strokes: list[list[str]] = [[]]
    for step, value in thinned(series):
        if value is None:
            strokes.append([])
        else:
            strokes[-1].append(f"{step} {math.log10(value) if log else value:.5g}")
    return "".join(f"M{'L'.join(points)}h0" for points in strokes if points)  # h0: a lone point is a dot


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


def ticks(axis: Axis, about: int = 5) -> list[float]:
    """Round numbers on the axis."""
    rough = (axis.high - axis.low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.99)
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
    return [float(f"{k * step:.10g}") for k in range(first, min(last, first + 2 * about) + 1)]


def log_ticks(axis: Axis) -> list[float]:
    """1, 2, 5, 10, … on an axis of logarithms; only powers of ten where there are many."""
    powers = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    factors = (1, 2, 5) if axis.high - axis.low < 2.5 else (1,)
    values = (factor * 10.0**power for power in powers for factor in factors)
    return [v for v in values if axis.low <= math.log10(v) <= axis.high][:20]


def number(value: int | float) -> str:
    """A number for people: 187 500, 0.0123."""
    if value == int(value) and abs(value) < LARGE:
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", "\N{MINUS SIGN}")
    return f"{value:.3g}".replace("e+", "e").replace("-", "\N{MINUS SIGN}")


def formatted(value: float | None, unit: str) -> str:
    """A value with its unit; a share slightly below 100 % is not rounded up to it."""
    if value is None:
        return "\N{EN DASH}"
    if unit != "%":
        return number(float(f"{value:.3g}")) if abs(value) < 1000 else number(round(value))
    percent = 100 * value
    percent = math.floor(percent * 100) / 100 if 99 < percent < 100 else round(percent, 1)
    return f"{percent:g}\N{NO-BREAK SPACE}%"


def _table(all_series: list[Series], unit: str) -> list[list[str]]:
    """Values at a few steps: at each, a run's last so far, unless it has ended before."""
    steps = sorted({step for series in all_series for step in series})
    at = sorted({steps[round(k * (len(steps) - 1) / (TABLE_ROWS - 1))] for k in range(TABLE_ROWS)})
    orders = [list(series.items()) for series in all_series]

    def value(points: list[tuple[int, float | None]], step: int) -> str:
        before = bisect_right(points, step, key=lambda point: point[0])
        return formatted(points[before - 1][1], unit) if before and step <= points[-1][0] else ""

    return [[number(step), *(value(points, step) for points in orders)] for step in at]
