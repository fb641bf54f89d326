"""Train the GAN on MNIST.

python launch/gan.py --preset smoke --dataset fake

accelerate launch --config_file accelerate_configs/cpu.yaml launch/gan.py

accelerate launch --config_file accelerate_configs/multi_gpu.yaml launch/gan.py --preset course
"""

from cs324dist.errors import errors_as_exit_codes

if __name__ == "__main__":
    with errors_as_exit_codes():
        from cs324dist.tasks.gan import PRESETS, GANTask
        from cs324dist.training_run import main

        main("gan", GANTask, PRESETS, __doc__)
