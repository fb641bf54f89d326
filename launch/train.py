"""Train a task of your own.

python launch/train.py path/to/file.py:Class --steps 100

python launch/train.py package.module:Class --help
"""

import sys

from cs324dist import fix_hash_seed, main
from cs324dist.errors import UserError, errors_as_exit_codes

if __name__ == "__main__":
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit()
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        with errors_as_exit_codes():
            raise UserError("a task is missing: give path/to/file.py:Class or package.module:Class first")
    fix_hash_seed()
    main(sys.argv[1], __doc__)
