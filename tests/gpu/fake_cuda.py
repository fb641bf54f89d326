"""Takes steps of every task on a CUDA device that is not there: devices, waits and strides, but no numbers.

    SHAPES=FOLDER python tests/gpu/fake_cuda.py LIBRARY no|bf16|fp16|faults [CASE ...]

Tensors are torch's fake ones, on `cuda:0`. With WORLD_SIZE in the environment, this is the first of so many
processes, and its backend sends nothing. It prints a JSON object: what is wrong in each case;
SHAPES is where examples/shapes.py has drawn; LIBRARY is guard.cpp, compiled: what torch without CUDA lacks.
"""

import ctypes
import json
import os
import sys
import tempfile
import traceback
import types
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).parents[2]
_, LIBRARY, PRECISION, *WANTED = sys.argv
os.environ.update(CS324DIST_THREADS="1", ACCELERATE_MIXED_PRECISION=PRECISION.replace("faults", "no"))
ctypes.CDLL(LIBRARY, ctypes.RTLD_GLOBAL)  # before torch, which asks once whether there is CUDA
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from cs324dist.data.loader import _Samples  # noqa: E402
from cs324dist.data.streams import MicroBatch, ShuffledEpochs, Stream  # noqa: E402
from cs324dist.distributed import parts  # noqa: E402
from cs324dist.distributed.process import start_accelerator  # noqa: E402
from cs324dist.runs import checkpoints, models, optimizers  # noqa: E402
from cs324dist.runs.checkpoints import read_checkpoint  # noqa: E402
from cs324dist.runs.environment import environment  # noqa: E402
from cs324dist.runs.hidden_state import HiddenState  # noqa: E402
from cs324dist.tasks import find_task  # noqa: E402
from cs324dist.tasks.gan import statistics  # noqa: E402
from cs324dist.tasks.gan import task as gan  # noqa: E402
from cs324dist.tasks.gan.images import LabelledImages  # noqa: E402
from cs324dist.tasks.lstm import palindromes  # noqa: E402
from cs324dist.tasks.lstm import task as lstm  # noqa: E402
from cs324dist.tasks.lstm.networks import LSTM  # noqa: E402
from cs324dist.trainer import Trainer  # noqa: E402

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
# Without a deterministic kernel (torch 2.13, __init__.py:1436, of `use_deterministic_algorithms`).
NOT_DETERMINISTIC = {
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward"),
    *("reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "nll_loss2d_backward"),
    *("_ctc_loss_backward", "_embedding_bag_dense_backward", "put_", "histc", "kthvalue"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
}
EXAMPLES = REPOSITORY / "examples"
MLP = (f"{EXAMPLES}/mlp.py:MLPTask", "fast", {"data": EXAMPLES / "spirals.csv"})
GPT = (f"{EXAMPLES}/gpt.py:GPTTask", "fast", {"text": (Path(__file__),), "context": 9})
CLASSIFIER = (f"{EXAMPLES}/classifier.py:ClassifierTask", "fast", {"dataset": "fake"})
PROVEN = (f"{EXAMPLES}/proven.py:ProvenTask", "fast", {})
SHAPES = Path(os.environ.get("SHAPES", ""))
PHOTOS = (f"{EXAMPLES}/photos.py:PhotosTask", "fast", {"data": SHAPES, "workers": 0})
FAKE_DATA = {"dataset": "fake"}
CASES = {
    "lstm": ("lstm", "smoke", {"curriculum": 1.0}),
    "lstm curriculum": ("lstm", "smoke", {}),
    "lstm equations": ("lstm", "smoke", {"curriculum": 1.0, "length": 4, "kernel": "equations"}),
    "lstm course": ("lstm", "course", {"length": 4}),
    "lstm long": ("lstm", "smoke", {"curriculum": 1.0, "length": 13}),
    "lstm exact": ("lstm", "smoke", {"curriculum": 1.0, "micro_batches": 4}),
    "lstm equations, rmsprop": ("lstm", "course", {"length": 4, "kernel": "equations"}),
    "rnn": ("lstm", "course", {"length": 4, "model": "rnn"}),
    "rnn, adam": ("lstm", "course", {"length": 4, "model": "rnn", "optimizer": "adam"}),
    "gan": ("gan", "fast", FAKE_DATA),
    "gan course": ("gan", "course", FAKE_DATA),
    "gan epochs": ("gan", "course", {**FAKE_DATA, "discriminator_unit": "epoch"}),
    "gan exact": ("gan", "fast", {**FAKE_DATA, "micro_batches": 2}),
    "gan whole": ("gan", "fast", {**FAKE_DATA, "micro_batches": 1}),
    "mlp": MLP,
    "proven": PROVEN,
    "photos": PHOTOS,
}
MORE = {**{name: CASES[name] for name in ("lstm equations", "rnn", "mlp")}, "gpt": GPT}
for name, (task, preset, changes) in {**MORE, "classifier": CLASSIFIER}.items():
    CASES[f"{name} exact"] = task, preset, {**changes, "micro_batches": 2}


# torch without CUDA, made to take fake tensors of it


def copied(tensor, memo):
    copy = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        copy = torch.nn.Parameter(copy, tensor.requires_grad)
    return memo.setdefault(id(tensor), copy)


def in_a_thread_too(device):
    """Dispatch modes belong to a thread."""
    enter, modes = honest_state(device), _get_current_dispatch_mode_stack()

    @contextmanager
    def entered():
        with enter(), ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield

    return entered


def save(tensors):
    assert {str(tensor.device) for tensor in tensors.values()} == {"cpu"}
    with unset_fake_temporarily():
        return honest_save({n: torch.zeros(t.shape, dtype=t.dtype) for n, t in tensors.items()})


def load(samples, addresses):
    """What a worker process would load, which knows no GPU."""
    with unset_fake_temporarily():
        loaded = honest_load(samples, addresses)
    return tree_map(lambda leaf: FAKE.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, loaded)


def read_tensors(path, expected, **options):
    with unset_fake_temporarily():
        read = honest_read(path, expected, **options)
    return {name: FAKE.from_tensor(tensor) for name, tensor in read.items()}


for name, answer in {  # of torch.cuda, as far as torch, Accelerate and the project ask
    "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
    "is_bf16_supported": True, "is_current_stream_capturing": False, "get_device_name": "fake",
    "get_device_capability": (9, 0), "synchronize": None, "get_rng_state": torch.zeros(1),
}.items():  # fmt: skip
    setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
# It refuses a device without an index, as torch does.
torch.cuda.set_device = lambda device: torch.cuda._utils._get_device_index(device)
FakeTensorMode.avoid_device_init = property(lambda mode: True)
FakeTensorMode.__deepcopy__ = lambda mode, memo: mode
FakeTensor.__deepcopy__ = copied
torch.utils.weakref = types.SimpleNamespace(getweakrefs=lambda _: [])  # `Module.to` swaps fake tensors
warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
honest_state, parts._thread_state = parts._thread_state, in_a_thread_too
honest_save, models.save = models.save, save
honest_load, _Samples.__getitems__ = _Samples.__getitems__, load
honest_read = models.read_tensors
checkpoints.read_tensors = optimizers.read_tensors = statistics.read_tensors = read_tensors
palindromes.TRIALS, palindromes.DIGITS_AT_ONCE = 100, 1000
sys.modules[LSTM.__module__].WHOLE = sys.modules[LSTM.__module__].PART = 12 * 128  # 13 digits are long
if processes := int(os.environ.get("WORLD_SIZE", "0")):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    Trainer._check_that_all_have = lambda *_: None
    dist.all_gather_object = lambda found, own: found.__setitem__(slice(None), [own] * len(found))
FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one, as permutations and the classifier are kept


# What is looked at


def place():
    """The line of torch or of whoever asked it, and the innermost of the project."""
    inner = (__file__, "_python_dispatch", "_dynamo", "_compile", "_stats", "fake_tensor", "_ops")
    stack = [f for f in traceback.extract_stack() if not any(part in f.filename for part in inner)]
    ours = [f for f in stack if f.filename.startswith((f"{REPOSITORY}/cs324dist", str(EXAMPLES)))]
    if not ours:
        return "in the backward pass"
    outer = f"{Path(stack[-1].filename).name}: " if stack[-1] is not ours[-1] else ""
    return f"{outer}{Path(ours[-1].filename).relative_to(REPOSITORY)}, {ours[-1].name}: {ours[-1].line}"


class Host(TorchDispatchMode):
    """Notes what a GPU would refuse and what it would be waited for, and answers in its place."""

    def __init__(self):
        super().__init__()
        self.waits, self.wrong, self.is_exact = [], [], False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if op in (aten.equal.default, aten._local_scalar_dense.default) and not any(
            isinstance(tensor, FakeTensor) for tensor in given
        ):
            with unset_fake_temporarily():  # a generator's state, or what a file holds
                return op(*args, **kwargs)
        on_gpu = any(tensor.is_cuda for tensor in given)
        name = op._schema.name.removeprefix("aten::")
        summed = name == "cumsum" and given[0].is_floating_point()
        not_exact = name in NOT_DETERMINISTIC or op is aten.median.dim or summed
        if self.is_exact and on_gpu and not_exact:
            self.wrong.append(f"{name} has no deterministic kernel: {place()}")
        if op is aten._local_scalar_dense.default:
            self.wait("a value is read", on_gpu)
            if "_finish: kinds" in place():  # losses are means, and use all parameters
                return args[0].dtype == torch.bool
            no_overflow = "grad_scaler.py" in place()
            return {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 0.0 if no_overflow else 0.5)
        if op is aten.nonzero.default:
            self.wait("nonzero", on_gpu)
            return args[0].new_empty(len(args[0]) // 2, args[0].dim(), dtype=torch.int64)
        if op is aten.batch_norm_update_stats.default:  # which has no kernel for fake tensors
            return args[0].new_empty(args[0].shape[1]), args[0].new_empty(args[0].shape[1])
        if op is aten.bincount.default:
            self.wait("bincount", on_gpu)
            return args[0].new_empty(args[2])
        if op is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.wait("an index by a mask", on_gpu)
            return args[0].clone()
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if generator is not None and device is not None and generator.device.type != device.type:
            self.wrong.append(
                f"{op} on {device.type} draws from a generator on {generator.device}: {place()}"
            )
        if on_gpu and op not in COPIES and any(tensor.dim() and not tensor.is_cuda for tensor in given):
            self.wrong.append(f"{op} of tensors on a GPU and a CPU: {place()}")
        out = op(*args, **kwargs)
        if op in COPIES and not kwargs.get("non_blocking"):
            source = args[1] if op is aten.copy_.default else args[0]
            self.wait(f"a copy from {source.device} to {out.device}", source.is_cuda != out.is_cuda)
        return out

    def wait(self, what, on_gpu):
        if on_gpu:
            self.waits.append(f"{what}: {place()}")

    def look_at_gradients(self, optimizer, *_):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if (gradient := parameter.grad) is not None and layout(gradient) != layout(parameter):
                self.wrong.append(f"{layout(gradient)} is a gradient of {layout(parameter)}")


def layout(tensor):
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return f"{tensor.device} {tensor.dtype} {list(tensor.shape)} strides {strides}"


def lstm_seen_by(host, honest=torch.lstm):
    """Autocast would have cuDNN compute in float16, whatever the precision."""

    def called(x, *arguments):
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(PRECISION, torch.float32)
        wanted = wanted if torch.is_grad_enabled() else torch.float32  # evaluations are in full precision
        if torch.is_autocast_enabled("cuda") or x.dtype != wanted:
            host.wrong.append(f"torch.lstm is given {x.dtype}, under autocast or not: {place()}")
        return honest(x, *arguments)

    return mock.patch.object(torch, "lstm", called)


def run(case):
    """What is wrong in building, two steps, an evaluation, saving and reading; and what a step waits for."""
    name, preset, changes = CASES[case]
    host = Host()
    hook = register_optimizer_step_pre_hook(host.look_at_gradients)
    with tempfile.TemporaryDirectory() as scratch, lstm_seen_by(host), FAKE, host:
        try:
            task_type = find_task(name)
            sys.modules[task_type.__module__].MOST_STEPS = 2  # of proven.py
            config = replace(task_type.presets[preset], **changes)
            if processes:  # the other's gradients, to compare with, are not there
                config = replace(config, check_every=0)
            accelerator = start_accelerator(config.batch_size, config.micro_batches)
            host.is_exact = config.micro_batches is not None
            if config.micro_batches and not torch.are_deterministic_algorithms_enabled():
                host.wrong.append("--micro-batches promises bits that these kernels do not keep")
            task = task_type(config, accelerator.device)
            trainer = Trainer(task, accelerator)
            trainer.step(0, is_logged=True)  # it fills caches
            host.waits.clear()
            trainer.step(1, is_logged=True)
            waits = dict.fromkeys(host.waits)
            trainer.read_metrics()
            assert environment(commit=False).device == "fake"
            with trainer.evaluating():
                task.evaluate(trainer.sum_over())
            checkpoint = Path(scratch) / "2"
            checkpoints.write_checkpoint(checkpoint, task, checkpoints.TrainerState(2))
            read_checkpoint(checkpoint, task, HiddenState(task), accelerator.scaler)
            trainer.step(2, is_logged=True)
            return [*waits, *dict.fromkeys(host.wrong)]
        except Exception as error:
            frames = [
                f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename
            ]
            said = f"{type(error).__name__}: {str(error)[:300]}"
            return [*dict.fromkeys(host.wrong), f"{said} in {frames[-1].name}: {frames[-1].line}"]
        finally:
            hook.remove()


def spatial_loss(logits, following, honest=torch.nn.functional.cross_entropy, **options):
    """Of rows and columns, as of images."""
    return honest(logits.T[None], following[None], **options)


FAULTS = {  # where it is planted, and the case that it is seen in
    "indices without a device": (
        "lstm", MicroBatch, "samples", property(lambda batch: torch.arange(batch.batch_size))
    ),
    "a state without a device": (
        "lstm", LSTM, "scan", lambda self, x, state=None, honest=LSTM.scan: honest(
            self, x, state or (torch.zeros(x.shape[1], self.W_h.shape[1]),) * 2)
    ),
    "a constant on the CPU": (
        "gan", gan, "to_unit_range", lambda images: images[:, None] / torch.full((28,), 127.5)
    ),
    "an index on the CPU": (
        "gan", ShuffledEpochs, "items", lambda self, batch: torch.arange(batch.batch_size)
    ),
    "float(loss)": (
        "lstm", lstm, "accuracy", lambda logits, _: torch.tensor(float(logits.detach().mean()))
    ),
    "data left on the CPU": (
        "gan", LabelledImages, "to", lambda self, device: self
    ),
    "a generator on the CPU": (
        "gan", Stream, "normals", lambda self, indices, components: torch.randn(
            len(indices), components, device=indices.device, generator=torch.Generator())
    ),
    "no deterministic kernel": ("gpt exact", torch.nn.functional, "cross_entropy", spatial_loss),
}  # fmt: skip


if __name__ == "__main__":
    found = {}
    exact = {name for name, (_, _, changes) in CASES.items() if "micro_batches" in changes}
    some = [name for name in CASES if PRECISION != "fp16" or name not in exact]  # which refuse it
    for name in WANTED or (FAULTS if PRECISION == "faults" else some):
        case, *fault = FAULTS.get(name, (name,))
        with mock.patch.object(*fault) if fault else nullcontext():
            found[name] = run(case)
    print(json.dumps(found), flush=True)
    os._exit(0)  # without destroying what is fake
