import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cs324dist.data import streams
from cs324dist.data.streams import Stream, random_bits

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MANY = torch.arange(100_000)
NOISE = Stream(0, "noise")
INT64 = st.integers(-(2**63), 2**63 - 1)
STREAMS = st.text(st.characters(codec="utf-8"), max_size=20)


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def word(seed: int, stream: str, index: int, component: int) -> int:
    """The 64 random bits at an address, in unsigned Python integers."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
    sample = mix((index * GOLDEN + first) & MASK) ^ second
    return mix((sample + (component + 1) * GOLDEN) & MASK)


def words(seed: int, stream: str, indices: list[int], components: int) -> list[list[int]]:
    return [[word(seed, stream, index, c) for c in range(components)] for index in indices]


def in_double(stream: Stream, indices: torch.Tensor, components: int) -> torch.Tensor:
    """Normals as they are before they are rounded to a shorter dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return stream.normals(indices, components)
    finally:
        torch.set_default_dtype(before)


def chi_square_p(values: torch.Tensor, bins: int) -> float:
    return float(stats.chisquare(values.flatten().bincount(minlength=bins).numpy()).pvalue)


@settings(deadline=None)
@given(INT64, STREAMS, st.lists(st.integers(0, 2**62), max_size=5), st.integers(1, 5))
def test_bits_are_the_hash_computed_in_python_integers(seed, stream, indices, components) -> None:
    bits = random_bits(seed, stream, torch.tensor(indices, dtype=torch.int64), components)
    assert bits.shape == (len(indices), components)
    assert [[x & MASK for x in row] for row in bits.tolist()] == words(seed, stream, indices, components)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 2**62), st.integers(1, 2**63 - 1))
def test_integers_are_the_upper_63_bits_modulo_the_bound(seed: int, index: int, below: int) -> None:
    found = Stream(seed, "x").integers(torch.tensor([index]), 3, below)
    assert found.tolist() == [[(w >> 1) % below for w in words(seed, "x", [index], 3)[0]]]


class TestNormals:
    def test_they_are_box_and_muller_s_of_the_bits(self) -> None:
        indices = list(range(50))
        expected = [
            [
                math.sqrt(-2 * math.log(((w >> 32) + 0.5) / 2**32))
                * math.cos(2 * math.pi * (w % 2**32) / 2**32)
                for w in row
            ]
            for row in words(0, "noise", indices, 4)
        ]
        found = in_double(NOISE, torch.tensor(indices), 4)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)

    def test_the_rarest_words_give_finite_normals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        extremes = torch.tensor([[0, -1, -(2**63), 2**63 - 1, 0xFFFFFFFF, -(2**32)]])
        monkeypatch.setattr(streams, "random_bits", lambda *_: extremes)
        z = in_double(NOISE, torch.tensor([0]), 6)
        assert z.isfinite().all()
        assert z.abs().max().item() == pytest.approx(math.sqrt(66 * math.log(2)))  # radius at 2^-33


@pytest.mark.parametrize("components", [1, 64, 65, 200])
def test_each_sign_is_one_bit_of_the_hash(components: int) -> None:
    rows = words(0, "noise", [0, 1, 99], -(-components // 64))
    expected = [[2 * (row[c // 64] >> c % 64 & 1) - 1 for c in range(components)] for row in rows]
    assert NOISE.signs(torch.tensor([0, 1, 99]), components).tolist() == expected


NEIGHBOURS = {
    "the next seed": (Stream(1, "noise"), MANY, 0),
    "the opposite seed": (Stream(-1, "noise"), MANY, 0),
    "a similar name": (Stream(0, "noise2"), MANY, 0),
    "the next index": (NOISE, MANY + 1, 0),
    "the next component": (NOISE, MANY, 1),
    "the next index, the component before": (NOISE, MANY + 1, 1),
    "the 2^32nd index after": (NOISE, MANY + 2**32, 0),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_neighbouring_addresses_have_nothing_in_common(neighbour: str) -> None:
    stream, indices, component = NEIGHBOURS[neighbour]
    own = 2 if neighbour.endswith("before") else 0
    n = len(MANY)
    a = random_bits(0, "noise", MANY, 3)[:, own]
    b = random_bits(stream.seed, stream.name, indices, 3)[:, component]
    flipped = ((a ^ b)[:, None] >> torch.arange(64)) & 1
    assert (flipped.double().mean(0) - 0.5).abs().max() < 4.5 * 0.5 / n**0.5
    x, y = in_double(NOISE, MANY, 3)[:, own], in_double(stream, indices, 3)[:, component]
    for of in (torch.sign, torch.abs, torch.square, torch.clone):
        assert abs(torch.corrcoef(torch.stack([of(x), of(y)]))[0, 1]) < 4 / n**0.5
    p = NOISE.integers(MANY, 3, 10)[:, own]
    q = stream.integers(indices, 3, 10)[:, component]
    assert chi_square_p(10 * p + q, 100) > 0.001
