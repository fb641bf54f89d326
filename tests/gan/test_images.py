"""The images are MNIST's to the byte, and what the classifier and the GAN see of them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import torch

from cs324dist.tasks.gan.images import load_images, to_unit_range

# Of the published files, from elsewhere than the SHA-256s in the module.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class TestContent:
    def test_mnist_is_mnist(self, mnist_root: Path) -> None:
        for name, md5 in MNIST_MD5.items():
            assert hashlib.md5((mnist_root / "MNIST" / "raw" / name).read_bytes()).hexdigest() == md5
        train, test = (load_images("mnist", split, mnist_root) for split in ("train", "test"))
        assert train.images.shape == (60_000, 28, 28)
        assert train.labels[0] == 5
        counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert test.labels.bincount().tolist() == counts

    def test_fake_is_the_same_noise_each_time_and_needs_no_folder(self) -> None:
        nowhere = Path("/nonexistent")
        first, again = (load_images("fake", "train", nowhere) for _ in range(2))
        test = load_images("fake", "test", nowhere)
        assert torch.equal(first.images, again.images)
        assert torch.equal(first.labels, again.labels)
        assert (len(first.images), len(test.images)) == (2048, 512)
        assert not torch.equal(first.images[:512], test.images)
        assert (int(first.images.min()), int(first.images.max())) == (0, 255)
        assert first.labels.unique().tolist() == list(range(10))

    def test_unit_range_keeps_every_byte_apart(self) -> None:
        every_byte = torch.arange(256, dtype=torch.uint8).repeat(4)[: 28 * 28].reshape(1, 28, 28)
        scaled = to_unit_range(every_byte)
        assert scaled.shape == (1, 1, 28, 28)
        assert (scaled.min(), scaled.max()) == (-1.0, 1.0)
        assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), every_byte.unsqueeze(1))


def test_importing_the_module_imports_no_torchvision() -> None:
    code = "import sys, cs324dist.tasks.gan.images; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
