"""Compile inject.c, and start points.py with it loaded."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

compiler = shutil.which("cc")
if compiler is None:
    sys.exit("crash points need a C compiler, `cc`: on Debian, apt-get install gcc")
with tempfile.TemporaryDirectory(prefix="crash-points-") as folder:
    library = Path(folder) / "inject.so"
    source = HERE / "inject.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    # One thread: forks share no others. /dev/null: no configuration of Accelerate's.
    own = {
        "CS324DIST_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": os.devnull,
        "ACCELERATE_USE_CPU": "true",
    }
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_"))}
    environment = {**outside, **own, "LD_PRELOAD": str(library)}
    command = [sys.executable, HERE / "points.py", "--folder", folder, *sys.argv[1:]]
    code = subprocess.run(command, env=environment, check=False).returncode
    sys.exit(code if code >= 0 else f"ended by signal {-code}")
