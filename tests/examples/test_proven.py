"""Proofs of an LSTM: boxes hold all that it computes, and only what is right by construction is proven."""

import copy

import proof
import proven
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import metrics

from cs324dist.tasks.lstm.networks import LSTM
from cs324dist.tasks.lstm.palindromes import DIGITS

ONE_EACH = 2 * torch.eye(DIGITS) - 1
FOUR_BITS = 2.0 * (torch.arange(DIGITS)[:, None] >> torch.arange(4) & 1) - 1


def latches(feedback: float, code: torch.Tensor = ONE_EACH) -> LSTM:
    """Each cell rises or falls at a digit, as its code [digit cell] of ±1 says; then it follows itself.

    At the first step the state is zero, and the digit decides. Later, the input adds ±1 to the gate g of a
    cell, and the cell's own output adds ±`feedback` · h. By default, there is a cell for each digit.
    """
    cells = code.shape[1]
    model = LSTM(DIGITS, hidden_size=cells)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        W_gx, W_gh, _ = model.gate("g")
        W_gx.copy_(code.T)
        W_gh.copy_(feedback * torch.eye(cells))
        for gate, bias in (("i", 8), ("f", 0), ("o", 8)):
            model.gate(gate)[2].fill_(bias)
        model.output.weight.copy_(code)
    return model


def test_an_lstm_that_is_right_by_construction_is_proven():
    # |h| is at least tanh(tanh(1)) after the first step, and the feedback outweighs the input from then on.
    assert (proven.prove(latches(feedback=4)) > 0).all()


def test_four_cells_are_enough():
    assert (proven.prove(latches(4, FOUR_BITS)) > 0).all()
    assert (proven.prove(latches(4, FOUR_BITS), proven.BF16) > 0).all()
    assert (proven.prove(latches(4, FOUR_BITS[:, :3])) > 0).sum() < DIGITS  # two digits of one code


def test_an_lstm_that_another_digit_can_overrule_is_not_proven():
    model = latches(feedback=1)
    assert (proven.prove(model) <= 0).all()
    digits = torch.tensor([[3]] + [[7]] * 20, dtype=torch.uint8)
    assert model(digits).argmax() == 7


def test_no_more_than_the_arithmetic_allows_is_proven():
    coarse = proven.Arithmetic(2.0**-12, 2.0**-12)
    margins = [proven.prove(latches(4), by).min() for by in (proven.EXACT, proven.FLOAT32, coarse)]
    assert margins[0] > margins[1] > margins[2] > 0
    assert proven.prove(latches(4), proven.Arithmetic(2.0**-6, 2.0**-6)).max() <= 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast to bfloat16"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), digit=st.integers(0, 9), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_a_box_holds_every_state_that_a_digit_leads_to(precision, seed, digit, scale):
    """Corners of a box are stepped by torch."""
    generator = torch.Generator().manual_seed(seed)
    kernel = "fused" if "autocast" in precision else "equations"
    model = LSTM(DIGITS, hidden_size=5, kernel=kernel).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def interval(size: float):
        ends = size * torch.randn(2, DIGITS, 5, generator=generator)
        return proven.Interval(*ends.sort(dim=0).values.bfloat16().double())

    box, by = proven.Box(interval(0.5), interval(2.0)), proven.BF16 if "b" in precision else proven.FLOAT32
    precise = copy.deepcopy(model).double()
    after, margins = proven.next_states(precise, box, by), proven.margins(precise, box.h, by)
    computed = model.bfloat16() if precision == "bfloat16" else model
    for _ in range(20):
        corner = [torch.where(torch.rand(x.low.shape, generator=generator) < 0.5, *x) for x in box]
        corner = [ends.to(computed.b.dtype) for ends in corner]
        digits = torch.full((1, DIGITS), digit, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in precision):
            _, (h, c) = computed.scan(digits, tuple(corner))
            logits = computed.output(corner[0]).double()
        reached = proven.Box(*(proven.Interval(x.double(), x.double()) for x in (h, c)))
        assert after.holds(reached).all()
        assert (logits.diagonal()[:, None] - logits >= margins).all()


@pytest.mark.parametrize(("bits", "dtype"), [(24, torch.float32), (8, torch.bfloat16)])
def test_what_is_computed_of_a_point_is_in_the_box_around_what_is_exact(bits, dtype):
    """All digits are the same to this model, so that only rounding makes a box larger than a point."""
    torch.manual_seed(0)
    model = LSTM(DIGITS, hidden_size=16, kernel="equations").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_()
    model.W_x.copy_(model.W_x[:, :1].expand(-1, DIGITS))
    precise, computed = copy.deepcopy(model).double(), model.to(dtype)
    h, c = (torch.rand(500, 16) - 0.5).to(dtype), torch.randn(500, 16).to(dtype)
    points = proven.Box(*(proven.Interval(x.double(), x.double()) for x in (h, c)))
    _, after = computed.scan(torch.zeros(1, 500, dtype=torch.uint8), (h, c))
    reached = proven.Box(*(proven.Interval(x.double(), x.double()) for x in after))
    by = proven.Arithmetic.of(bits)
    assert proven.next_states(precise, points, by).holds(reached).all()
    finer = proven.Arithmetic(by.stored / 64, by.inside / 64)
    assert not proven.next_states(precise, points, finer).holds(reached).all()


def test_there_is_room_for_the_rounding_of_functions():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for function in ("sigmoid", "tanh"):
        low, high = getattr(proven.Interval(x.double(), x.double()), function)(proven.FLOAT32)
        assert ((low <= getattr(x, function)()) & (getattr(x, function)() <= high)).all()


def test_one_component_outside_is_outside():
    zeros, ones = torch.zeros(3, 2), torch.ones(3, 2)
    box = proven.Box(proven.Interval(zeros, ones), proven.Interval(zeros, ones))
    high = ones.clone()
    high[1, 0] = 1.5
    assert box.holds(box).tolist() == [True, True, True]
    assert box.holds(proven.Box(proven.Interval(zeros, high), box.c)).tolist() == [True, False, True]
    assert box.holds(proven.Box(box.h, proven.Interval(-high, ones))).tolist() == [False, False, False]


def test_a_box_that_steps_still_leave_proves_nothing(monkeypatch):
    monkeypatch.setattr(proven, "MOST_STEPS", 1)
    assert (proven.prove(latches(feedback=4)) == -torch.inf).all()


def test_cells_that_count_the_steps_are_no_obstacle():
    model = latches(feedback=4)
    with torch.no_grad():
        model.gate("f")[2].fill_(40)  # open: nothing is forgotten
    assert (proven.prove(model) > 0).all()


def test_there_is_room_for_numbers_too_small_for_float32():
    x = torch.tensor([-89.0, -200.0])  # exp(89) is infinite in float32, so that the sigmoid is 0
    assert (proven.Interval(x.double(), x.double()).sigmoid(proven.FLOAT32).low == 0).all()
    tiny = torch.tensor([1e-42], dtype=torch.float64)
    assert proven.Interval(tiny, tiny).widened(proven.FLOAT32.stored).low < 0


def test_sums_that_overflow_in_float32_prove_nothing():
    model = latches(feedback=4)
    with torch.no_grad():
        model.output.weight.mul_(1e38)
        model.output.bias.fill_(3e38)
    digits = torch.tensor([[3], [7]], dtype=torch.uint8)
    assert model(digits).isinf().any()
    assert (proven.prove(model) <= 0).all()


def test_a_guess_that_latches_is_counted(monkeypatch):
    def drawn(model, count, generator):
        """The fourth is right by construction, and the others are all zero."""
        is_fourth = (torch.arange(count) == 3).float()
        right = latches(4).requires_grad_(False).named_parameters()
        return {name: is_fourth.view(-1, *[1] * weight.dim()) * weight for name, weight in right}

    monkeypatch.setattr(proof, "drawn", drawn)
    found = proof.guess(DIGITS, DIGITS, draws=150)  # in two pieces
    assert (found["draws"], found["best"], found["latching"], found["first"]) == (200, 1.0, 2, 4)
    monkeypatch.setattr(proof, "drawn", lambda *given: {name: 0 * x for name, x in drawn(*given).items()})
    found = proof.guess(DIGITS, DIGITS, draws=100)  # always 0
    assert (found["latching"], found["first"]) == (0, None)
    assert found["best"] < 0.3


def test_other_networks_are_refused(launch, tmp_path):
    for option in (("--model", "rnn"), ("--encoding", "scalar")):
        done = launch("examples/proven.py", *option, "--run-dir", tmp_path / "run", check=False)
        assert done.returncode == 2
        assert done.stderr == "error: only --model lstm with --encoding onehot can be proven\n"


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["24", "8"])
def test_it_learns_to_be_proven(launch, tmp_path, bits):
    launch("examples/proven.py", "--bits", bits, "--run-dir", tmp_path / "run", "--wandb", "disabled")
    assert metrics(tmp_path / "run")[-1]["eval/proven"] == DIGITS
