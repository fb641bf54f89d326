"""What `make bench` says of the measurement before."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from speed import history, slower


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ([1.0, 1.1, 1.2], []),
        ([1.2, 1.3, 1.4], []),  # within the spread
        ([1.3, 1.4, 1.5], ["slower: step takes 1.40 ms, before 1.10"]),
        ([0.1, 0.2, 0.3], []),
    ],
)
def test_only_what_is_slower_by_more_than_the_spread_is_named(now, named):
    assert [*slower({"step": now, "new": [9.0]}, {"step": [1.0, 1.1, 1.25], "old": [1.0]})] == named


def test_a_measurement_is_added_to_the_history_that_it_has():
    made_in = {"commit": "b" * 40, "device": "a processor", "threads": 2}
    older = {"commit": "a" * 40, "device": "a processor", "ratios": {"step": 2.0}}
    now = {"environment": made_in, "rows": [{"what": "step", "ratios": [1.0, 3.0, 1.5]}], "history": [older]}
    assert history(now) == [older, {"commit": "b" * 40, "device": "a processor", "ratios": {"step": 1.5}}]
