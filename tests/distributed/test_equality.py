"""One seed, one path: 1, 2 and 4 processes, and a plain loop that knows nothing of the project's."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launched import newest_checkpoint
from paths import Weights, assert_same_path, command, weights_in
from torch import Tensor
from torch.nn import functional as F

from cs324dist.data.streams import MicroBatch, ShuffledEpochs, Stream
from cs324dist.tasks import find_task
from cs324dist.tasks.gan.images import load_images
from cs324dist.tasks.gan.networks import Discriminator, Generator
from cs324dist.tasks.lstm.networks import LSTM
from cs324dist.tasks.lstm.palindromes import palindromes

STEPS, BATCH, LENGTH = 20, 16, 12
GAN_BATCH = 8  # float64 convolutions are slow
GAN = {"batch_size": GAN_BATCH, "dataset": "fake", "steps": STEPS}
LSTM_ = {"batch_size": BATCH, "length": LENGTH, "curriculum": 1.0, "steps": STEPS}
CASES = {"lstm fast": LSTM_, "lstm course": LSTM_, "gan fast": GAN, "gan course": GAN}
QUICK, OTHERS = ("lstm course", "gan fast"), ("lstm fast", "gan course")


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_two_processes_take_the_path_of_one(follow, case):
    one, two = (follow(case, CASES[case], processes=n) for n in (1, 2))
    assert_same_path(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_processes_take_the_path_of_one(follow, case):
    one, four = (follow(case, CASES[case], processes=n) for n in (1, 4))
    assert_same_path(four, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lstm fast", "gan fast"])
def test_two_nodes_with_two_processes_each_take_the_path_of_one(follow, launch_on_two_nodes, tmp_path, case):
    launch_on_two_nodes(*command(case, CASES[case], tmp_path / "run"))
    assert_same_path(weights_in(newest_checkpoint(tmp_path / "run")), follow(case, CASES[case]))


@pytest.mark.parametrize("preset", ["fast", "course"])
def test_the_lstm_takes_the_path_of_a_plain_loop(follow, float64, preset):
    start = untrained("lstm", preset)["lstm"]
    model = LSTM(start["W_x"].shape[1], kernel="equations")
    model.load_state_dict(start)
    if preset == "fast":
        optimizer, largest = torch.optim.Adam(model.parameters(), 4e-2, foreach=False), 0.25
    else:
        optimizer, largest = torch.optim.RMSprop(model.parameters(), 1e-3, foreach=False), 10.0
    for batch in batches(BATCH):
        digits, last = palindromes(Stream(0, "palindromes/train"), batch.samples, LENGTH)
        optimizer.zero_grad()
        F.cross_entropy(model(digits), last).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), largest, foreach=False)
        if preset == "fast":
            optimizer.param_groups[0]["lr"] = 4e-2 * min(1, 2 * (1 - batch.step / STEPS))
        optimizer.step()
    assert_same_path(follow(f"lstm {preset}", LSTM_), whole(lstm=model))


@pytest.mark.parametrize("preset", ["fast", "course"])
def test_the_gan_takes_the_path_of_a_plain_loop(follow, float64, preset):
    start = untrained("gan", preset)
    generator, discriminator = Generator(), Discriminator(classes=10 if preset == "fast" else 1)
    generator.load_state_dict(start["generator"])
    discriminator.load_state_dict(start["discriminator"])
    averaged = copy.deepcopy(generator)
    for name in ("fc.0", "fc.3", "upconv.0"):  # BatchNorm cancels these biases: see freeze_cancelled_biases
        generator.get_submodule(name).bias.requires_grad_(False)
    rates, betas = {"fast": ((1e-2, 1e-3), (0.0, 0.99)), "course": ((2e-4, 2e-4), (0.9, 0.999))}[preset]
    g_adam = torch.optim.Adam(generator.parameters(), rates[0], betas, foreach=False)
    d_adam = torch.optim.Adam(discriminator.parameters(), rates[1], betas, foreach=False)
    train = load_images("fake", "train", Path())
    order = ShuffledEpochs(0, "images/train", len(train.images))

    for batch in batches(GAN_BATCH):
        real = train.images[order.items(batch)].double()[:, None] / 127.5 - 1
        fake = generator(Stream(0, "latents/train").normals(batch.samples, 100))
        if preset == "fast":
            for adam, rate in zip((g_adam, d_adam), rates, strict=True):
                adam.param_groups[0]["lr"] = rate * (1 - batch.step / STEPS)

        g_adam.zero_grad()
        classes, is_real = chances(discriminator(fake))
        loss = -torch.log(is_real).mean()
        if preset == "fast":
            loss = loss - LABEL_WEIGHT * torch.log(classes.max(1).values).mean()
        loss.backward()
        g_adam.step()
        decay = min(0.998, (batch.step + 1) / (batch.step + 10))
        for old, new in zip(state(averaged), state(generator), strict=True):
            old.copy_(decay * old + (1 - decay) * new)

        if preset == "course" and batch.step % 2:
            continue
        d_adam.zero_grad()
        fake = fake.detach()
        of_real, of_fake = discriminator(real), discriminator(fake)
        (classes, is_real), (_, fake_is_real) = chances(of_real), chances(of_fake)
        loss = -torch.log(is_real).mean() / 2 - torch.log(1 - fake_is_real).mean() / 2
        if preset == "fast":
            right = classes[torch.arange(len(real)), train.labels[order.items(batch)]]
            loss = loss - LABEL_WEIGHT * torch.log(right).mean() / 2
            signs = Stream(0, "nudges/train").signs(batch.samples, 2 * 784).view(GAN_BATCH, 2, 1, 28, 28)
            slope_at_real = (discriminator(real + 0.05 * signs[:, 0]) - of_real) / 0.05
            slope_at_fake = (discriminator(fake + 0.05 * signs[:, 1]) - of_fake) / 0.05
            slopes = torch.cat([slope_at_real, slope_at_fake])
            loss = loss + PENALTY * slopes.square().sum(1).mean()
        loss.backward()
        d_adam.step()

    expected = whole(generator=generator, discriminator=discriminator)
    if preset == "fast":
        expected |= whole(generator_ema=averaged)
    expected = {name: tensor for name, tensor in expected.items() if "num_batches" not in name}
    end = follow(f"gan {preset}", GAN)
    assert_same_path({name: end[name] for name in expected}, expected)


PENALTY = 0.1
LABEL_WEIGHT = 0.05


def chances(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities of the classes of a real image, and of being real; "generated" has the logit zero."""
    weights = logits.exp()
    real = weights.sum(1)
    return weights / real[:, None], real / (real + 1)


def untrained(task: str, preset: str) -> dict[str, Weights]:
    """The weights that a task begins with, by model."""
    task_type = find_task(task)
    config = replace(task_type.presets[preset], **CASES[f"{task} {preset}"])
    models = task_type(config, torch.device("cpu")).networks
    return {name: model.state_dict() for name, model in models.items()}


def batches(size: int) -> Iterator[MicroBatch]:
    return (MicroBatch(step, size) for step in range(STEPS))


def whole(**models: torch.nn.Module) -> Weights:
    return {f"{model}/{name}": t for model, m in models.items() for name, t in m.state_dict().items()}


def state(model: torch.nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
