"""Train the GAN on MNIST.

python launch/gan.py --preset smoke --dataset fake

accelerate launch --config_file accelerate_configs/cpu.yaml launch/gan.py

accelerate launch --config_file accelerate_configs/multi_gpu.yaml launch/gan.py --preset course
"""

from cs324dist import fix_hash_seed, main

if __name__ == "__main__":
    fix_hash_seed()
    main("gan", __doc__)
