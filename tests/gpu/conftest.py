"""Fixtures of the tests without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.version.cuda or sys.platform != "linux":
        pytest.skip("this torch has a CUDA of its own, or is not Linux's: a CPU build is needed")
    if COMPILER is None:
        pytest.skip("no C++ compiler: install one, as c++ or in CXX")
    library, torch_folder = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
    options += [f"-Wl,-rpath,{torch_folder}/lib", Path(__file__).with_name("guard.cpp"), "-o", library]
    subprocess.run([COMPILER, *options, "-lc10", "-ltorch_cpu"], check=True)
    return library
