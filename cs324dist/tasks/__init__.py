"""The tasks of the project, and how tasks of one's own are found."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cs324dist.config import Config, as_json, from_json
from cs324dist.errors import UserError
from cs324dist.tasks.base import Task

TASKS = {
    "lstm": "cs324dist.tasks.lstm.task:LSTMTask",
    "gan": "cs324dist.tasks.gan.task:GANTask",
}


def find_task(name: str) -> type[Task[Any]]:
    """The task called `name`: one of `TASKS`, or `path/to/file.py:Class`, or `package.module:Class`.

    The class may be left out where a file has one task. The code in the file or module runs. It can import
    what lies beside the file, or in the current folder. A `UserError` says why there is no such task.
    """
    path = TASKS.get(name, name)
    module_name, _, class_name = (f"{path}:" if path.endswith(".py") else path).rpartition(":")
    if not module_name:
        raise UserError(
            f"task {name!r} is unknown: give {', '.join(TASKS)}, path/file.py:Class, or package.module:Class"
        )
    file = Path(module_name) if module_name.endswith(".py") else None
    folder = str(file.resolve().parent if file else Path.cwd())
    if name not in TASKS and folder not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script
    try:
        module = _from_file(file) if file else importlib.import_module(module_name)
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(f"task {name!r} cannot be imported: {error}") from None
    there = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if not class_name and len(there) != 1:
        raise UserError(f"{module.__file__} has {len(there)} tasks: name one, {module.__file__}:CLASS")
    task = getattr(module, class_name or there[0], None)
    if task is None:
        found = ", ".join(there) or "none"
        raise UserError(f"{module_name} has no class {class_name!r:.99}; its tasks: {found}")
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"task {name!r} is not a subclass of cs324dist.Task")
    check_task(task)
    return task


def check_task(task: type[Task[Any]]) -> None:
    """Check that a task has a name, and presets with allowed values; a `UserError` says what is missing."""
    of = task.__name__
    if not isinstance(getattr(task, "name", None), str):
        raise UserError(f"{of} has no name: write name = {of.lower()!r} in the class")
    presets = getattr(task, "presets", None)
    if not isinstance(presets, Mapping) or not presets:
        raise UserError(f'{of} has no presets: write presets = {{"fast": YourConfig()}} in the class')
    for name, preset in presets.items():
        if not isinstance(preset, Config):
            raise UserError(f"{of}.presets[{name!r}] is a {type(preset).__name__}: give a cs324dist.Config")
        if "__dataclass_fields__" not in vars(type(preset)):
            raise UserError(
                f"{type(preset).__name__} lacks a decorator: write @dataclass(frozen=True) above it"
            )
        from_json(type(preset), as_json(preset), f"{of}.presets[{name!r}]")


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
