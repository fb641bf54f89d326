"""A classifier of pictures in folders, in a loop of one's own with Accelerate.

python examples/shapes.py runs/shapes
accelerate launch examples/own_loop_before.py --data runs/shapes

This is how many loops are written. examples/own_loop.py is the same, exact and continued after a kill.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

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
    set_seed(args.seed)

    pictures = ImageFolder(args.data, v2.Compose(AS_TENSOR))
    held_out = range(0, len(pictures), 6)
    test_set = Subset(pictures, held_out)
    augmented = ImageFolder(args.data, v2.Compose([*AUGMENTED, *AS_TENSOR]))
    train_set = Subset(augmented, sorted({*range(len(pictures))} - {*held_out}))
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, num_workers=2, drop_last=True)
    test_loader = DataLoader(test_set, args.batch_size)
    steps_per_epoch = len(train_set) // args.batch_size

    layers = [*block(3, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Dropout(0.2)]
    model = nn.Sequential(*layers, nn.Linear(64 * 4 * 4, len(pictures.classes)))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * steps_per_epoch)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    train_loader, test_loader = accelerator.prepare(train_loader, test_loader)

    for epoch in range(args.epochs):
        for batch in train_loader:
            accelerator.backward(loss_of(model, batch))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        model.eval()
        right = [accelerator.gather_for_metrics(is_right(model, batch)) for batch in test_loader]
        accelerator.print(f"epoch {epoch + 1}: accuracy {torch.cat(right).float().mean():.3f}")
        model.train()
    accelerator.save_model(model, args.run_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("photos"), help="folder with a folder for each class"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="samples in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/own_loop"), help="where the model goes")
    main(parser.parse_args())
