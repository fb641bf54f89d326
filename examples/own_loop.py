"""A classifier of pictures in folders, in a loop of one's own with Accelerate.

python examples/shapes.py runs/shapes
accelerate launch examples/own_loop.py --data runs/shapes
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cs324dist import ExactGradients, Run, loader

AS_TENSOR = [v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
AUGMENTED = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=3), v2.ColorJitter(0.3, 0.3)]


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Halves the size of its input."""
    return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over the samples."""
    pictures, labels = batch
    return F.cross_entropy(model(pictures), labels, label_smoothing=0.1)


@torch.no_grad()
def is_right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of each sample, whether its class is found."""
    pictures, labels = batch
    return model(pictures).argmax(1) == labels


def main(args: argparse.Namespace) -> None:
    """Train; after each epoch, measure the accuracy on every sixth picture, which is held out."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    exact = ExactGradients(micro_batches=4, seed=args.seed, accelerator=accelerator)

    pictures = ImageFolder(args.data, v2.Compose(AS_TENSOR))
    held_out = range(0, len(pictures), 6)
    test_set = Subset(pictures, held_out)
    augmented = ImageFolder(args.data, v2.Compose([*AUGMENTED, *AS_TENSOR]))
    train_set = Subset(augmented, sorted({*range(len(pictures))} - {*held_out}))
    train_loader = loader(DataLoader(train_set, shuffle=True, num_workers=2), args.seed, "train")
    test_loader = loader(test_set, args.seed, "test")
    steps_per_epoch = len(train_set) // args.batch_size

    layers = [*block(3, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Dropout(0.2)]
    model = exact.prepare(nn.Sequential(*layers, nn.Linear(64 * 4 * 4, len(pictures.classes))))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps_per_epoch)
    run = Run(args.run_dir, networks={"model": model}, optimizers={"model": optimizer},
              states={"scheduler": scheduler}, config=vars(args), may_change=["data", "run_dir"],
              accelerator=accelerator)  # fmt: skip

    with run:
        for step in run.steps(args.epochs * steps_per_epoch, save_every=20):
            exact.backward(lambda part: loss_of(model, train_loader.batch(part)), step, args.batch_size)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if (step + 1) % steps_per_epoch == 0:
                model.eval()
                right = exact.sum_over(lambda i: is_right(model, test_loader.items(i)).sum(), len(test_set))
                run.log(accuracy=right / len(test_set))
                model.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("photos"), help="folder with a folder for each class"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="samples in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/own_loop"), help="folder of the run")
    main(parser.parse_args())
