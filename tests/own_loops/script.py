"""A loop of one's own, in the variant that VARIANT names.

VARIANT=exact python tests/own_loops/script.py FOLDER STEPS
"""

import os
import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cs324dist import ExactGradients, Run, loader

VARIANT = os.environ["VARIANT"]
RANK = int(os.environ.get("RANK", "0"))
FOLDER, STEPS = sys.argv[1], int(sys.argv[2])
COUNT, BATCH = 4, 16


def network() -> nn.Module:
    width = 9 if VARIANT == "other networks" else 8
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 2)
    )


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 4, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def exactly() -> None:
    """What most variants are: one thing in it is another."""
    accelerator = None
    if VARIANT != "without an accelerator":
        accumulated = 4 if VARIANT == "accumulation" else 1
        accelerator = Accelerator(cpu=VARIANT != "each alone", gradient_accumulation_steps=accumulated)
    if VARIANT == "network before":
        torch.manual_seed(RANK)
        before = network()
    exact = ExactGradients(8 if VARIANT == "other parts" else COUNT, 0, accelerator)
    model = before if VARIANT == "network before" else network()
    if VARIANT == "prepared network":
        model = accelerator.prepare(model)
    model = exact.prepare(model)
    if VARIANT == "forgotten network":
        exact.prepare(nn.Linear(1, 1), "critic")
    batches = DataLoader(data(), BATCH, shuffle=VARIANT != "unshuffled loader")
    batches.worker_init_fn = torch.manual_seed if VARIANT == "seeded workers" else None
    if VARIANT == "prepared loader":
        batches = accelerator.prepare(batches)
    batches = loader(batches, 0, "train")
    kind = torch.optim.Adam if VARIANT == "other optimizer" else torch.optim.AdamW
    trained = network() if VARIANT == "optimizer of another" else model
    optimizer = kind(trained.parameters(), 0.5 if VARIANT == "other rate" else 1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20])
    if VARIANT == "prepared scheduler":
        scheduler = accelerator.prepare(scheduler)
    if VARIANT == "more threads":
        torch.set_num_threads(2)
    run = Run(
        FOLDER,
        networks=model if VARIANT == "no dict" else {"net": model},
        optimizers={"net": optimizer},
        states={} if VARIANT == "forgotten scheduler" else {"scheduler": scheduler},
        config={"lr": 2e-2 if VARIANT == "other setting" else 1e-2, "steps": STEPS},
        may_change=["steps"],
        accelerator=accelerator,
    )
    loss = 0.0
    of = torch.Tensor.detach if VARIANT == "detached loss" else lambda loss: loss
    if VARIANT == "logged too soon":
        run.log(loss=loss)
    with run:
        for step in run.steps(STEPS, save_every=5):
            if VARIANT == "draw on one rank" and RANK == 1 and step == 2:
                torch.rand(1)
            if not (VARIANT == "skipped backward" and RANK == 1):
                loss = exact.backward(lambda part: of(loss_of(model, batches.batch(part))), step, BATCH)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            run.log(loss=loss, noise=torch.rand(1))
            if VARIANT == "break" and step == 11:
                break
            if VARIANT == "own error" and step == 7:
                raise ValueError("of the loop itself")


def under_ddp() -> None:
    """Accelerate's DDP, without exact gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model, inputs = network(), data().tensors
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(FOLDER, networks={"net": model}, optimizers={"net": optimizer}, accelerator=accelerator)
    with run:
        for _ in run.steps(STEPS, save_every=5):
            rows = torch.randperm(100)[:BATCH][accelerator.process_index :: accelerator.num_processes]
            loss = loss_of(model, (inputs[0][rows], inputs[1][rows]))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss)


def by_a_gan() -> None:
    """Two networks, and two updates in a step."""
    exact = ExactGradients(COUNT)
    generator = exact.prepare(
        nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), "generator"
    )
    critic = exact.prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1)), "critic")
    optimizers = {
        "generator": torch.optim.Adam(generator.parameters(), 1e-3),
        "critic": torch.optim.Adam(critic.parameters(), 1e-3),
    }
    real = loader(data(), 0, "real")

    def critic_loss(part):
        inputs, _ = real.batch(part)
        made = generator(torch.randn(len(inputs), 2)).detach()
        return F.softplus(critic(made)).mean() + F.softplus(-critic(inputs)).mean()

    def generator_loss(part):
        return F.softplus(-critic(generator(torch.randn(BATCH // COUNT, 2)))).mean()

    with Run(FOLDER, networks={"generator": generator, "critic": critic}, optimizers=optimizers) as run:
        for step in run.steps(STEPS, save_every=5):
            found = exact.backward(critic_loss, step, BATCH, [critic], "critic")
            optimizers["critic"].step()
            made = exact.backward(generator_loss, step, BATCH, [generator], "generator")
            optimizers["generator"].step()
            run.log(critic=found, generator=made)


{"ddp": under_ddp, "gan": by_a_gan}.get(VARIANT, exactly)()
