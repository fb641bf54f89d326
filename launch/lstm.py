"""Train the LSTM on palindromes.

python launch/lstm.py --length 10

accelerate launch --config_file accelerate_configs/cpu_ddp.yaml launch/lstm.py --length 50
"""

from cs324dist.errors import errors_as_exit_codes

if __name__ == "__main__":
    with errors_as_exit_codes():
        from cs324dist.tasks.lstm import PRESETS, LSTMTask
        from cs324dist.training_run import main

        main("lstm", LSTMTask, PRESETS, __doc__)
