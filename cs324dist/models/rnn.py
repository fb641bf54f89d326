"""The Elman network that the course report compares with its LSTM."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cs324dist.models.lstm import Inputs, encode


class RNN(nn.Module):
    """h_t = tanh(W_hx x_t + W_hh h_{t-1} + b_h), p = W_ph h_T + b_p; arguments and inputs as in `LSTM`."""

    def __init__(self, input_size: int, hidden_size: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.config = {"input_size": input_size, "hidden_size": hidden_size, "classes": classes}
        self.input = nn.Linear(input_size, hidden_size)  # W_hx, b_h
        self.recurrent = nn.Linear(hidden_size, hidden_size, bias=False)  # W_hh
        self.output = nn.Linear(hidden_size, classes)  # W_ph, b_p

    def forward(self, x: Inputs) -> Float[Tensor, "batch classes"]:
        """Logits after the last time step."""
        x = encode(x, self.input.weight)
        h = x.new_zeros(x.shape[1], self.config["hidden_size"])
        for from_input in self.input(x):
            h = torch.tanh(from_input + self.recurrent(h))
        return self.output(h)
