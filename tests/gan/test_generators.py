import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import cs324dist
from cs324dist import Run
from cs324dist.errors import UserError
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.files import write_record
from cs324dist.runs.run_dir import RunDir, RunRecord
from cs324dist.runs.trained import find_network, load_network
from cs324dist.tasks.gan import interpolation, sampling
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.sampling import find_generator, generate, latents, load_generator, surest
from cs324dist.tasks.lstm.networks import LSTM


class Stub(Generator):
    """Draws what `draw` makes of the latents' first numbers, and remembers the sizes of its batches."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.config = {"input_dim": 3}
        self.draw = draw
        self.batches: list[int] = []

    def forward(self, z: Tensor) -> Tensor:
        self.batches.append(len(z))
        return self.draw(z[:, 0])


@pytest.fixture
def four_or_one(mnist_root: Path) -> Stub:
    """Draws a real 4 where the latent's first number is positive, and a real 1 elsewhere."""
    images = to_unit_range(load_images("mnist", "test", mnist_root).images[:5])  # 7 2 1 0 4
    return Stub(lambda z: torch.where(z.view(-1, 1, 1, 1) > 0, images[4], images[2]))


@pytest.fixture
def fours_of_known_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the classifier one that finds 4s, as surely as the first pixel says."""

    def read(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.full((len(images),), 4), images[:, 0, 0, 0], torch.zeros(len(images), 128)

    monkeypatch.setattr(sampling, "read_digits", read)


def confident(confidence: Callable[[Tensor], Tensor]) -> Stub:
    return Stub(lambda z: confidence(z).view(-1, 1, 1, 1).expand(-1, 1, 28, 28))


class TestSurest:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_only_that_digit_is_found(self, four_or_one: Stub, seed: int) -> None:
        fours, ones = (surest(four_or_one, digit, 20, seed) for digit in (4, 1))
        assert fours.shape == ones.shape == (20, 3)
        assert (fours[:, 0] > 0).all()
        assert (ones[:, 0] < 0).all()
        assert len({tuple(z.tolist()) for z in torch.cat([fours, ones])}) == 40

    def test_a_digit_that_is_never_drawn_is_refused(self, four_or_one: Stub) -> None:
        with pytest.raises(UserError, match=r"^of 1000 samples, 0 are surely a 7 where 1 are needed"):
            surest(four_or_one, 7, 1, seed=0)

    def test_the_surest_of_a_thousand_come_first(self, fours_of_known_confidence: None) -> None:
        generator = confident(lambda z: 0.97 + 0.004 * z)
        candidates = latents(generator, 5, 1000).tolist()
        expected = sorted(candidates, key=lambda z: z[0], reverse=True)[:30]
        assert surest(generator, 4, 30, seed=5).tolist() == expected

    def test_the_doubtful_are_not_taken(self, fours_of_known_confidence: None) -> None:
        generator = confident(lambda z: torch.where(z > 2, 0.96, 0.94))
        sure = sum(z[0] > 2 for z in latents(generator, 5, 1000).tolist())
        assert len(surest(generator, 4, sure, seed=5)) == sure
        with pytest.raises(UserError, match=f"^of 1000 samples, {sure} are surely a 4 where {sure + 1} are"):
            surest(generator, 4, sure + 1, seed=5)

    def test_for_many_there_are_twenty_times_as_many_candidates(
        self, fours_of_known_confidence: None
    ) -> None:
        with pytest.raises(UserError, match=r"^of 1200 samples, 0 are surely a 4 where 60 are needed"):
            surest(confident(torch.zeros_like), 4, 60, seed=5)


def test_images_are_generated_in_order_a_few_at_a_time() -> None:
    stub = confident(torch.tanh)
    z = latents(stub, 0, 1201)
    assert torch.equal(generate(stub, z)[:, 0, 0, 0], z[:, 0].tanh())
    assert stub.batches == [500, 500, 201]


def test_latents_are_a_slice_of_the_seed_s_stream() -> None:
    stub = confident(torch.tanh)
    assert torch.equal(latents(stub, 0, 3), latents(stub, 0, 8)[:3])
    assert not torch.equal(latents(stub, 0, 3), latents(stub, 1, 3))


def write(checkpoint: Path, step: int, **networks: nn.Module) -> Path:
    trained = SimpleNamespace(
        networks=networks, optimizers={}, state_dict=dict, load_state_dict=lambda state: None
    )
    write_checkpoint(checkpoint, trained, TrainerState(step))
    return checkpoint


def empty_run(path: Path, task: str, **config: object) -> RunDir:
    """A run without checkpoints."""
    path.mkdir(exist_ok=True)
    write_record(path / "config.json", RunRecord(task, f"launch/{task}.py", config, {}))
    return RunDir(path)


class TestLoadGenerator:
    @staticmethod
    def run(path: Path) -> tuple[RunDir, Generator, Generator]:
        """A run whose newest checkpoint, of two, holds these raw and averaged generators."""
        torch.manual_seed(0)
        raw, averaged = Generator(7), Generator(7)
        run = empty_run(path, "gan")
        write(run.checkpoint(900), 900, generator=Generator(7))
        write(run.checkpoint(1000), 1000, generator=raw, generator_ema=averaged)
        return run, raw, averaged

    def test_the_newest_averaged_generator_is_read_ready_to_draw(self, tmp_path: Path) -> None:
        run, raw, averaged = self.run(tmp_path)
        z = torch.ones(1, 7)
        for path in (run.path, str(run.path), run.checkpoint(1000)):
            assert torch.equal(load_generator(path)(z), averaged.eval()(z))
        assert torch.equal(load_generator(run.path, weights="raw")(z), raw.eval()(z))
        assert torch.equal(cs324dist.load_generator(run.path, "raw")(z), raw(z))
        assert torch.equal(cs324dist.load_network(run.path, "generator", Generator)(z), raw(z))
        without_average = load_generator(run.checkpoint(900))
        assert not without_average.training
        assert not torch.equal(without_average(z), raw(z))

    def test_a_damaged_file_is_refused_and_named(self, tmp_path: Path) -> None:
        run, _, _ = self.run(tmp_path)
        file = run.checkpoint(1000) / "generator_ema" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^{file} is damaged"):
            load_generator(run.path)

    def test_what_holds_no_generator_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is neither a run nor a checkpoint"):
            load_generator(tmp_path / "nothing")
        run = empty_run(tmp_path / "run", "lstm")
        with pytest.raises(UserError, match="has no checkpoint yet"):
            load_generator(run.path)
        write(run.checkpoint(1), 1, lstm=LSTM(1, 2))
        with pytest.raises(UserError, match="holds no generator"):
            load_generator(run.path)


class TestBest:
    @staticmethod
    def run(path: Path, **config: object) -> tuple[RunDir, Generator]:
        """A run of two checkpoints, and the generator of the first, which is the better one."""
        generators = torch.nn.ModuleList(Generator(7) for _ in range(2))
        run = empty_run(path, "gan", **config)
        for step, generator, distance in ((900, generators[0], 3.0), (1000, generators[1], 4.0)):
            write(run.checkpoint(step), step, generator=generator)
            row = {"step": step, "eval/distance": distance, "eval/sure": 1 / distance}
            with (path / "metrics.jsonl").open("a") as file:
                file.write(f"{json.dumps(row)}\n")
        return run, generators[0].eval()

    @pytest.mark.parametrize("metric", ["eval/distance:min", "eval/sure"])
    def test_the_best_is_what_the_run_keeps_as_its_best(self, tmp_path: Path, metric: str) -> None:
        run, best = self.run(tmp_path / "run", keep_best=metric)
        z = torch.ones(1, 7)
        assert torch.equal(load_generator(run.path, best=True)(z), best(z))
        assert torch.equal(load_generator(str(run.path), "raw", best=True)(z), best(z))
        assert torch.equal(load_network(run.path, "generator", Generator, best=True)(z), best(z))
        assert not torch.equal(load_generator(run.path)(z), best(z))

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({}, "run was trained without --keep-best: train it with, such as --keep-best eval/accuracy"),
            ({"keep_best": ""}, "run was trained without --keep-best"),
            ({"keep_best": ["no word"]}, "^no checkpoint of .* has a value of"),
            ({"keep_best": "eval/other"}, "^no checkpoint of .* has a value of eval/other: train it until"),
        ],
    )
    def test_a_run_without_one_is_refused(self, tmp_path: Path, config: dict[str, object], said: str) -> None:
        run, _ = self.run(tmp_path / "run", **config)
        with pytest.raises(UserError, match=said):
            load_generator(run.path, best=True)

    def test_a_checkpoint_has_no_best(self, tmp_path: Path) -> None:
        run, _ = self.run(tmp_path / "run", keep_best="eval/sure")
        for path in (run.checkpoint(900), run.checkpoint(900) / "generator"):
            with pytest.raises(UserError, match="is no run, of which the best checkpoint can be taken"):
                load_generator(path, best=True)

    def test_a_loop_of_ones_own_has_one_too(self, tmp_path: Path) -> None:
        network = torch.nn.Linear(1, 1)
        optimizers = {"net": torch.optim.SGD(network.parameters(), 1.0)}
        with Run(
            tmp_path / "run", networks={"net": network}, optimizers=optimizers, keep_last=1,
            keep_best="score", accelerator=Accelerator(cpu=True),
        ) as run:  # fmt: skip
            for step in run.steps(4, save_every=1):
                network.bias.data.fill_(step)
                run.log(score=-abs(step - 1.0))
        found = find_network(tmp_path / "run", ("net",), best=True)
        assert found.parent.name == "000000002-1"


def test_only_a_generator_of_digits_walks_from_a_4_to_a_1(four_or_one: Stub) -> None:
    assert interpolation.walk_ends(four_or_one)[2] == "from a 4 to a 1"
    assert interpolation.walk_ends(confident(torch.tanh))[2] == "from one image to another"


@pytest.mark.parametrize("averaged", [True, False])
def test_the_averaged_weights_are_found_where_there_are_any(tmp_path: Path, averaged: bool) -> None:
    names = ["generator", "generator_ema"][: 1 + averaged]
    checkpoint = write(tmp_path / "000000001-1", 1, **{name: Generator(2) for name in names})
    assert find_generator(checkpoint, "averaged").name == names[-1]
    assert find_generator(checkpoint, "raw").name == "generator"


def test_any_network_of_a_run_is_found_by_its_name(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run", "lstm")
    model = LSTM(1, 2, 3)
    write(run.checkpoint(1), 1, lstm=model, other=LSTM(1, 2, 4))
    loaded = load_network(run.path, "lstm", LSTM)
    assert loaded.config == {"input_size": 1, "hidden_size": 2, "classes": 3}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert load_network(run.path, "other", LSTM).config["classes"] == 4
    with pytest.raises(UserError, match="holds no rnn: give a run of a task that trains one"):
        load_network(run.path, "rnn", LSTM)
    with pytest.raises(UserError, match="holds a model of class 'LSTM', expected 'Generator'"):
        load_network(run.path, "lstm", Generator)
