"""The tasks of the project, and how tasks of one's own are found."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from cs324dist.errors import UserError
from cs324dist.tasks.base import Task

TASKS = {
    "lstm": "cs324dist.tasks.lstm:LSTMTask",
    "gan": "cs324dist.tasks.gan:GANTask",
    "classifier": "cs324dist.tasks.classifier:ClassifierTask",
}


def find_task(name: str) -> type[Task[Any]]:
    """The task called `name`: one of `TASKS`, or `path/to/file.py:Class`, or `package.module:Class`.

    The code in the file or module runs.

    Raises:
        UserError: there is no such task.
    """
    module_name, _, class_name = TASKS.get(name, name).rpartition(":")
    if not module_name:
        raise UserError(
            f"task {name!r} is unknown: give {', '.join(TASKS)}, path/file.py:Class, or package.module:Class"
        )
    try:
        module = (
            _from_file(Path(module_name))
            if module_name.endswith(".py")
            else importlib.import_module(module_name)
        )
        task = getattr(module, class_name)
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(f"task {name!r} cannot be imported: {error}") from None
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"task {name!r} is not a subclass of cs324dist.Task")
    return task


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
