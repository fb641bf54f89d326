"""Train the digit classifier whose weights the project ships.

python launch/classifier.py
"""

from cs324dist.training.classifier import PRESETS, ClassifierTask
from cs324dist.training.run import main

if __name__ == "__main__":
    main("classifier", ClassifierTask, PRESETS, __doc__)
