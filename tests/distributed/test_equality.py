"""One seed, one path: 1, 2 and 4 processes, and a plain loop that knows nothing of the project's."""

import copy
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from cs324dist.data.images import load_images
from cs324dist.data.palindromes import encode, palindromes
from cs324dist.data.streams import ShuffledEpochs, Stream
from cs324dist.models.gan import Discriminator, Generator
from cs324dist.models.lstm import LSTM

STEPS, BATCH, LENGTH = 20, 16, 12
FOLLOW = Path(__file__).parent / "follow.py"
TOLERANCE = 1e-9  # norm of difference over norm, float64
GAN_BATCH = 8  # float64 convolutions are slow
GAN_SETTINGS = {"batch_size": GAN_BATCH, "dataset": "fake"}
LSTM_SETTINGS = {"batch_size": BATCH, "length": LENGTH, "curriculum": 1.0}
CASES = {
    "lstm fast": LSTM_SETTINGS,
    "lstm report": LSTM_SETTINGS,
    "gan fast": GAN_SETTINGS,
    "gan report": GAN_SETTINGS,
}
Weights = dict[str, Tensor]


def assert_same_path(weights: Weights, expected: Weights) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        difference, size = (weights[name] - tensor).double().norm(), tensor.double().norm()
        assert difference <= TOLERANCE * size, f"{name}: {difference / size:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_path_of_one(follow, case):
    one, two = (follow(*case.split(), CASES[case], processes=n, steps=STEPS) for n in (1, 2))
    assert_same_path(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_processes_take_the_path_of_one(follow, case):
    one, four = (follow(*case.split(), CASES[case], processes=n, steps=STEPS) for n in (1, 4))
    assert_same_path(four, one)


@pytest.mark.parametrize("preset", ["fast", "course"])
def test_the_lstm_takes_the_path_of_a_plain_loop(follow, preset):
    start = follow("lstm", preset, LSTM_SETTINGS, steps=0)
    end = follow("lstm", preset, LSTM_SETTINGS, steps=STEPS)
    encoding = {"fast": "onehot", "report": "scalar"}[preset]
    model = LSTM(start["lstm/W_x"].shape[1], kernel="equations").double()
    model.load_state_dict(part(start, "lstm"))
    if preset == "fast":
        optimizer, clip = torch.optim.Adam(model.parameters(), 4e-2, foreach=False), 0.25
    else:
        optimizer, clip = torch.optim.RMSprop(model.parameters(), 1e-3, foreach=False), 10.0
    for indices in batches(BATCH):
        digits, last = palindromes(Stream(0, "palindromes/train"), indices, LENGTH)
        optimizer.zero_grad()
        F.cross_entropy(model(encode(digits, encoding, torch.float64)), last).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
        optimizer.step()
    assert_same_path(end, whole(lstm=model))


@pytest.mark.parametrize("preset", ["fast", "course"])
def test_the_gan_takes_the_path_of_a_plain_loop(follow, preset):
    start = follow("gan", preset, GAN_SETTINGS, steps=0)
    end = follow("gan", preset, GAN_SETTINGS, steps=STEPS)
    generator, discriminator = Generator().double(), Discriminator().double()
    generator.load_state_dict(part(start, "generator"))
    discriminator.load_state_dict(part(start, "discriminator"))
    averaged = copy.deepcopy(generator)
    for name in ("fc.0", "fc.3", "upconv.0"):  # BatchNorm cancels these biases: see freeze_cancelled_biases
        generator.get_submodule(name).bias.requires_grad_(False)
    rates, betas = {"fast": ((1e-2, 1e-3), (0.0, 0.99)), "report": ((2e-4, 2e-4), (0.9, 0.999))}[preset]
    g_adam = torch.optim.Adam(generator.parameters(), rates[0], betas, foreach=False)
    d_adam = torch.optim.Adam(discriminator.parameters(), rates[1], betas, foreach=False)
    images = load_images("fake", "train", Path()).images
    order = ShuffledEpochs(0, "images/train", len(images))

    for step, indices in enumerate(batches(GAN_BATCH)):
        real = images[order.items(indices)].double()[:, None] / 127.5 - 1
        fake = generator(Stream(0, "latents/train").normals(indices, 100, torch.float64))
        if preset == "fast":
            for adam, rate in zip((g_adam, d_adam), rates, strict=True):
                adam.param_groups[0]["lr"] = rate * (1 - step / 2500)

        g_adam.zero_grad()
        (-torch.log(torch.sigmoid(discriminator(fake)))).mean().backward()
        g_adam.step()
        decay = min(0.998, (step + 1) / (step + 10))
        for old, new in zip(state(averaged), state(generator), strict=True):
            old.copy_(decay * old + (1 - decay) * new)

        if preset == "report" and step % 2:
            continue
        d_adam.zero_grad()
        fake = fake.detach()
        of_real, of_fake = discriminator(real), discriminator(fake)
        loss = (
            -torch.log(torch.sigmoid(of_real)).mean() / 2 - torch.log(1 - torch.sigmoid(of_fake)).mean() / 2
        )
        if preset == "fast":
            signs = (
                Stream(0, "nudges/train").signs(indices, 2 * 784, torch.float64).view(GAN_BATCH, 2, 1, 28, 28)
            )
            slope_at_real = (discriminator(real + 0.05 * signs[:, 0]) - of_real) / 0.05
            slope_at_fake = (discriminator(fake + 0.05 * signs[:, 1]) - of_fake) / 0.05
            loss = loss + PENALTY * (slope_at_real.square().mean() + slope_at_fake.square().mean()) / 2
        loss.backward()
        d_adam.step()

    expected = whole(generator=generator, discriminator=discriminator)
    if preset == "fast":
        expected |= whole(generator_ema=averaged)
        expected["generator_ema/fc.1.num_batches_tracked"].zero_()  # counts are not averaged
    assert_same_path(
        {name: end[name] for name in expected if "num_batches" not in name},
        {name: expected[name] for name in expected if "num_batches" not in name},
    )


PENALTY = 0.1


def batches(size: int) -> Iterator[Tensor]:
    return iter(torch.arange(STEPS * size).split(size))


def part(weights: Weights, model: str) -> Weights:
    return {name.removeprefix(f"{model}/"): t for name, t in weights.items() if name.startswith(f"{model}/")}


def whole(**models: torch.nn.Module) -> Weights:
    return {f"{model}/{name}": t for model, m in models.items() for name, t in m.state_dict().items()}


def state(model: torch.nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lstm fast", "gan fast"])
def test_two_nodes_with_two_processes_each_take_the_path_of_one(follow, launch, tmp_path, case):
    out = tmp_path / "weights.safetensors"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(rank: int) -> None:
        arguments = [*case.split(), out, "--steps", STEPS, "--settings", json.dumps(CASES[case])]
        options = [
            "--num_machines",
            2,
            "--num_processes",
            4,
            "--machine_rank",
            rank,
            "--mixed_precision",
            "no",
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            port,
        ]
        config = ("--config_file", "accelerate_configs/multi_node.yaml")
        launch(FOLLOW, *arguments, launcher="accelerate", options=(*config, *map(str, options)))

    with ThreadPoolExecutor(2) as nodes:
        list(nodes.map(node, (0, 1)))
    assert_same_path(load_file(out), follow(*case.split(), CASES[case], steps=STEPS))
