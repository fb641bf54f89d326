"""With --micro-batches, only the speed depends on processes and threads; each mechanism is needed for it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from cs324dist.distributed import gradients
from cs324dist.distributed.exact_mean import ExactMean
from cs324dist.distributed.process import end_openmp_threads
from cs324dist.tasks.gan import GANTask
from cs324dist.trainer import Trainer

STEPS = Path(__file__).parents[1] / "exact_steps.py"


@pytest.fixture(scope="module")
def found(launch, tmp_path_factory):
    """Digests of all tasks by processes, threads, precision and planted fault; each is computed once."""
    folder, known = tmp_path_factory.mktemp("digests"), {}

    def take(processes: int, threads: int = 1, fault: str = "", precision: str = "no") -> dict[str, Any]:
        key = f"{processes}-{threads}-{fault}-{precision}"
        if key not in known:
            options = ("--nproc_per_node", str(processes))
            environment = {"CS324DIST_THREADS": str(threads), "ACCELERATE_MIXED_PRECISION": precision}
            command = (STEPS, folder / key, *([fault] if fault else []))
            if processes == 1:
                launch(*command, environment=environment)
            else:
                launch(*command, launcher="torchrun", options=options, environment=environment)
            known[key] = json.loads((folder / key).read_text())
        return known[key]

    return take


class TestSameBits:
    def test_on_one_process_of_two_threads_and_on_three(self, found):
        assert found(1, threads=2) == found(3)

    @pytest.mark.slow
    @pytest.mark.parametrize(("processes", "threads"), [(1, 1), (2, 1), (2, 2), (4, 1)])
    def test_on_other_numbers(self, found, processes, threads):
        assert found(processes, threads) == found(3)

    @pytest.mark.slow
    def test_in_bf16(self, found):
        assert found(1, 2, precision="bf16") == found(3, precision="bf16")
        assert found(3, precision="bf16") != found(3)


@pytest.mark.slow
class TestEachMechanismIsNeeded:
    def test_floating_point_sums_differ(self, found):
        one, three = found(1, fault="float_sums"), found(3, fault="float_sums")
        assert one["lstm"]["tensors"] != three["lstm"]["tensors"]

    def test_products_of_a_process_s_own_factors_differ(self, found):
        one, three = found(1, fault="products_by_process"), found(3, fault="products_by_process")
        assert one["gan"]["tensors"] != three["gan"]["tensors"]
        assert one["lstm"]["tensors"] == three["lstm"]["tensors"]  # which has no wide layer

    def test_batch_norm_per_process_differs(self, found):
        one, three = found(1, fault="batch_norm_per_process"), found(3, fault="batch_norm_per_process")
        assert one["gan"]["tensors"] != three["gan"]["tensors"]

    def test_a_norm_added_up_by_threads_differs(self, found):
        one, two = found(1, 1, "norm_by_threads"), found(1, 2, "norm_by_threads")
        assert one["gan"]["tensors"] != two["gan"]["tensors"]

    def test_metrics_averaged_by_process_differ(self, found):
        one, three = found(1, fault="metrics_by_process"), found(3, fault="metrics_by_process")
        assert one["lstm"]["metrics"] != three["lstm"]["metrics"]
        assert one["lstm"]["tensors"] == three["lstm"]["tensors"]

    def test_an_evaluation_cut_by_process_differs(self, found):
        one, three = found(1, fault="evaluation_by_process"), found(3, fault="evaluation_by_process")
        assert one["gan"]["evaluation"] != three["gan"]["evaluation"]
        assert one["gan"]["tensors"] == three["gan"]["tensors"]


def test_what_is_only_measured_spans_the_batch_too():
    """BatchNorm in a loss that trains nothing spans all micro-batches, as in one that trains."""
    config = replace(GANTask.presets["smoke"], dataset="fake", batch_size=16, micro_batches=4)
    cores = torch.get_num_threads()
    trainer = Trainer(task := GANTask(config, torch.device("cpu")), Accelerator(cpu=True))
    found = []
    loss = task.generator_loss
    for step in (lambda: trainer.measure(loss), lambda: trainer.update("generator", loss)):
        task.step = lambda *_, step=step: step()
        trainer.step(0, is_logged=True)
        found.append(trainer.read_metrics())
    torch.set_num_threads(cores)
    assert found[0] == found[1]


def test_networks_of_two_updates_are_wrapped_for_ddp_once(monkeypatch):
    wrapped = []
    monkeypatch.setattr(gradients, "_wrapped", lambda losses, place: wrapped.append(losses) or losses)
    two = Mock(spec=Accelerator, scaler=None, device=torch.device("cpu"), num_processes=2)
    networks = (torch.nn.Linear(1, 1),)
    gradients.DDPGradients([networks, networks], two)
    assert len(wrapped) == 1


def test_threads_of_torch_leave_the_cores_to_the_micro_batches():
    """They would wait in a busy loop for their next work; a step of the LSTM took half as long again."""
    cores, process = torch.get_num_threads(), psutil.Process()
    torch.set_num_threads(3)
    exact = gradients.ExactGradients([], 2, 2, Accelerator(cpu=True), meet=False)
    end_openmp_threads()  # of earlier tests
    before = process.num_threads()
    with exact.all_cores():
        torch.ones(1 << 20).exp()
        inside = process.num_threads()
    after = process.num_threads()
    torch.set_num_threads(cores)
    assert (inside, after) == (before + 2, before)


def values(exponent: int) -> st.SearchStrategy[float]:
    """float32 values up to 2^exponent, of very different sizes."""
    fraction = st.floats(-1, 1, width=32)
    return st.builds(
        lambda f, e: torch.tensor(f * 2.0 ** (exponent - e)).item(), fraction, st.integers(0, 40)
    )


class TestExactMean:
    @given(st.data(), st.integers(-100, 100), st.integers(1, 9))
    def test_it_is_close_to_the_exact_mean(self, data, exponent, count):
        rows = data.draw(
            st.lists(st.lists(values(exponent), min_size=3, max_size=3), min_size=count, max_size=count)
        )
        (mean,) = ExactMean(count)([[torch.tensor(row)] for row in rows], [torch.zeros(3)])
        assert mean is not None
        largest = max(abs(value) for row in rows for value in row)
        for k in range(3):
            exact = math.fsum(row[k] for row in rows) / count
            unit = max(2.0**-149, 2.0 ** (math.frexp(exact)[1] - 24))
            assert abs(mean[k].item() - exact) <= max(unit, largest * 2.0**-56, 2.0**-126 * (exact != 0))

    @given(st.permutations(range(6)), st.integers(0, 2**31))
    def test_the_order_does_not_matter(self, order, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = [[torch.randn(1000, generator=generator)] for _ in range(6)]
        parameters = [torch.zeros(1000)]
        (one,), (other,) = (ExactMean(6)([rows[k] for k in some], parameters) for some in (range(6), order))
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)

    def test_the_largest_numbers_do_not_overflow(self):
        largest = torch.finfo(torch.float32).max
        for count in (1, 2, 3, 64):
            rows = [[torch.full((2,), largest)] for _ in range(count)]
            (mean,) = ExactMean(count)(rows, [torch.zeros(2)])
            assert mean is not None
            assert mean.tolist() == [largest, largest]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_seen(self, bad):
        rows = [[torch.tensor([1.0, bad]), torch.ones(1)], [torch.ones(2), torch.ones(1)]]
        first, second = ExactMean(2)(rows, [torch.zeros(2), torch.zeros(1)])
        assert first is not None
        assert second is not None
        assert first.isnan().all()
        assert second.tolist() == [1.0]

    def test_a_parameter_that_no_loss_uses_has_no_gradient(self):
        rows = [[None, None], [torch.ones(2), None]]
        used, unused = ExactMean(2)(rows, [torch.zeros(2), torch.zeros(3)])
        assert used is not None
        assert used.tolist() == [0.5, 0.5]
        assert unused is None

    def test_the_memory_format_is_the_parameters(self):
        parameter = torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)
        rows = [[torch.randn(4, 3, 5, 5)] for _ in range(2)]
        (mean,) = ExactMean(2)(rows, [parameter])
        assert mean is not None
        assert mean.stride() == parameter.stride()
        torch.testing.assert_close(mean, (rows[0][0] + rows[1][0]) / 2)
