import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launched import holding
from torch import Tensor, nn

from cs324dist import Run
from cs324dist.errors import UserError
from cs324dist.runs.checkpoints import TrainerState, write_checkpoint
from cs324dist.runs.files import write_record
from cs324dist.runs.records import RunRecord
from cs324dist.runs.run_dir import RunDir
from cs324dist.runs.trained import find_network, load_network
from cs324dist.tasks.gan import sampling
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.sampling import latents, load_generator, surest
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


def test_latents_are_a_slice_of_the_seed_s_stream() -> None:
    stub = confident(torch.tanh)
    assert torch.equal(latents(stub, 0, 3), latents(stub, 0, 8)[:3])
    assert not torch.equal(latents(stub, 0, 3), latents(stub, 1, 3))


def write(checkpoint: Path, step: int, **networks: nn.Module) -> Path:
    write_checkpoint(checkpoint, holding(**networks), TrainerState(step))
    return checkpoint


def empty_run(path: Path, task: str, **config: object) -> RunDir:
    path.mkdir(exist_ok=True)
    write_record(path / "config.json", RunRecord(task, f"launch/{task}.py", config, {}))
    return RunDir(path)


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
            (
                {},
                r"run was trained without --keep-best \(in a loop of your own keep_best\): take its newest ",
            ),
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
    assert sampling.walk_ends(four_or_one)[2] == "from a 4 to a 1"
    assert sampling.walk_ends(confident(torch.tanh))[2] == "from one image to another"


def test_any_network_of_a_run_is_found_by_its_name(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run", "lstm")
    model = LSTM(1, 2, 3)
    write(run.checkpoint(1), 1, lstm=model, other=LSTM(1, 2, 4))
    loaded = load_network(run.path, "lstm", LSTM)
    assert loaded.config == {"input_size": 1, "hidden_size": 2, "classes": 3}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert load_network(run.path, "other", LSTM).config["classes"] == 4
    with pytest.raises(UserError, match="holds lstm, other, and no rnn: give a run of a task"):
        load_network(run.path, "rnn", LSTM)
    with pytest.raises(UserError, match="holds a model of class 'LSTM', expected 'Generator'"):
        load_network(run.path, "lstm", Generator)
