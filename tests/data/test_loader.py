"""Data from workers: the same whoever loads it, exact in the middle of an epoch, and stopped in order."""

import errno
import os
import signal

import numpy as np
import psutil
import pytest
import torch
from chaos import content_of
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import Launched, files_of, newest_checkpoint, status
from loading import Rows
from ranks import as_ranks
from torch.utils.data import IterableDataset, TensorDataset

from cs324dist import MicroBatch, ShuffledEpochs, UserError, loader
from cs324dist.data.streams import CPU
from cs324dist.distributed.failures import translate_errors
from cs324dist.distributed.parts import Parts
from cs324dist.errors import RunFailed
from cs324dist.runs.history import step_of

LOADING = ("tests/data/loading.py", "--checkpoint-every", "5")


def rows_of(loading, step, index=0, count=2):
    rows, labels = loading.batch(MicroBatch(step, 8, index, count))
    assert torch.equal(labels, rows[:, 0].long() % 2)
    return rows


@pytest.fixture(scope="module")
def loads():
    """By number of workers."""
    loads = {workers: loader(Rows(), 3, "rows", workers=workers) for workers in (0, 1, 2)}
    yield loads
    loads.clear()  # or their workers would be waited for at the end


class TestSamples:
    def test_the_order_is_that_of_shuffled_epochs(self, loads):
        for step in range(4):  # the second epoch begins within step 2
            for index in range(2):
                expected = ShuffledEpochs(3, "rows", 20).items(MicroBatch(step, 8, index, 2))
                assert torch.equal(rows_of(loads[2], step, index)[:, 0].long(), expected)

    @given(steps=st.lists(st.integers(0, 30), min_size=1, max_size=6), count=st.sampled_from([1, 2, 4]))
    @settings(max_examples=20)
    def test_from_any_step_and_any_number_of_workers_they_are_the_same(self, loads, steps, count):
        for step in steps:
            found = [
                torch.cat([rows_of(loading, step, index, count) for index in range(count)])
                for loading in loads.values()
            ]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])

    def test_each_epoch_augments_anew_and_each_seed_differs(self, loads):
        rows = torch.cat([rows_of(loads[0], step, count=1) for step in range(5)])
        assert rows[:, 0].unique(return_counts=True)[1].tolist() == [2] * 20
        for generator in (1, 2, 3):
            assert len(rows[:, generator].unique()) == 40
        other = loader(Rows(), 4, "rows").batch(MicroBatch(0, 8))[0]
        assert not set(other[:, 1].tolist()) & set(rows[:, 1].tolist())

    def test_the_generators_of_the_process_stay_as_they_were(self, loads):
        # Not checked of `random`: beartype, which checks shapes in these tests, draws from it.
        for loading in loads.values():
            for step in (7, 8, 20):  # 20 starts the workers over
                before = torch.get_rng_state(), np.random.get_state()[1]
                rows_of(loading, step)
                assert torch.equal(before[0], torch.get_rng_state())
                assert (before[1] == np.random.get_state()[1]).all()

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("processes", [1, 3])
    def test_a_process_loads_its_own_parts_in_any_order_and_no_others(self, processes, workers):
        whole, dataset = loader(Rows(), 3, "rows"), Rows()

        def find(rank):
            loading, own = loader(dataset, 3, "rows", workers=workers), range(rank, 4, processes)
            return {
                (step, index): rows_of(loading, step, index, 4)
                for step in (10, 11, 12, 3)  # and start over
                for index in reversed(own)
            }

        for found in as_ranks(processes, lambda rank: find(rank.process_index)):
            for (step, index), rows in found.items():
                assert torch.equal(rows, rows_of(whole, step, index, 4))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_in_a_check_a_part_of_another_process_is_loaded(self, loads, workers):
        expected = [rows_of(loads[2], 5, index, 4) for index in range(4)]

        def check(rank):
            parts, loading = Parts(4, CPU), loader(Rows(), 3, "rows", workers=workers)
            rows_of(loading, 4, rank.process_index, 4)  # the next step is loaded ahead
            for is_check in (True, False):
                for index in parts.of(1 if is_check else 0):
                    rows, _ = loading.batch(MicroBatch(5, 8, index, 4, is_check=is_check))
                    assert torch.equal(rows, expected[index])

        as_ranks(3, check)

    def test_items_are_loaded_for_evaluations(self, loads):
        items = torch.tensor([4, 4, 19])
        found = [loading.items(items)[0] for loading in loads.values()]
        assert found[0][:, 0].tolist() == [4, 4, 19]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0][0], found[0][1])


class Table:
    """As far as it is used, a data set of Hugging Face: no class of torch, and its samples are dicts."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, item: int) -> dict[str, object]:
        if type(item) is not int:
            raise TypeError(f"{item!r} is no index of a sample")
        return {"text": "abcdef"[item], "label": item % 2, "tokens": torch.full((3,), item)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_dicts_that_is_none_of_torch(workers):
    step = MicroBatch(4, 3, 0, 1)
    batch = loader(Table(), 3, "table", workers=workers).batch(step)
    items = ShuffledEpochs(3, "table", 6).items(step).tolist()
    assert batch["text"] == ["abcdef"[item] for item in items]
    assert batch["label"].tolist() == [item % 2 for item in items]
    assert batch["tokens"].tolist() == [[item] * 3 for item in items]


class TestBadData:
    def test_a_data_set_that_is_empty_or_has_no_items_is_refused(self):
        with pytest.raises(UserError, match="the data set of 'rows' is empty"):
            loader(TensorDataset(torch.empty(0)), 0, "rows")
        with pytest.raises(UserError, match=r"'rows' needs len\(dataset\) and dataset\[item\]"):
            loader(type("Rows", (IterableDataset,), {"__iter__": iter})(), 0, "rows")
        with pytest.raises(UserError, match=r"'rows' needs len\(dataset\) and dataset\[item\]"):
            loader(
                type("Rows", (IterableDataset,), {"__iter__": iter, "__len__": lambda self: 3})(), 0, "rows"
            )

    @pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
    def test_an_error_for_the_user_is_one_line(self, launch, tmp_path, workers):
        command = (*LOADING, "--run-dir", tmp_path / "run", "--workers", workers, "--bad-item", "3")
        done = launch(*command, check=False)
        assert done.returncode == 2
        assert [line for line in done.stderr.splitlines() if "step" not in line] == [
            "error: row 3 cannot be read: mend it"
        ]

    def test_another_error_names_the_item(self):
        class Broken(Rows):
            def __getitem__(self, item):
                raise ZeroDivisionError

        for workers in (0, 1):
            with pytest.raises(ZeroDivisionError) as raised:
                loader(Broken(), 0, "rows", workers=workers).batch(MicroBatch(0, 1))
            said = [*getattr(raised.value, "__notes__", []), str(raised.value)]
            assert any("of the data set of 'rows'" in text for text in said)


@pytest.fixture(scope="module")
def never_stopped(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("loading") / "run"
    launch(*LOADING, "--run-dir", run)
    return run


class TestRuns:
    def test_workers_do_not_change_a_bit(self, launch, never_stopped, tmp_path):
        launch(*LOADING, "--workers", "0", "--run-dir", tmp_path / "run")
        ends = [files_of(newest_checkpoint(run)) for run in (tmp_path / "run", never_stopped)]
        for end in ends:
            del end["trainer.json"]
        assert ends[0] == ends[1]

    @pytest.mark.parametrize(
        "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["TERM", "INT"]
    )
    def test_a_signal_to_all_processes_leaves_a_checkpoint(self, launch_environment, tmp_path, number):
        command = (*LOADING, "--steps", "100000", "--checkpoint-every", "100000")
        with Launched(command, tmp_path / "run", launch_environment) as started:
            started.wait_for_line("step 10/")
            own = psutil.Process(started.process.pid)
            workers = own.children()
            for process in (*workers, own):  # as Slurm does
                process.send_signal(number)
            assert started.end() == 75
        assert len(workers) == 2
        assert status(tmp_path / "run")["state"] == "stopped"
        assert step_of(newest_checkpoint(tmp_path / "run")) >= 10

    @pytest.mark.slow
    def test_no_worker_outlives_its_process(self, launch, launch_environment, never_stopped, tmp_path):
        run = tmp_path / "run"
        with Launched(LOADING, run, launch_environment) as started:
            started.wait_for_line("step 6/")
            started.send_signal(signal.SIGKILL)
            assert started.end() == -signal.SIGKILL
        launch(*LOADING, "--run-dir", run)
        assert content_of(run) == content_of(never_stopped)

    @pytest.mark.slow
    def test_a_worker_that_is_killed_ends_the_run_in_one_line(self, launch_environment, tmp_path):
        run = tmp_path / "run"
        command = (*LOADING, "--steps", "100000")
        with Launched(command, run, launch_environment) as started:
            started.wait_for_line("step 10/")
            os.kill(psutil.Process(started.process.pid).children()[0].pid, signal.SIGKILL)
            assert started.end() == 1
        (line,) = [line for line in started.said.splitlines() if not line.startswith(("step", str(run)))]
        assert line.startswith("error: a worker that loads data was killed")
        assert status(run)["state"] == "failed"

    def test_a_pipe_that_its_worker_left_is_said_to_be_that(self):
        with pytest.raises(RunFailed, match=r"^a worker that loads data was killed"), translate_errors(1):
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_memory_is_pinned_in_runs_that_use_cuda_alone(monkeypatch):
    """torch.cuda.set_device starts CUDA (torch 2.13, csrc/cuda/Module.cpp, THCPModule_setDevice_wrap)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        assert loader([0.5], 0, "tests")._loader.pin_memory == in_use
