"""What exact gradients refuse: the work of others on the same networks, which would be lost or come twice."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.optim.optimizer import register_optimizer_step_post_hook

from cs324dist.errors import UserError, in_words

STEPS = Counter[str]()
"""How many steps the optimizers of torch have "taken"."""
register_optimizer_step_post_hook(lambda *_: STEPS.update(["taken"]))

Given = Mapping[Tensor, tuple[Tensor, int, int]]
"""By parameter: the gradient that it was given last, the parameter's version then, and the steps so far."""


def refuse_what_is_prepared(
    accelerator: Accelerator, network: nn.Module | None = None, *, is_known: bool = False
) -> None:
    """Refuse what Accelerate would reduce, share out or step by itself.

    Raises:
        UserError: naming it.
    """
    models, loaders, schedulers = (
        getattr(accelerator, name, ()) for name in ("_models", "_dataloaders", "_schedulers")
    )
    if network is not None and not is_known and any(network is model for model in models):
        raise UserError(
            f"{type(network).__name__} went through accelerator.prepare, which would add gradients with "
            f"DDP: give it to ExactGradients.prepare only"
        )
    if (steps := getattr(accelerator, "gradient_accumulation_steps", 1)) > 1:
        raise UserError(
            f"the Accelerator has gradient_accumulation_steps={steps}, which would change nothing: leave it "
            f"out; micro_batches cuts the batch of a step into parts"
        )
    if schedulers:
        raise UserError(
            "accelerator.prepare was given a scheduler, which it would step once for each process: leave "
            "the scheduler as it is, and call its step() once a step"
        )
    if loaders:
        raise UserError(
            "accelerator.prepare was given a DataLoader, of which each process would see a share: give "
            "it to cs324dist.loader, and take loader.batch(part) in the loss"
        )


def refuse_other_draws(drawn: Iterable[float]) -> None:
    """Refuse that processes have drawn different random numbers; see `drawn_so_far`.

    Raises:
        UserError: they have.
    """
    if len(set(drawn)) > 1:
        raise UserError(
            "before a backward pass, one process drew random numbers that others did not, and what they draw "
            "for the whole batch would differ: draw on every process, and save or print on one"
        )


def refuse_gradients_of_others(names: Sequence[str], parameters: Sequence[Tensor], given: Given) -> None:
    """Refuse, before gradients are made, those that would be lost; clear those that were used.

    Raises:
        UserError: naming the parameter.
    """
    unused = []
    for name, parameter in zip(names, parameters, strict=True):
        gradient, version, steps = given.get(parameter, (None, 0, 0))
        if parameter.grad is not None and parameter.grad is not gradient:
            raise UserError(
                f"{name} has a gradient before the update, which would be lost: leave backward() to the "
                f"update, and set .grad to None after a step of your own"
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UserError(
                f"{name} has a post-accumulate hook, which would see the gradient of a part: change the "
                f"gradient by register_hook, or after the update"
            )
        if parameter.grad is not None:
            # Some optimizers do not change the version, and `p -= rate * p.grad` calls none.
            is_same = parameter._version == version and STEPS["taken"] == steps
            unused.append((name, parameter.grad, is_same))
        parameter.grad = None
    if unused and all(same for *_, same in unused) and any(gradient.any() for _, gradient, _ in unused):
        raise UserError(
            f"the last gradient of {unused[0][0]} was used by no optimizer, and would be lost: call "
            f"optimizer.step() after backward; to add up losses, do it in one function"
        )


def refuse_gradients_of_the_loss(
    names: Sequence[str], parameters: Sequence[Tensor], found: Sequence[Tensor | None]
) -> None:
    """Refuse a loss that leaves gradients itself, and gradients that cannot be added in slices.

    Raises:
        UserError: naming the parameter.
    """
    for name, parameter, gradient in zip(names, parameters, found, strict=True):
        if parameter.grad is not None:
            raise UserError(f"the loss calls backward(), which leaves a gradient in {name}: return the loss")
        if gradient is not None and gradient.is_sparse:
            raise UserError(f"the gradient of {name} is sparse: give its embedding sparse=False")


EXPLAINED = {
    "differentiated Tensors does not require grad": "the loss asks for the gradient of a frozen parameter, "
    "such as a bias directly before BatchNorm, which cancels it: ask for those with requires_grad",
    "through the graph a second time": "the loss differentiates a graph that is gone, its own "
    "(retain_graph=True keeps it) or that of another part of the batch, which a global dict or "
    "parametrize.cached has kept: detach it, or keep it on the task or a module",
    "created in a thread": "with BatchNorm, each part of the batch has a thread: open what belongs to one "
    "thread in each, or let others use it (sqlite3.connect(…, check_same_thread=False))",
}


@contextmanager
def known_errors_explained() -> Iterator[None]:
    """Turn errors that the parts of a batch bring about into lines that say so."""
    try:
        yield
    except Exception as error:
        for text, why in EXPLAINED.items():
            if text in str(error):
                raise UserError(f"{why} [{in_words(error):.150}]") from error
        raise


INCOMPLETE = {
    "CheckpointFunctionBackward": "torch.utils.checkpoint(use_reentrant=True), whose parameters get no "
    "gradient here: give it use_reentrant=False",
    "torch::autograd::Error": "the gradient of a function that is once_differentiable, whose own gradient "
    "would be left out: write its backward without that decorator",
}
"""What autograd.grad leaves out in silence where nothing behind it is trained, by its name in a graph."""


def refuse_incomplete_graphs(value: Tensor) -> None:
    """Refuse a loss of which autograd.grad would find a part of the gradient only.

    Raises:
        UserError: naming what is in the way.
    """
    seen: set[Node] = set()
    found = [value.grad_fn]
    while found:
        if (node := found.pop()) is not None and node not in seen:
            seen.add(node)
            found += [following for following, _ in node.next_functions]
            if why := INCOMPLETE.get(node.name()):
                raise UserError(f"the loss depends on {why}")
