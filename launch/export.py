"""Write a trained network as the Hugging Face Hub has models: weights, arguments, a model card.

python launch/export.py runs/gan-fast-0 --out digits --push user/digits
"""

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token
from torch import nn

from cs324dist.command_line import parse
from cs324dist.config import POSITIONAL
from cs324dist.errors import UserError, errors_as_exit_codes
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.models.gan import Generator
from cs324dist.models.lstm import LSTM
from cs324dist.models.rnn import RNN
from cs324dist.report.provenance import command, settings
from cs324dist.report.reading import plain, read_run
from cs324dist.runs.checkpoints import WEIGHTS, read_state
from cs324dist.runs.files import clear, read_json, sync
from cs324dist.runs.models import load_model
from cs324dist.runs.trained import find_checkpoint, find_network, run_of
from cs324dist.sampling.generators import generate, latents
from cs324dist.sampling.grids import grid, save_png

DATA = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist", "lstm": "palindromes"}
KINDS = {"gan": "unconditional-image-generation", "classifier": "image-classification"}
OURS: dict[str, type[nn.Module]] = {
    model.__name__: model for model in (Generator, LSTM, RNN, DigitClassifier)
}


@dataclass(frozen=True)
class Export:
    """What to export."""

    run: Annotated[Path, POSITIONAL]
    """A run folder (its newest checkpoint is taken), or a checkpoint."""

    out: Path = Path("model")
    """Folder to write, new or empty."""

    network: str = ""
    """Which network. Without it: the averaged generator of a GAN, or the only network that there is."""

    license: str = "mit"
    """The model's licence, as the Hub calls it."""

    push: str = ""
    """Repository on the Hub, such as user/digits, to upload it to as well; made if there is none."""


def write(options: Export, folder: Path) -> None:
    """Write the files of the network."""
    checkpoint = find_checkpoint(options.run)
    names = sorted({Path(name).parts[0] for name in read_state(checkpoint).sha256 if "/" in name})
    usual = ["generator_ema", "generator", *names[: len(names) == 1]]
    wanted = [name for name in ([options.network] if options.network else usual) if name in names]
    if not wanted:
        raise UserError(f"{checkpoint} holds {', '.join(names)}: give one of these as --network")
    found = find_network(checkpoint, wanted)
    for name in ("config.json", WEIGHTS):
        shutil.copyfile(found / name, folder / name)
    network = built_in(folder)
    if isinstance(network, Generator):
        save_png(grid(generate(network, latents(network, 0, 64)), 8), folder / "grid.png")
    (folder / "README.md").write_text(card(options, found, network))


def built_in(folder: Path) -> nn.Module | None:
    """The network in a folder; None if its class is not the project's, whatever its name."""
    try:
        return load_model(folder, OURS[plain(read_json(folder / "config.json").get("class"))])
    except (KeyError, UserError):
        return None


def card(options: Export, found: Path, network: nn.Module | None) -> str:
    """The model card: what the run says of this checkpoint."""
    run, step = read_run(run_of(options.run).path, ""), read_state(found.parent).step
    name = options.out.absolute().name
    data = run.setting("dataset") if "dataset" in run.record.config else DATA.get(run.task, run.task)
    kind, on = KINDS.get(run.task, "other"), DATA.get(data, data)
    values = {name: values.get(step) for name, values in run.metrics.items() if name.startswith("eval/")}
    metrics = [(name.removeprefix("eval/"), value) for name, value in values.items() if value is not None]
    front = ModelCardData(
        license=options.license,
        library_name="cs324dist",
        tags=["cs324dist", run.task],
        datasets=on if "/" in on else None,
        pipeline_tag=KINDS.get(run.task),
        model_name=name,
        eval_results=[EvalResult(kind, on, data, *metric) for metric in metrics] or None,
    )
    measured = "\n".join(f"    {name} {value:.6g}" for name, value in metrics)
    recipe = "\n".join(f"    {option} {value}".rstrip() for option, value, _ in settings(run))
    return f"""---
{front.to_yaml()}
---

# {name}

Network `{found.name}` of task `{run.task}`, after {step} steps. Data: {data}. Licence: {options.license}.
{"![Samples](grid.png)" * isinstance(network, Generator)}

```python
{usage(found, network, options.push or f"USER/{name}", name)}
```

The evaluation at this step:

{measured or "    none"}

The command that repeats the run, and all its options:

    {command(run) or "(its config.json holds none that can be shown)"}

{recipe}
"""


def usage(found: Path, network: nn.Module | None, repository: str, name: str) -> str:
    """The lines that load the network."""
    arguments = read_json(found / "config.json")
    model = plain(arguments.pop("class", None))
    if network or arguments:
        place = type(network).__module__ if network else "your_own_file"
        imports = ["from cs324dist import load_model", f"from {place} import {model}"]
        loaded = [f"network = load_model(folder, {model})  # in eval mode, on the CPU"]
    else:  # nothing says the arguments of its constructor
        imports = ["from safetensors.torch import load_file"]
        loaded = [
            f"network = ...  # the {model} that the task makes",
            f'network.load_state_dict(load_file(f"{{folder}}/{WEIGHTS}"))',
            "network.eval()",
        ]
    imports.insert(1, "from huggingface_hub import snapshot_download")
    download = f'folder = snapshot_download("{repository}", local_dir="{name}")'
    return "\n".join([*imports, "", download, *loaded])


def push(folder: Path, repository: str) -> None:
    """Upload it; whatever goes wrong with that, the folder is there."""
    try:
        HfApi().create_repo(repository, exist_ok=True)
        print(HfApi().upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # of the name, the login, the network: the client raises a great many
        why = str(error).partition("\n")[0]
        raise UserError(
            f"--push {repository} failed ({why}); to try again: hf upload {repository} {folder}"
        ) from None


if __name__ == "__main__":
    with errors_as_exit_codes():
        options = parse(Export, __doc__)
        out = options.out.absolute()
        if options.push and not get_token():
            raise UserError("--push needs a login: run `hf auth login`, or set HF_TOKEN")
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise UserError(f"--out {options.out} is there already: give an empty or a new folder")
        temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.mkdir()
            write(options, temporary)
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            temporary.rename(out)
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written: {error.strerror}") from None
        finally:
            clear(temporary)
        print(options.out)
        if options.push:
            push(out, options.push)
