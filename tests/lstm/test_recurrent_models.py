from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cs324dist.tasks.lstm.networks import LSTM, RNN

KERNELS = pytest.mark.parametrize("kernel", ["equations", "fused"])


def assert_equal_to_rounding(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lstm(input_size: int, hidden_size: int, kernel: str, classes: int = 10) -> LSTM:
    torch.manual_seed(0)
    return LSTM(input_size, hidden_size, classes, kernel).double()


def torch_s(model: LSTM) -> nn.LSTM:
    theirs = nn.LSTM(model.W_x.shape[1], model.W_h.shape[1], dtype=torch.float64)
    weights = {"weight_ih_l0": model.W_x, "weight_hh_l0": model.W_h, "bias_ih_l0": model.b}
    theirs.load_state_dict(weights | {"bias_hh_l0": torch.zeros_like(model.b)})
    return theirs


class TestLSTM:
    @KERNELS
    @pytest.mark.parametrize(("time", "batch", "input_size", "hidden_size"), [(9, 4, 10, 16), (1, 1, 1, 1)])
    def test_it_is_torch_s_lstm_in_outputs_and_gradients(self, kernel, time, batch, input_size, hidden_size):
        ours = lstm(input_size, hidden_size, kernel)
        theirs, read_out = torch_s(ours), nn.Linear(hidden_size, 10, dtype=torch.float64)
        read_out.load_state_dict(ours.output.state_dict())
        # The inputs and the weights of a loss in which every output counts differently.
        x, h, c = normals(time, batch, input_size), normals(batch, hidden_size), normals(batch, hidden_size)
        all_h, last_c, logits = (
            normals(time, batch, hidden_size),
            normals(batch, hidden_size),
            normals(batch, 10),
        )

        x_1, h_1, c_1 = (tensor.clone().requires_grad_() for tensor in (x, h, c))
        hidden, (h_last, c_last) = ours.scan(x_1, (h_1, c_1))
        p = ours(x_1)
        ((hidden * all_h).sum() + (c_last * last_c).sum() + (p * logits).sum()).backward()

        x_2, h_2, c_2 = (tensor.clone().requires_grad_() for tensor in (x, h, c))
        their_hidden, (their_h, their_c) = theirs(x_2, (h_2[None], c_2[None]))
        their_p = read_out(theirs(x_2)[0][-1])
        ((their_hidden * all_h).sum() + (their_c * last_c).sum() + (their_p * logits).sum()).backward()

        assert_equal_to_rounding(
            {"hidden": hidden, "h": h_last, "c": c_last, "p": p},
            {"hidden": their_hidden, "h": their_h[0], "c": their_c[0], "p": their_p},
        )
        names = {"W_x": "weight_ih_l0", "W_h": "weight_hh_l0", "b": "bias_ih_l0"}
        expected = {own: theirs.get_parameter(name).grad for own, name in names.items()}
        expected |= {f"output.{name}": tensor.grad for name, tensor in read_out.named_parameters()}
        assert_equal_to_rounding(
            {name: tensor.grad for name, tensor in ours.named_parameters()}
            | {"x": x_1.grad, "h0": h_1.grad, "c0": c_1.grad},
            expected | {"x": x_2.grad, "h0": h_2.grad, "c0": c_2.grad},
        )

    @KERNELS
    @pytest.mark.parametrize("steps_at_once", [1, 3, 8])
    def test_a_long_sequence_in_parts_is_as_the_whole(self, kernel, steps_at_once, monkeypatch):
        model, x = lstm(3, 5, kernel), normals(20, 2, 3)
        whole = model(x)
        expected = torch.autograd.grad(whole[:, 4].sum(), model.parameters())
        monkeypatch.setattr("cs324dist.tasks.lstm.networks.WHOLE", 39)
        monkeypatch.setattr("cs324dist.tasks.lstm.networks.PART", 2 * steps_at_once)
        taken, scan = [], model.scan
        monkeypatch.setattr(model, "scan", lambda x, state: (taken.append(len(x)), scan(x, state))[1])
        parts = model(x)
        assert (sum(taken), max(taken)) == (20, steps_at_once)
        taken.clear()
        found = torch.autograd.grad(parts[:, 4].sum(), model.parameters())
        assert (sum(taken), max(taken)) == (20, steps_at_once)  # once more: they were not kept
        assert_equal_to_rounding({"p": parts}, {"p": whole})
        assert_equal_to_rounding(dict(enumerate(found)), dict(enumerate(expected)))
        monkeypatch.setattr("cs324dist.tasks.lstm.networks.WHOLE", 40)
        taken.clear()
        monkeypatch.setattr(model, "scan", lambda x: (taken.append(len(x)), scan(x))[1])
        assert (model(x).equal(whole), taken) == (True, [20])


def test_the_elman_network_is_torch_s_rnn_with_one_bias() -> None:
    torch.manual_seed(0)
    ours = RNN(10, 16, 7).double()
    theirs, read_out = nn.RNN(10, 16, dtype=torch.float64), nn.Linear(16, 7, dtype=torch.float64)
    names = {
        "weight_ih_l0": ours.input.weight,
        "bias_ih_l0": ours.input.bias,
        "weight_hh_l0": ours.recurrent.weight,
    }
    theirs.load_state_dict(names | {"bias_hh_l0": torch.zeros_like(ours.input.bias)})
    read_out.load_state_dict(ours.output.state_dict())
    x, weights = normals(9, 4, 10), normals(4, 7, seed=1)

    x_1, x_2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    p, their_p = ours(x_1), read_out(theirs(x_2)[0][-1])
    (p * weights).sum().backward()
    (their_p * weights).sum().backward()

    found = {name: tensor.grad for name, tensor in names.items()} | {"x": x_1.grad, "p": p}
    found |= {name: tensor.grad for name, tensor in ours.output.named_parameters()}
    expected = {name: theirs.get_parameter(name).grad for name in names} | {"x": x_2.grad, "p": their_p}
    expected |= {name: tensor.grad for name, tensor in read_out.named_parameters()}
    assert_equal_to_rounding(found, expected)
