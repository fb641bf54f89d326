import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import make_lstm

from cs324dist.report.charts import (
    MOST_POINTS,
    Axis,
    chart,
    formatted,
    limits,
    log_ticks,
    number,
    path,
    thinned,
    ticks,
)
from cs324dist.report.reading import read_run

VALUES = st.floats(-1e15, 1e15).filter(lambda v: v == 0 or abs(v) > 1e-9)
UNITS = ["", "%", "log"]


@given(st.lists(st.lists(VALUES, min_size=1, max_size=5), min_size=1, max_size=5), st.sampled_from(UNITS))
def test_an_axis_has_room_and_a_few_round_ticks(curves: list[list[float]], unit: str) -> None:
    axis = limits(curves, unit)
    assert axis.low < min(map(min, curves))
    assert axis.low < axis.high
    if axis.high - axis.low > 1e-6 * abs(axis.high):
        assert 2 <= len(ticks(axis)) <= 11
        assert all(-1e-6 <= axis.share(v) <= 100 + 1e-6 for v in ticks(axis))


def test_a_curve_that_diverges_does_not_hide_the_others() -> None:
    usual = [[2.3, 0.1], [2.5, 0.2]]
    assert limits([*usual, [1e11]], "").high == pytest.approx(10, rel=0.1)
    assert limits([[1e11]], "").high > 1e11


def test_round_numbers() -> None:
    assert ticks(Axis(0.0, 1500.0)) == [0, 500, 1000, 1500]
    assert ticks(Axis(-0.1, 2.4)) == [0, 0.5, 1, 1.5, 2]
    assert log_ticks(Axis(math.log10(0.3), math.log10(60))) == [0.5, 1, 2, 5, 10, 20, 50]
    assert log_ticks(Axis(-2.0, 3.0)) == [0.01, 0.1, 1, 10, 100, 1000]


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    assert path({1: 2.0, 2: 3.0, 3: None, 4: 0.5}, log=False) == "M1 2L2 3h0M4 0.5h0"
    assert path({10: 100.0}, log=True) == "M10 2h0"


def test_thinning_keeps_the_ends_and_the_peaks() -> None:
    series = {step: math.sin(step / 50) for step in range(10_000)}
    series[4321] = 7.0
    series[5000] = None
    kept = list(thinned(series))
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {(0, series[0]), (9999, series[9999]), (4321, 7.0)} <= set(kept)


def test_the_transform_maps_the_axes_to_the_box(tmp_path) -> None:
    run = read_run(make_lstm(tmp_path / "run"), "run")
    drawn = chart("Loss", "", "train/loss", "", [(0, run)])
    assert drawn is not None
    a, _, _, d, e, f = map(float, re.findall(r"[-\d.e]+", drawn.transform.removeprefix("matrix")))
    assert (a * drawn.x.high + e, d * drawn.y.high + f, d * drawn.y.low + f) == pytest.approx(
        (1000, 0, 1000), abs=1e-3
    )
    assert drawn.description == "Loss over 300 steps. run ends at 0.115."
    steps = [10, 40, 70, 100, 130, 150, 180, 210, 240, 270, 300]
    assert [row[0] for row in drawn.table] == [number(step) for step in steps]


def test_no_chart_without_values(tmp_path) -> None:
    assert chart("x", "", "absent", "", [(0, read_run(make_lstm(tmp_path / "run"), "run"))]) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.0, "%", "100 %"),
        (0.99999, "%", "99.99 %"),
        (0.5256, "%", "52.6 %"),
        (0.0, "%", "0 %"),
        (187_500.0, "", "187 500"),
        (0.012345, "", "0.0123"),
        (-2.5, "", "\N{MINUS SIGN}2.5"),
        (1e11, "", "1e11"),
        (None, "", "\N{EN DASH}"),
    ],
)
def test_numbers_for_people(value: float | None, unit: str, text: str) -> None:
    assert re.sub(r"\s", " ", formatted(value, unit)) == text
