"""Train the digit classifier whose weights the project ships.

python launch/classifier.py
"""

from cs324dist.errors import errors_as_exit_codes

if __name__ == "__main__":
    with errors_as_exit_codes():
        from cs324dist.tasks.classifier import PRESETS, ClassifierTask
        from cs324dist.training_run import main

        main("classifier", ClassifierTask, PRESETS, __doc__)
