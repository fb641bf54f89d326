"""A Python that has imported what the scripts import, and forks for each script that a test runs.

An order is a line of JSON: `command`, `environment`, and the files `stdout` and `stderr`; the answer is the
exit code. The import takes longer than most scripts, and a fork has it already. Nothing here makes a tensor:
threads do not survive a fork.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

for module in (
    "cs324dist.audit",
    "cs324dist.command_line",
    "cs324dist.report.page",
    "cs324dist.pictures",
    "cs324dist.loop",
    "torch._dynamo",  # which the first optimizer imports
):
    importlib.import_module(module)

TIMEOUT = 240  # seconds

gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    if order is None:  # the end of the pipe may never come: workers that a test forks hold it as well
        sys.exit()
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

signal.alarm(TIMEOUT)
for descriptor, path in enumerate((os.devnull, order["stdout"], order["stderr"])):
    file = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    os.dup2(file, descriptor)
    os.close(file)
os.environ.clear()
os.environ.update(order["environment"])
sys.argv = order["command"]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
code: object = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
except BaseException as error:
    sys.excepthook(type(error), error, error.__traceback__)
    code = 1
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code or 0)  # to take all modules down would take longer than to run most scripts
