"""Train the digit classifier whose weights the project ships.

python launch/classifier.py
"""

from cs324dist import main

if __name__ == "__main__":
    main("classifier", __doc__)
