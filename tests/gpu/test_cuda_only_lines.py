"""Of the lines that only a process with a GPU runs, 95 % at least are run by tests without one."""

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from coverage import CoverageData

HERE, REPOSITORY = Path(__file__).parent, Path(__file__).parents[2]
ON_A_GPU = {"cuda", "is_cuda", "gpu", "on_gpu", "in_bf16", "scaler", "_scaler"}  # fp16's scaler needs one
ELSEWHERE = ("on_cpu", "not on_gpu")  # conditions of the others
CASES = (("fp16", "gan", "lstm course"), ("bf16", "lstm"), ("no", "gan exact"))
TESTS = (
    "tests/gpu/test_process.py",
    "tests/training/test_loss_scale.py",
    "tests/training/test_throughput.py",
)
SETTINGS = "[run]\nsource_pkgs = cs324dist\npatch = _exit\nparallel = true\ndata_file = {}/lines\n"


def branches(tree: ast.AST) -> Iterator[ast.AST]:
    """What is run under a condition on the device, or for each of what there is on a GPU only."""
    for node in ast.walk(tree):
        condition = node.iter if isinstance(node, ast.For) else getattr(node, "test", None)
        if condition is None or isinstance(node, ast.Assert):
            continue
        named = {getattr(n, "id", getattr(n, "attr", getattr(n, "value", ""))) for n in ast.walk(condition)}
        if ast.unparse(condition).startswith(ELSEWHERE):
            taken = node.orelse
        elif {name for name in named if isinstance(name, str)} & ON_A_GPU:
            taken = node.body
        else:
            continue
        yield from taken if isinstance(taken, list) else [taken]


def calls(tree: ast.AST) -> Counter[str]:
    return Counter(ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def cuda_only() -> dict[tuple[str, int], str]:
    """The lines of those branches, and of functions that are called there and nowhere else."""
    paths = sorted((REPOSITORY / "cs324dist").rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in paths}
    everywhere = sum(map(calls, trees.values()), Counter())
    there = sum((calls(branch) for tree in trees.values() for branch in branches(tree)), Counter())
    found = {}
    for path, tree in trees.items():
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        only_there = [node for node in functions if 0 < there[node.name] == everywhere[node.name]]
        parts = [*branches(tree), *(statement for node in only_there for statement in node.body[1:])]
        lines = path.read_text().splitlines()
        for part in parts:
            for node in ast.walk(part):
                if node is part or isinstance(node, ast.stmt):
                    found[str(path), node.lineno] = lines[node.lineno - 1].strip()
    return found


@pytest.mark.slow
def test_lines_for_a_gpu_are_run_without_one(guard: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text(SETTINGS.format(tmp_path))
    measured = [sys.executable, "-m", "coverage", "run", "--rcfile", settings]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    for command in (
        *([HERE / "fake_cuda.py", guard, *case] for case in CASES),
        ["-m", "pytest", "-p", "no:cacheprovider", *TESTS],
    ):
        subprocess.run([*measured, *command], cwd=REPOSITORY, env=environment, check=True)
    run = set()
    for file in tmp_path.glob("lines.*"):
        data = CoverageData(file)
        data.read()
        run |= {(path, line) for path in data.measured_files() for line in data.lines(path) or ()}
    lines = cuda_only()
    missed = {line: text for line, text in lines.items() if line not in run}
    assert len(lines) > 20  # they are found
    assert len(missed) <= 0.05 * len(lines), missed
