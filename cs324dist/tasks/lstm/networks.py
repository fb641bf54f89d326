"""The LSTM of Part I of the course report, implemented from its equations, and the Elman network."""

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Inputs = Float[Tensor, "time batch input"] | UInt8[Tensor, "time batch"]
State = tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]]
# Samples times steps:
WHOLE = 1 << 17  # of the longest sequences that are computed whole: about 1.4 GB at hidden size 128
PART = 1 << 15  # of a part of longer ones: near a processor's caches, which makes up for computing it twice
GATES = ("i", "f", "g", "o")  # in torch's order, so that its kernel takes the weights as they are


class LSTM(nn.Module):
    """An LSTM with one layer, and a linear read-out of the last hidden state.

        g_t = tanh(W_gx x_t + W_gh h_{t-1} + b_g)        c_t = g_t ⊙ i_t + c_{t-1} ⊙ f_t
        i_t = σ(W_ix x_t + W_ih h_{t-1} + b_i)           h_t = tanh(c_t) ⊙ o_t
        f_t = σ(W_fx x_t + W_fh h_{t-1} + b_f)           p   = W_ph h_T + b_p
        o_t = σ(W_ox x_t + W_oh h_{t-1} + b_o)

    The four gates' weights are stacked in `W_x`, `W_h`, `b`; `gate("g")` gives W_gx, W_gh, b_g as views.

    Digits are read as one-hot vectors of `input_size` components; where that is 1, as they are. h and c have
    `hidden_size` components, the logits p have `classes`. The kernel `equations` is the code below, and
    `fused` is torch's (cuDNN's on a GPU) with the same parameters; the results agree up to rounding.
    """

    def __init__(
        self, input_size: int, hidden_size: int = 128, classes: int = 10, kernel: str = "fused"
    ) -> None:
        super().__init__()
        self.config = {"input_size": input_size, "hidden_size": hidden_size, "classes": classes}
        self.kernel = kernel
        self.W_x = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.W_h = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.b = nn.Parameter(torch.empty(4 * hidden_size))
        self.output = nn.Linear(hidden_size, classes)  # W_ph, b_p
        self.initialise_as_linear()

    def forward(self, x: Inputs) -> Float[Tensor, "batch classes"]:
        """Logits after the last time step.

        Long sequences are computed in parts. Only the states between parts are kept, and the backward pass
        computes each part again. The gradient is exact.
        """
        steps, batch = x.shape[:2]
        parts = x.split(steps_at_once(steps, batch))
        if len(parts) == 1:
            hidden, _ = self.scan(x)
            return self.output(hidden[-1])
        h = c = self.W_h.new_zeros(batch, self.W_h.shape[1])
        for part in parts:
            h, c = checkpoint(self._last_state, part, h, c, use_reentrant=False, preserve_rng_state=False)
        return self.output(h)

    def scan(self, x: Inputs, state: State | None = None) -> tuple[Float[Tensor, "time batch hidden"], State]:
        """All hidden states, and the last state (h, c), starting from `state` or zeros."""
        x = encode(x, self.W_x)
        h, c = state or (x.new_zeros(x.shape[1], self.W_h.shape[1]),) * 2
        return (self._scan_fused if self.kernel == "fused" else self._scan_equations)(x, h, c)

    def _last_state(self, x: Tensor, h: Tensor, c: Tensor) -> State:
        return self.scan(x, (h, c))[1]

    def _scan_equations(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, State]:
        hidden = []
        for from_input in x @ self.W_x.T + self.b:  # (batch, 4·hidden) for each time step
            i, f, g, o = (from_input + h @ self.W_h.T).chunk(4, dim=-1)
            c = g.tanh() * i.sigmoid() + c * f.sigmoid()
            h = c.tanh() * o.sigmoid()
            hidden.append(h)
        return torch.stack(hidden), (h, c)

    def _scan_fused(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, State]:
        given: tuple[Tensor, ...] = (x, h, c, self.W_x, self.W_h, self.b)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            # By hand: autocast lets cuDNN compute in float16, whatever the precision that was asked for.
            given = tuple(tensor.to(torch.get_autocast_dtype("cuda")) for tensor in given)
        x, h, c, W_x, W_h, b = given
        weights = (W_x, W_h, b, torch.zeros_like(b))  # torch has a second bias; ours is zero
        with torch.autocast("cuda", enabled=False):
            hidden, h, c = torch.lstm(
                x, (h[None], c[None]), weights, True, 1, 0.0, self.training, False, False
            )
        return hidden, (h[0], c[0])

    def gate(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one gate's weights, such as W_gx [hidden, input], W_gh [hidden, hidden], b_g [hidden]."""
        index = GATES.index(name)
        W_x, W_h, b = (stacked.chunk(4)[index] for stacked in (self.W_x, self.W_h, self.b))
        return W_x, W_h, b

    @torch.no_grad()
    def initialise_as_linear(self) -> None:
        """Draw each gate's two matrices and bias as `nn.Linear` does: uniform in ±1/sqrt(fan-in)."""
        input_size, hidden_size = self.W_x.shape[1], self.W_h.shape[1]
        for weight, fan_in in ((self.W_x, input_size), (self.W_h, hidden_size), (self.b, input_size)):
            weight.uniform_(-(fan_in**-0.5), fan_in**-0.5)

    @torch.no_grad()
    def initialise_for_length(self, length: int) -> None:
        """Draw the biases of the forget and input gates for dependencies of up to `length` steps.

        b_f = log u with u uniform in [1, length], b_i = -b_f, and the other biases are zero: the chrono
        initialisation of Tallec and Ollivier (2018).
        """
        _, _, b_f = self.gate("f")
        _, _, b_i = self.gate("i")
        self.b.zero_()
        b_f.uniform_(1, max(2, length)).log_()
        b_i.copy_(-b_f)


class RNN(nn.Module):
    """The Elman network that the course report compares with its LSTM.

    h_t = tanh(W_hx x_t + W_hh h_{t-1} + b_h), p = W_ph h_T + b_p; arguments and inputs as in `LSTM`.
    """

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


def steps_at_once(steps: int, batch: int) -> int:
    """How many time steps are computed at once: all of them, or those of a part of a long sequence.

    A part is short, so that it stays near the caches, but long enough to balance the memory: a step within a
    part keeps 12 vectors of hidden size, and each part 2.
    """
    if steps * batch <= WHOLE:
        return steps
    return max(1, PART // batch, math.isqrt(steps // 6))


def encode(x: Inputs, weight: Float[Tensor, "outputs input"]) -> Float[Tensor, "time batch input"]:
    """Digits as inputs of a layer with this weight; inputs stay as they are."""
    if x.is_floating_point():
        return x
    if weight.shape[1] == 1:
        return x[..., None].to(weight.dtype)
    onehot = weight.new_zeros(*x.shape, weight.shape[1])
    return onehot.scatter_(-1, x[..., None].long(), 1.0)
