import json
import platform
import subprocess

import pytest
import torch

from cs324dist.config import as_json, from_json
from cs324dist.runs import environment as module
from cs324dist.runs.environment import Environment, environment, has_gpu, processor


@pytest.mark.parametrize(
    ("use_cpu", "expected"), [(None, True), ("False", True), ("True", False), ("1", False)]
)
def test_a_configuration_for_cpus_leaves_a_gpu_alone(monkeypatch, use_cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if use_cpu is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)  # as `accelerate launch` does
    assert has_gpu() == expected
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    found = environment()
    assert (found.device == "a GPU") == expected
    assert found.cuda == ("13.0, cuDNN 91002" if expected else None)


def test_it_says_what_bits_depend_on_and_comes_back_from_json():
    found = environment(4, "bf16", "inductor")
    assert (found.processes, found.precision, found.compiled) == (4, "bf16", "inductor")
    assert found.threads == torch.get_num_threads()
    assert found.packages["torch"] == torch.__version__
    assert found.python == platform.python_version()
    assert from_json(Environment, json.loads(json.dumps(as_json(found))), "owners/1.json") == found


@pytest.fixture
def git(tmp_path):

    def run(*arguments: str) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    run("init")
    return run


def test_the_commit_is_the_packages_own(monkeypatch, tmp_path, git):
    """A package that is installed inside a checkout of something else has none."""
    installed = tmp_path / "cs324dist" / "environment.py"
    installed.parent.mkdir()
    installed.touch()
    git("commit", "--allow-empty", "--message", "something else")
    monkeypatch.setattr(module, "__file__", str(installed))
    assert environment().commit is None
    git("add", ".")
    git("commit", "--message", "the package")
    assert environment().commit == git("rev-parse", "HEAD")
    for name in ("benchmarks/results/speed.json", "docs/results.md"):  # a stored measurement leaves it clean
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("measured")
        git("add", ".")
        assert environment().commit == git("rev-parse", "HEAD")
    installed.write_text("changed")
    assert environment().commit == git("rev-parse", "HEAD") + "-dirty"
    git("add", ".")
    assert environment().commit == git("rev-parse", "HEAD") + "-dirty"


def test_processors_of_one_name_with_and_without_amx_are_told_apart(monkeypatch):
    names = []
    for has_amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        names.append(processor())
    assert names[0] == names[1].removesuffix(")") + ", AMX)"
