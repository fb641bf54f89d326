"""One side of a comparison of speed.py, in a process of its own: prints milliseconds as JSON.

    python benchmarks/sides.py gan_notebook
    python benchmarks/sides.py gan_ours --profile   # where its time goes

The opponents are written as their users write them, and set nothing that this project sets for its processes:
no allocator thresholds, no flushing of denormal numbers.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

BATCH, LATENT = 64, 100  # the report's
DATA = Path("data")
SAMPLES = 10_000


def milliseconds(step: Callable[[int], object], steps: int, warm_up: int = 4) -> float:
    """Median over pairs of steps, as the discriminator of preset `report` trains in every second one."""
    for i in range(warm_up):
        step(i)
    times = []
    for i in range(warm_up, warm_up + steps, 2):
        began = time.perf_counter()
        step(i)
        step(i + 1)
        times.append((time.perf_counter() - began) / 2)
    return 1000 * statistics.median(times)


# The GAN's step --------------------------------------------------------------------------------------------


def gan_ours() -> float:
    """The task's step, preset `report`."""
    from cs324dist.distributed.process import start_accelerator
    from cs324dist.tasks.gan import PRESETS, GANTask

    task = GANTask(replace(PRESETS["course"], data_root=DATA), start_accelerator())
    return milliseconds(task.step, 30)


def gan_bf16() -> float:
    """The same under autocast."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    return gan_ours()


def gan_bare(without: str = "") -> float:
    """The same mathematics on one batch that is there, no streams, no Accelerate; and without one measure."""
    from torch.nn import functional as F

    from cs324dist.distributed.process import prepare_process
    from cs324dist.models.gan import Discriminator, Generator

    prepare_process(on_cpu=True)
    generator, discriminator = Generator(), Discriminator()
    if without == "pooling_first":
        layers = list(discriminator.net)
        for pool in (1, 4):
            layers[pool], layers[pool + 1] = layers[pool + 1], layers[pool]
        discriminator.net = nn.Sequential(*layers)
    if without != "channels_last":
        for network in (generator, discriminator):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    g_optimizer, d_optimizer = (
        torch.optim.Adam(network.parameters(), 2e-4, fused=without != "fused_adam")
        for network in (generator, discriminator)
    )
    z, real = torch.randn(BATCH, LATENT), torch.rand(BATCH, 1, 28, 28) * 2 - 1

    def step(i: int) -> None:
        fake = generator(z)
        discriminator.requires_grad_(without == "frozen_discriminator")
        F.softplus(-discriminator(fake)).mean().backward()
        g_optimizer.step()
        g_optimizer.zero_grad()
        d_optimizer.zero_grad()
        discriminator.requires_grad_(True)
        if i % 2 == 0:
            if without == "one_forward":
                real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
            else:
                real_logits, fake_logits = discriminator(torch.cat([real, fake.detach()])).chunk(2)
            ((F.softplus(-real_logits) + F.softplus(fake_logits)).mean() / 2).backward()
            d_optimizer.step()
            d_optimizer.zero_grad()

    return milliseconds(step, 30)


MEASURES = (
    "channels_last",
    "fused_adam",
    "frozen_discriminator",
    "one_forward",
    "pooling_first",
)


def notebook_networks() -> tuple[nn.Module, nn.Module]:
    """The report's two networks, final sigmoid included."""
    generator = nn.Sequential(
        nn.Linear(LATENT, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Linear(1024, 128 * 7 * 7),
        nn.BatchNorm1d(128 * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (128, 7, 7)),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1024),
        nn.LeakyReLU(0.2),
        nn.Linear(1024, 1),
        nn.Sigmoid(),
    )
    return generator, discriminator


def notebook_batches(in_memory: bool) -> Callable[[], Tensor]:
    """Batches as a DataLoader over torchvision's MNIST gives them, or slices of its images as one tensor."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    mnist = datasets.MNIST(str(DATA), train=True, transform=transform)
    if in_memory:
        images = mnist.data[:, None].float() / 127.5 - 1
        return lambda: images[torch.randint(len(images), (BATCH,))]
    batches = iter(torch.utils.data.DataLoader(mnist, BATCH, shuffle=True))
    return lambda: next(batches)[0]


def notebook(in_memory: bool) -> float:
    """The report's loop: eager, BCELoss, `.item()` in every step."""
    generator, discriminator = notebook_networks()
    g_optimizer = torch.optim.Adam(generator.parameters(), 2e-4)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), 2e-4)
    criterion, batch, losses = nn.BCELoss(), notebook_batches(in_memory), []
    ones, zeros = torch.ones(BATCH, 1), torch.zeros(BATCH, 1)

    def step(i: int) -> None:
        real = batch()
        fake = generator(torch.randn(BATCH, LATENT))
        g_optimizer.zero_grad()
        g_loss = criterion(discriminator(fake), ones)
        g_loss.backward()
        g_optimizer.step()
        losses.append(g_loss.item())
        if i % 2 == 0:
            d_optimizer.zero_grad()
            d_loss = (
                criterion(discriminator(real), ones) + criterion(discriminator(fake.detach()), zeros)
            ) / 2
            d_loss.backward()
            d_optimizer.step()
            losses.append(d_loss.item())

    return milliseconds(step, 30)


def gan_notebook() -> float:
    return notebook(in_memory=False)


def gan_notebook_in_memory() -> float:
    return notebook(in_memory=True)


def gan_accelerate() -> float:
    """In the style of Accelerate's examples: everything prepared, a DataLoader, `accelerator.backward`."""
    from accelerate import Accelerator
    from torchvision import datasets, transforms

    accelerator = Accelerator(cpu=True)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = torch.utils.data.DataLoader(
        datasets.MNIST(str(DATA), train=True, transform=transform), BATCH, shuffle=True
    )
    generator, discriminator = notebook_networks()
    generator, discriminator, g_optimizer, d_optimizer, loader = accelerator.prepare(
        generator,
        discriminator,
        torch.optim.Adam(generator.parameters(), 2e-4),
        torch.optim.Adam(discriminator.parameters(), 2e-4),
        loader,
    )
    criterion, batches, losses = nn.BCELoss(), iter(loader), []

    def step(i: int) -> None:
        real, _ = next(batches)
        ones = torch.ones(len(real), 1, device=accelerator.device)
        fake = generator(torch.randn(len(real), LATENT, device=accelerator.device))
        g_optimizer.zero_grad()
        g_loss = criterion(discriminator(fake), ones)
        accelerator.backward(g_loss)
        g_optimizer.step()
        losses.append(g_loss.item())
        if i % 2 == 0:
            d_optimizer.zero_grad()
            real_loss = criterion(discriminator(real), ones)
            d_loss = (real_loss + criterion(discriminator(fake.detach()), torch.zeros_like(ones))) / 2
            accelerator.backward(d_loss)
            d_optimizer.step()
            losses.append(d_loss.item())

    return milliseconds(step, 30)


def gan_floor() -> float:
    """Its products at the rate of this machine's best matrix product, and one pass of Adam over memory."""
    from torch.utils.flop_counter import FlopCounterMode

    from cs324dist.distributed.process import prepare_process

    prepare_process(on_cpu=True)
    generator, discriminator = notebook_networks()

    def products(of: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            of()
        return counter.get_total_flops()

    def generator_step() -> None:
        discriminator.requires_grad_(False)
        discriminator(generator(torch.randn(BATCH, LATENT))).mean().backward()
        discriminator.requires_grad_(True)

    def discriminator_step() -> None:
        discriminator(torch.randn(2 * BATCH, 1, 28, 28)).mean().backward()

    size = 2048
    a = torch.randn(size, size)
    rate = 2 * size**3 / milliseconds(lambda _: a @ a, 20)  # operations a millisecond

    def adam(network: nn.Module) -> float:
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        return milliseconds(lambda _: optimizer.step(), 20)

    g_products, d_products = products(generator_step), products(discriminator_step)
    return g_products / rate + adam(generator) + (d_products / rate + adam(discriminator)) / 2


# The LSTM's step -------------------------------------------------------------------------------------------


def lstm_step(model: nn.Module, length: int, digits: Tensor) -> float:
    """One step of the report's recipe on one batch that is there."""
    from torch.nn import functional as F

    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
    x, last = digits.T[:-1, :, None].float(), digits[:, 0]

    def step(_: int) -> None:
        loss = F.cross_entropy(model(x), last)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return milliseconds(step, 2 if length >= 1000 else 40, warm_up=1)


class Bare(nn.Module):
    """torch's own LSTM and a read-out of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(1, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x)[0][-1])


def lstm_ours(length: int, kernel: str, without: str = "") -> float:
    from cs324dist.models.lstm import LSTM
    from cs324dist.tasks import process

    if without == "flushing":
        torch.set_flush_denormal = lambda _: None
    if without == "allocator":
        process.keep_large_memory = lambda: None
    process.prepare_process(on_cpu=True)
    model = LSTM(1, 128, 10, kernel=kernel)
    for weight in model.parameters():  # as torch.nn.LSTM draws them, for the sake of the comparison
        nn.init.uniform_(weight, -(128**-0.5), 128**-0.5)
    return lstm_step(model, length, torch.randint(10, (128, length + 1)))


def lstm_torch(length: int) -> float:
    return lstm_step(Bare(), length, torch.randint(10, (128, length + 1)))


# The loop around the step ----------------------------------------------------------------------------------


def loop(name: str, steps: int) -> float:
    """A whole run's milliseconds a step, without its evaluations and checkpoints."""
    from cs324dist.distributed.process import start_accelerator
    from cs324dist.distributed.stop import StopRequest
    from cs324dist.runs.run_dir import RunDir
    from cs324dist.tasks import gan, lstm
    from cs324dist.training_run import run_to_the_end

    task, settings = {
        "gan": (gan.GANTask, replace(gan.PRESETS["course"], data_root=DATA, log_every=20)),
        "lstm": (lstm.LSTMTask, replace(lstm.PRESETS["course"], length=10, log_every=50)),
    }[name]
    with TemporaryDirectory() as folder, StopRequest(1) as stop:
        whole = replace(settings, run_dir=Path(folder) / "run", wandb="disabled", steps=steps,
                        evaluate_every=steps, checkpoint_every=steps)  # fmt: skip
        run_to_the_end(name, task, whole, start_accelerator(whole.batch_size), stop)  # type: ignore[arg-type]
        rows = RunDir(Path(folder) / "run").read_metrics()
    rates = [row["throughput/samples_per_second"] for row in rows if "throughput/samples_per_second" in row]
    return 1000 * settings.batch_size / statistics.median(rates[1:])


def gan_loop() -> float:
    return loop("gan", 100)


def lstm_loop() -> float:
    return loop("lstm", 600)


# Start and samples -----------------------------------------------------------------------------------------


def samples(to_file: bool) -> float:
    """10 000 samples: from a checkpoint to a file, or only through the generator."""
    import runpy

    from cs324dist.models.gan import Generator
    from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
    from cs324dist.runs.files import write_json
    from cs324dist.sampling.generators import generate, load_generator

    with TemporaryDirectory() as folder:
        run = Path(folder)
        write_json(run / "config.json", {})
        write_checkpoint(
            run / "checkpoints" / "000000001", {"generator": Generator()}, {}, TrainerState(1, 1)
        )
        generator, z = load_generator(run), torch.randn(SAMPLES, LATENT)
        tensor_file = runpy.run_path("launch/sample.py")["TensorFile"](run, out=run / "samples.safetensors")
        return milliseconds(lambda _: tensor_file.draw() if to_file else generate(generator, z), 2, warm_up=1)


SIDES: dict[str, Callable[[], float]] = {
    **{side.__name__: side for side in (gan_ours, gan_bare, gan_notebook, gan_notebook_in_memory)},
    **{side.__name__: side for side in (gan_accelerate, gan_floor, gan_loop, gan_bf16, lstm_loop)},
    **{f"lstm_{kernel}_{n}": lambda n=n, kernel=kernel: lstm_ours(n, kernel)
       for kernel in ("fused", "equations") for n in (10, 50, 1000)},
    **{f"lstm_torch_{n}": lambda n=n: lstm_torch(n) for n in (50, 1000)},
    **{f"gan_without_{measure}": lambda measure=measure: gan_bare(measure) for measure in MEASURES},
    "lstm_without_flushing": lambda: lstm_ours(1000, "fused", without="flushing"),
    "lstm_without_allocator": lambda: lstm_ours(50, "fused", without="allocator"),
    "samples_file": lambda: samples(to_file=True),
    "samples_forward": lambda: samples(to_file=False),
}  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(0)
    chosen = SIDES[sys.argv[1]]
    if "--profile" in sys.argv:
        with torch.profiler.profile() as profile:
            chosen()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
    else:
        print(json.dumps(chosen()))
