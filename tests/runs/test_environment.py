import pytest
import torch

from cs324dist.runs.environment import environment, has_gpu


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
    assert (environment()["device"] == "a GPU") == expected
