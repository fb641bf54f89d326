"""One case of a comparison of speed.py, in a process of its own: prints milliseconds.

    python benchmarks/cases.py gan_notebook
    python benchmarks/cases.py gan_ours --profile   # where its time goes

The opponents are written as their users write them, and set nothing that this project sets for its processes:
no allocator thresholds, no flushing of denormal numbers.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from common import REPOSITORY, command_line, run_python, trainer_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

from cs324dist.distributed.process import prepare_process
from cs324dist.report.reading import read_run
from cs324dist.runs.environment import has_gpu
from cs324dist.tasks.gan.networks import Discriminator, Generator
from cs324dist.tasks.lstm.networks import LSTM

BATCH, LATENT = 64, 100  # the course recipe's
ON_GPU = has_gpu()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def seconds() -> float:
    """A clock that is read when the device has done what was asked of it."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(step: Callable[[int], object], steps: int, warm_up: int = 4) -> float:
    """Median over pairs of steps, as the discriminator of preset `course` trains in every second one.

    On a GPU the mean over all: to wait for it between pairs would hide what runs ahead of it.
    """
    for i in range(warm_up):
        step(i)
    times, together = [], steps if ON_GPU else 2
    for first in range(warm_up, warm_up + steps, together):
        began = seconds()
        for i in range(first, first + together):
            step(i)
        times.append((seconds() - began) / together)
    return 1000 * statistics.median(times)


def ours(precision: str | None = None) -> float:
    """A step of the trainer."""
    trainer = trainer_of("gan", "course", data_root=REPOSITORY / "data", precision=precision)
    return milliseconds(partial(trainer.step, is_logged=False), 30)


def gan_bare(without: str = "") -> float:
    """The mathematics of preset `course` on one fixed batch, without the trainer; and without one measure."""
    prepare_process(on_cpu=not ON_GPU)
    generator, discriminator = Generator().to(DEVICE), Discriminator().to(DEVICE)
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
    z = torch.randn(BATCH, LATENT, device=DEVICE)
    real = torch.rand(BATCH, 1, 28, 28, device=DEVICE) * 2 - 1

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


def notebook_networks() -> tuple[nn.Module, nn.Module]:
    """The course report's two networks, final sigmoid included."""
    generator = nn.Sequential(
        nn.Linear(LATENT, 1024), nn.BatchNorm1d(1024), nn.ReLU(),
        nn.Linear(1024, 128 * 7 * 7), nn.BatchNorm1d(128 * 7 * 7), nn.ReLU(),
        nn.Unflatten(1, (128, 7, 7)),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.LeakyReLU(0.2), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.LeakyReLU(0.2), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1024), nn.LeakyReLU(0.2),
        nn.Linear(1024, 1), nn.Sigmoid(),
    )  # fmt: skip
    return generator.to(DEVICE), discriminator.to(DEVICE)


def gan_notebook(in_memory: bool = False, accelerated: bool = False) -> float:
    """The course report's loop: eager, a DataLoader, BCELoss, `.item()` in every step.

    With the images in memory as one tensor; or in the style of Accelerate's examples, everything prepared.
    """
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    mnist = datasets.MNIST(str(REPOSITORY / "data"), train=True, transform=transform)
    loader = torch.utils.data.DataLoader(mnist, BATCH, shuffle=True)
    generator, discriminator = notebook_networks()
    g_optimizer = torch.optim.Adam(generator.parameters(), 2e-4)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), 2e-4)
    backward: Callable[[Tensor], object] = Tensor.backward
    if accelerated:
        accelerator = Accelerator(cpu=not ON_GPU)
        generator, discriminator, g_optimizer, d_optimizer, loader = accelerator.prepare(
            generator, discriminator, g_optimizer, d_optimizer, loader
        )
        backward = accelerator.backward

    def slices() -> Iterator[Tensor]:
        images = (mnist.data[:, None].float() / 127.5 - 1).to(DEVICE)
        while True:
            yield images[torch.randint(len(images), (BATCH,), device=DEVICE)]

    batches = slices() if in_memory else (images for images, _ in loader)
    criterion, losses = nn.BCELoss(), []

    def step(i: int) -> None:
        real = next(batches).to(DEVICE)
        ones, zeros = (torch.full((len(real), 1), label, device=DEVICE) for label in (1.0, 0.0))
        fake = generator(torch.randn(len(real), LATENT, device=DEVICE))
        g_optimizer.zero_grad()
        g_loss = criterion(discriminator(fake), ones)
        backward(g_loss)
        g_optimizer.step()
        losses.append(g_loss.item())
        if i % 2 == 0:
            d_optimizer.zero_grad()
            real_loss = criterion(discriminator(real), ones)
            d_loss = (real_loss + criterion(discriminator(fake.detach()), zeros)) / 2
            backward(d_loss)
            d_optimizer.step()
            losses.append(d_loss.item())

    return milliseconds(step, 30)


def gan_floor() -> float:
    """Its products at the rate of this machine's best matrix product, and one pass of Adam over memory."""
    prepare_process(on_cpu=not ON_GPU)
    generator, discriminator = notebook_networks()
    a = torch.randn(2048, 2048, device=DEVICE)
    rate = 2 * 2048**3 / milliseconds(lambda _: a @ a, 20)  # operations a millisecond

    def floor(network: nn.Module, forward: Callable[[], Tensor]) -> float:
        with FlopCounterMode(display=False) as operations:
            forward().mean().backward()
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        return operations.get_total_flops() / rate + milliseconds(lambda _: optimizer.step(), 20)

    trained = floor(discriminator, lambda: discriminator(torch.randn(2 * BATCH, 1, 28, 28, device=DEVICE)))
    discriminator.requires_grad_(False)
    return (
        floor(generator, lambda: discriminator(generator(torch.randn(BATCH, LATENT, device=DEVICE))))
        + trained / 2
    )


class TorchLSTM(nn.Module):
    """torch's own LSTM and a read-out of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(1, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x)[0][-1])


def lstm_step(model: nn.Module, length: int) -> float:
    """One step of the course recipe on one fixed batch."""
    optimizer = torch.optim.RMSprop(model.to(DEVICE).parameters(), 1e-3)
    digits = torch.randint(10, (128, length + 1), device=DEVICE)
    x, last = digits.T[:-1, :, None].float(), digits[:, 0]

    def step(_: int) -> None:
        loss = F.cross_entropy(model(x), last)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return milliseconds(step, 2 if length >= 1000 else 40, warm_up=1)


def lstm_ours(length: int, kernel: str = "fused", without: str = "") -> float:
    kept = {"flush_denormal": without != "flushing", "keep_memory": without != "allocator"}
    prepare_process(on_cpu=not ON_GPU, **kept)
    model = LSTM(1, 128, 10, kernel=kernel)
    for weight in model.parameters():  # as torch.nn.LSTM draws them, for the sake of the comparison
        nn.init.uniform_(weight, -(128**-0.5), 128**-0.5)
    return lstm_step(model, length)


def loop(batch: int, steps: int, log_every: int, *command: object) -> float:
    """A run's milliseconds a step, in float32, without its evaluations and checkpoints."""
    common = f"--preset course --batch-size {batch} --steps {steps} --log-every {log_every} --wandb disabled"
    rare = f"--evaluate-every {steps} --checkpoint-every {steps}"
    with TemporaryDirectory() as run:
        options = (*common.split(), *rare.split(), "--run-dir", run)
        run_python(*command, *options, ACCELERATE_MIXED_PRECISION="no")
        rates = read_run(Path(run), "loop").series("throughput/samples_per_second").values()
    return 1000 * batch / statistics.median([*rates][1:])


def torchrun(processes: int) -> tuple[object, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)


def scaled(processes: int, samples: int, *changes: object, threads: int = 1) -> float:
    """The GAN's loop with the discriminator trained in every step, one thread a process."""
    os.environ["CS324DIST_THREADS"] = str(threads)
    options = ("--discriminator-every", 1, "--dataset", "fake", *changes)
    return loop(processes * samples, 24, 4, *torchrun(processes), "launch/gan.py", *options)


def lstm_scaled(processes: int, *changes: object, threads: int = 1) -> float:
    """The LSTM's loop at its full length, one thread a process."""
    os.environ["CS324DIST_THREADS"] = str(threads)
    return loop(128, 120, 20, *torchrun(processes), "launch/lstm.py", "--curriculum", 1, *changes)


def imports() -> float:
    began = time.perf_counter()
    run_python("-c", "import torch, accelerate")
    return 1000 * (time.perf_counter() - began)


def start() -> float:
    """From the command to the first step's line."""
    with TemporaryDirectory() as folder:
        options = ["--preset", "smoke", "--dataset", "fake", "--wandb", "disabled", "--log-every", "1"]
        command = [sys.executable, "launch/gan.py", *options, "--run-dir", f"{folder}/run"]
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as run:
            next(line for line in run.stderr or () if line.startswith("step 1/"))
            seconds = time.perf_counter() - began
            run.kill()
    return 1000 * seconds


CASES: dict[str, Callable[[], float]] = {
    **{case.__name__: case for case in (gan_bare, gan_notebook, gan_floor, imports, start)},
    "gan_ours": ours,
    "gan_bf16": partial(ours, "bf16"),
    "gan_loop": partial(loop, BATCH, 100, 20, "launch/gan.py"),
    "lstm_loop": partial(loop, 128, 600, 50, "launch/lstm.py", "--length", 10),
    "gan_notebook_in_memory": partial(gan_notebook, in_memory=True),
    "gan_accelerate": partial(gan_notebook, accelerated=True),
    **{f"gan_without_{measure}": partial(gan_bare, measure) for measure in (
        "channels_last", "fused_adam", "frozen_discriminator", "one_forward", "pooling_first")},
    **{f"lstm_{kernel}_{n}": partial(lstm_ours, n, kernel) for kernel in ("fused", "equations")
       for n in (10, 50, 1000)},
    **{f"lstm_torch_{n}": lambda n=n: lstm_step(TorchLSTM(), n) for n in (50, 1000)},
    "lstm_without_flushing": partial(lstm_ours, 1000, without="flushing"),
    "lstm_without_allocator": partial(lstm_ours, 50, without="allocator"),
    **{f"{processes} x {samples}": partial(scaled, processes, samples)
       for processes, samples in ((1, 64), (2, 32), (2, 64), (1, 256), (2, 128), (2, 256))},
    **{f"2 x 32 exact{f' {parts}' * (parts > 2)}": partial(scaled, 2, 32, "--micro-batches", parts)
       for parts in (2, 4, 8)},
    "64 on two threads": partial(scaled, 1, 64, threads=2),
    "lstm 2": partial(lstm_scaled, 2),
    "lstm 2 exact": partial(lstm_scaled, 2, "--micro-batches", 2),
    "lstm on two threads": partial(lstm_scaled, 1, threads=2),
    "2 x 128 exact": partial(scaled, 2, 128, "--micro-batches", 2),
}  # fmt: skip


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("case", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--profile", action="store_true", help="print where its time goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    all_threads = torch.profiler._ExperimentalConfig(profile_all_threads=True)  # those of micro-batches too
    profiled = torch.profiler.profile(experimental_config=all_threads) if options.profile else nullcontext()
    with profiled as profiler:
        print(CASES[options.case]())
    if profiler:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
