"""How a task of one's own is named on a command line."""

import pytest

from cs324dist.errors import UserError
from cs324dist.tasks import find_task

TASK = """
from cs324dist import Config, Task
class {name}(Task):
    name = "{name}"
    presets = {{"fast": Config()}}
"""


def test_a_file_with_one_task_needs_no_class(tmp_path):
    file = tmp_path / "with_one.py"
    file.write_text(TASK.format(name="Mine") + "from cs324dist.tasks.lstm.task import LSTMTask\n")
    assert find_task(str(file)).name == find_task(f"{file}:Mine").name == "Mine"


@pytest.mark.parametrize("count", [0, 2])
def test_otherwise_one_line_says_how_many_there_are(tmp_path, count):
    file = tmp_path / f"with_{count}.py"
    file.write_text("".join(TASK.format(name=f"Task{number}") for number in range(count)))
    with pytest.raises(UserError) as refused:
        find_task(str(file))
    assert refused.value.lines == (f"{file} has {count} tasks: name one, {file}:CLASS",)
