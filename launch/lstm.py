"""Train the LSTM on palindromes.

python launch/lstm.py --length 10

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/lstm.py --length 50
"""

from cs324dist import fix_hash_seed, main

if __name__ == "__main__":
    fix_hash_seed()
    main("lstm", __doc__)
