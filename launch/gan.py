"""Train the GAN on MNIST.

python launch/gan.py --preset smoke --dataset fake

accelerate launch --config_file accelerate_configs/cpu.yaml launch/gan.py

accelerate launch --config_file accelerate_configs/multi_gpu.yaml launch/gan.py --preset report
"""

from cs324dist.training.gan import PRESETS, GANTask
from cs324dist.training.run import main

if __name__ == "__main__":
    main("gan", GANTask, PRESETS, __doc__)
