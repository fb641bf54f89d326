import math
import re

import pytest
from made_runs import make_gan, make_lstm

from cs324dist.report.charts import (
    MOST_POINTS,
    Chart,
    Metric,
    charts,
    formatted,
    height,
    number,
    path,
    thinned,
)
from cs324dist.report.reading import read_run


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    assert path({1: 2.0, 2: 3.0, 3: None, 4: 0.5}, unit="") == "M1 2L2 3h0M4 0.5h0"
    assert path({10: 100.0}, unit="log") == "M10 2h0"


def test_thinning_keeps_the_ends_and_the_peaks() -> None:
    series = {step: math.sin(step / 50) for step in range(10_000)}
    series[4321] = 7.0
    series[5000] = None
    kept = list(thinned(series))
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {(0, series[0]), (9999, series[9999]), (4321, 7.0)} <= set(kept)


def heights(drawn: Chart, *values: float) -> list[float]:
    """Where values in data coordinates lie in the box, in percent from its bottom."""
    _, _, _, d, _, f = map(float, re.findall(r"[-\d.e]+", drawn.transform.removeprefix("matrix")))
    return [100 - (d * value + f) / 10 for value in values]


def test_an_axis_names_the_ends_of_what_is_drawn(tmp_path) -> None:
    run = read_run(make_lstm(tmp_path / "run"), "run")
    (drawn,) = charts([(0, run)], [Metric("train/loss", "Loss"), Metric("absent", "x")])
    assert (drawn.last, drawn.ends) == (300, ["0.115", "2.08"])
    assert heights(drawn, 2.3 * math.exp(-3), 2.3 * math.exp(-0.1)) == pytest.approx([5, 95])
    assert drawn.description == "Loss over 300 steps. run ends at 0.115."
    steps = [10, 40, 70, 100, 130, 150, 180, 210, 240, 270, 300]
    assert [row[0] for row in drawn.table] == [number(step) for step in steps]


def test_what_real_digits_score_is_on_the_axis(tmp_path) -> None:
    run = read_run(make_gan(tmp_path / "run", checkpoint=False), "run")
    metric = Metric("eval/frechet_distance", "Distance", unit="log", real=1.0)
    (drawn,) = charts([(0, run)], [metric])
    assert (drawn.ends, height(1.0, drawn.unit)) == (["1", "50"], 0)
    assert heights(drawn, 0, math.log10(50)) == pytest.approx([5, 95])


def test_a_flat_curve_lies_in_the_middle(tmp_path) -> None:
    run = read_run(make_gan(tmp_path / "run", checkpoint=False), "run")
    (drawn,) = charts([(0, run)], [Metric("train/generator_loss", "Loss")])
    assert (drawn.ends, heights(drawn, 1)) == (["0", "2"], [pytest.approx(50)])


def test_a_logarithmic_axis_needs_positive_values(tmp_path) -> None:
    run = read_run(make_lstm(tmp_path / "run"), "run")
    run.series("train/loss")[300] = 0.0
    (drawn,) = charts([(0, run)], [Metric("train/loss", "Loss", unit="log")])
    assert (drawn.unit, drawn.ends[0]) == ("", "0")


def test_all_charts_have_the_same_steps_and_a_run_that_has_ended_no_numbers(tmp_path) -> None:
    runs = [(k, read_run(make_lstm(tmp_path / str(k), steps=n), str(k))) for k, n in enumerate((20, 40))]
    runs[1][1].series("train/loss").pop(40)
    first, second = charts(runs, [Metric("train/accuracy", "Right", unit="%"), Metric("train/loss", "Loss")])
    assert (first.last, second.last) == (40, 40)
    assert [row[0] for row in first.table] == ["10", "20", "30", "40"]
    assert [bool(row[1]) for row in first.table] == [True, True, False, False]
    assert all(row[2] for row in first.table)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.0, "%", "100 %"), (0.99999, "%", "99.99 %"), (0.5256, "%", "52.6 %"), (0.0, "%", "0 %"),
        (187_500.0, "", "187 500"), (0.012345, "", "0.0123"), (-2.5, "", "\N{MINUS SIGN}2.5"),
        (1e11, "", "1e11"), (None, "", "\N{EN DASH}"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float | None, unit: str, text: str) -> None:
    assert re.sub(r"\s", " ", formatted(value, unit)) == text
