"""Train the LSTM on palindromes.

python launch/lstm.py --length 10

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/lstm.py --length 50
"""

from cs324dist import main

if __name__ == "__main__":
    main("lstm", __doc__)
