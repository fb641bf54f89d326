import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cs324dist.tasks.gan.sampling import interpolate

SEEDS, WIDTHS, POINTS = st.integers(0, 2**32), st.integers(2, 200), st.integers(2, 30)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
METHODS = pytest.mark.parametrize("method", ["linear", "spherical"])


def ends(seed: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, width, dtype=dtype, generator=generator)
    return start, 3 * end


def angle(a: Tensor, b: Tensor) -> float:
    """Kahan's formula, exact for small angles too."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2((a - b).norm(), (a + b).norm())


@settings(deadline=None)
@given(SEEDS, WIDTHS, POINTS)
@METHODS
def test_the_walk_starts_and_ends_where_asked(method, seed: int, width: int, points: int) -> None:
    start, end = ends(seed, width, torch.float32)
    walk = interpolate(start, end, points, method)
    assert walk.shape == (points, width)
    assert walk.dtype == torch.float32
    torch.testing.assert_close(walk[0], start, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(walk[-1], end, rtol=1e-6, atol=2e-6)
    if method == "linear":
        assert torch.equal(walk[[0, -1]], torch.stack([start, end]))
        expected = ((end - start) / (points - 1)).expand(points - 1, width)
        torch.testing.assert_close(walk.diff(dim=0), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(SEEDS, WIDTHS, POINTS)
def test_spherical_turns_at_constant_speed_and_changes_the_norm_evenly(seed, width, points) -> None:
    start, end = ends(seed, width)
    whole = angle(start, end)
    assume(0.01 < whole < 3.13)
    walk = interpolate(start, end, points, "spherical")
    turns = [angle(a, b) for a, b in itertools.pairwise(walk)]
    # Steps of this size that reach the end leave no room for a detour.
    assert turns == pytest.approx([whole / (points - 1)] * (points - 1), rel=1e-8)
    a, b, norms = start.norm().item(), end.norm().item(), walk.norm(dim=1).tolist()
    assert norms == pytest.approx([a + (b - a) * k / (points - 1) for k in range(points)], rel=1e-9)


@settings(deadline=None)
@given(SEEDS, WIDTHS, st.floats(0.1, 10))
@DTYPES
def test_opposite_ends_are_joined_though_no_way_round_is_the_shortest(dtype, seed, width, factor) -> None:
    start, _ = ends(seed, width, dtype)
    end = -factor * start
    walk = interpolate(start, end, 5, "spherical")
    assert walk.isfinite().all()
    torch.testing.assert_close(walk[[0, -1]], torch.stack([start, end]), rtol=1e-5, atol=1e-5)
    assert walk.norm(dim=1).max() <= max(start.norm(), end.norm()) * 1.001


@settings(deadline=None)
@given(SEEDS, WIDTHS, st.floats(-12, 0))
def test_all_but_parallel_ends_are_joined_too(seed: int, width: int, exponent: float) -> None:
    start, other = ends(seed, width, torch.float32)
    end = start + 10**exponent * other
    assume(angle(start, end) < 3)
    walk = interpolate(start, end, 5, "spherical")
    assert walk.isfinite().all()
    torch.testing.assert_close(walk[0], start, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(walk[-1], end, rtol=1e-5, atol=1e-5)
    assert walk.norm(dim=1).max() <= max(start.norm(), end.norm()) * 1.001
