"""The run of a training loop of one's own."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cs324dist.base_run import BaseRun
from cs324dist.distributed.checks import held
from cs324dist.distributed.exact import unwrapped
from cs324dist.distributed.gradients import fix_the_order_of, refuse_lazy
from cs324dist.distributed.process import accelerator_of_script
from cs324dist.errors import UserError, printable
from cs324dist.runs.contents import text_of
from cs324dist.runs.optimizers import Optimizers, each
from cs324dist.runs.records import LOOP, RunRecord

WANDB_MODES = ("online", "offline", "disabled")


@runtime_checkable
class Stateful(Protocol):
    """Such as a scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, words and tensors, nested in dictionaries and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take over what `state_dict` gave."""


class Run(BaseRun):
    """A folder that owns the state of a training loop.

        with run:
            for step in run.steps(1000, save_every=100):
                ...
                run.log(loss=loss)

    Inside, no other process writes into the folder, and networks, optimizers and states are what the newest
    checkpoint holds. `break` saves and finishes. SIGTERM, SIGINT and SIGUSR1 save after the step, and end the
    process with exit code 75; give the same command again to go on, on any number of processes.
    """

    _held_before: Mapping[str, Any] = {}

    def __init__(
        self,
        folder: str | Path,
        *,
        networks: Mapping[str, nn.Module],
        optimizers: Optimizers,
        states: Mapping[str, Stateful] | None = None,
        config: Mapping[str, Any] | None = None,
        may_change: Iterable[str] = (),
        accelerator: Accelerator | None = None,
        keep_last: int = 3,
        keep_best: str = "",
        wandb: str = "disabled",
        tensorboard: bool = False,
        peer_timeout: int = 600,
    ) -> None:
        """Describe it; nothing is read or written before `with`.

        Args:
            folder: of the run; a new or empty one, or one that holds this run.
            networks: by name; those that DDP or torch.compile has wrapped are saved without it.
            optimizers: by name.
            states: what else has a state, by name, such as a scheduler.
            config: settings, which `config.json` records. A run goes on only with the same ones.
            may_change: names of settings that may differ when it goes on, such as "steps".
            accelerator: of the loop; by default one is made.
            keep_last: number of newest checkpoints that are kept.
            keep_best: a metric, as `log` names it. Each step that logs it is saved, and the best of these
                checkpoints stays; `METRIC:min`: the smallest.
            wandb: Weights & Biases: online (offline if there is no login or network), offline or disabled.
            tensorboard: whether to write the metrics for TensorBoard too.
            peer_timeout: seconds without an answer from another process after which the run ends.

        Raises:
            UserError: a name that no checkpoint can hold, a setting that JSON cannot, or another word for
                `wandb`.
        """
        if wandb not in WANDB_MODES:
            raise UserError(f"wandb={wandb!r} is not allowed: give one of {', '.join(WANDB_MODES)}")
        given = {"networks": networks, "optimizers": optimizers, "states": states, "config": config}
        for argument, value in given.items():
            if not isinstance(value, Mapping | None):
                raise UserError(
                    f"{argument}= is a {type(value).__name__}: give a dict, by name"
                    + (", vars(args)" if argument == "config" else "")
                )
        accelerator = accelerator_of_script(accelerator, peer_timeout=peer_timeout)
        trained = _Loop(networks, optimizers, states or {})
        super().__init__(
            Path(folder),
            trained,
            accelerator,
            _plain(config or {}),
            keep_last=keep_last,
            keep_best=keep_best,
            wandb=wandb,
            tensorboard=tensorboard,
            peer_timeout=peer_timeout,
        )
        self._may_change = {*may_change, "keep_best"}
        self._made_of = {"gradients": str(self.exact or "of the loop"), "keep_best": keep_best}
        self._kinds = trained.kinds
        self._made_of |= self._kinds()
        if self.exact:
            prepared = {name: unwrapped(network) for name, network in self.exact.networks.items()}
            others = {n: one for n, one in trained.networks.items() if one not in prepared.values()}
            self.exact.watch({**others, **prepared})

    def _check_fits(self) -> None:
        if self.exact:
            self._check_prepared(self.exact.networks)
        if (record := self.dir.record_of(LOOP)) is None:
            return
        stored, now = {**record.config, **record.made_of}, {**self._config, **self._made_of}
        if lines := [
            f"{name} = {printable(now.get(name))} differs from the run's {printable(stored.get(name))}: "
            f"give the run's value or another folder; if it may change, write {name!r} into may_change"
            for name in {**now, **stored}
            if name not in self._may_change and now.get(name) != stored.get(name)
        ]:
            raise UserError(*lines)

    def _check_prepared(self, networks: Mapping[str, nn.Module]) -> None:
        """Check that the run holds what exact gradients are made of, and trains nothing else."""
        for name, network in networks.items():
            is_trained = any(parameter.requires_grad for parameter in network.parameters())
            if is_trained and unwrapped(network) not in self.trained.networks.values():
                raise UserError(
                    f"{name} was prepared, and no checkpoint would hold it: give it to the run, networks="
                )
        prepared = {parameter for network in networks.values() for parameter in network.parameters()}
        for name, optimizer in each(self.trained.optimizers):
            of_optimizer = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            if left := sum(parameter.requires_grad for parameter in of_optimizer - prepared):
                raise UserError(
                    f"{left} parameters of optimizer {name!r} are of no prepared network, and get no "
                    f"gradient: give it to ExactGradients.prepare as well"
                )

    def _restore(self) -> None:
        super()._restore()
        self._held_before = {}
        if self.step:
            stored, has = self._on_main(self.dir.read_record).made_of, self._kinds()
            for name in has:
                if stored.get(name) != self._made_of[name] != has[name]:
                    self._say(f"{name} goes on with the settings of its checkpoint, {has[name]}")

    def steps(self, until: int, save_every: int) -> Iterator[int]:
        """See `BaseRun.steps`; a second loop needs more steps than the one before."""
        if self._in_step:
            raise UserError(
                f"steps({until}) after a `break`, which ends the run: put what follows into another run"
            )
        if 0 < self._until >= until:
            raise UserError(
                f"steps({until}) after steps({self._until}): it counts from the start of the run; for "
                f"epochs, give steps((epoch + 1) * steps_per_epoch, …)"
            )
        self._check_nothing_is_done_again(until)
        return super().steps(until, save_every)

    def _check_nothing_is_done_again(self, until: int) -> None:
        """Check what stands behind a loop whose steps an earlier start has taken: it is done again."""
        is_left = self.step > until and not self.is_over
        if is_left == bool(self._held_before):
            return
        rates = {
            name: text_of(of) for name, of in self.saving.hidden.changed().items() if "optimizer " in name
        }
        now = {**held(self.trained, buffers_from_first=False), **rates}
        before, self._held_before = self._held_before or now, now if is_left else {}
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            raise UserError(
                f"{changed[0]} is changed behind the loop over steps({self._until}), which would be repeated "
                f"whenever the run goes on: change it in the loop, if (step + 1) % steps_per_epoch == 0"
            )

    def _record(self) -> RunRecord:
        return RunRecord(
            LOOP, sys.argv[0], self._config, {}, made_of=self._made_of, arguments=tuple(sys.argv[1:])
        )

    def _for_more(self) -> str:
        more = (
            "for more, give another folder, or more steps (a setting in `config` has to be in `may_change`)"
        )
        return "its loop has ended" if self.step < self._until else more

    def _is_to_be_saved(self) -> bool:
        # Perhaps the main process alone has logged what `keep_best` names.
        return self._stop.on_any_rank(self._save_asked) if self.keep_best else self._save_asked

    def logged(self, name: str) -> list[float]:
        """The values of a metric that were logged so far, the earliest first, for early stopping.

        A run that goes on has those of the steps before. Every process calls it, and gets the same.
        """
        lines = None if self._is_started else self._metrics_lines
        rows = self._on_main(lambda: [row for row in islice(self.dir.read_metrics(), lines) if name in row])
        return [math.nan if row[name] is None else row[name] for row in rows]


class _Loop:
    """What a checkpoint of a loop of one's own holds; not wrappers of DDP, torch.compile or Accelerate."""

    def __init__(
        self, networks: Mapping[str, nn.Module], optimizers: Optimizers, states: Mapping[str, Stateful]
    ) -> None:
        self.networks = {name: unwrapped(network) for name, network in networks.items()}
        for name, network in self.networks.items():
            refuse_lazy(name, network)
        for module in (module for network in networks.values() for module in network.modules()):
            if isinstance(module, DistributedDataParallel) and not module.static_graph:
                fix_the_order_of(module)
        self.optimizers: Optimizers = {
            name: one.optimizer if isinstance(one, AcceleratedOptimizer) else one
            for name, one in optimizers.items()
        }
        self._states = {
            name: state.scheduler if isinstance(state, AcceleratedScheduler) else state
            for name, state in states.items()
        }
        scheduled = [getattr(state, "optimizer", None) for state in self._states.values()]
        saved = {parameter for network in self.networks.values() for parameter in network.parameters()}
        for name, optimizer in each(self.optimizers):
            if foreign := [p for group in optimizer.param_groups for p in group["params"] if p not in saved]:
                raise UserError(
                    f"optimizer {name!r} trains {len(foreign)} parameters of no network of the run: give it "
                    f"the network as well, networks="
                )
            if hasattr(optimizer.step, "_wrapped_by_lr_sched") and optimizer not in scheduled:
                raise UserError(
                    f"optimizer {name!r} has a scheduler that no checkpoint would hold: give it to the run, "
                    f'states={{"scheduler": …}}'
                )

    def kinds(self) -> dict[str, str]:
        """What the optimizers, with their settings, and the states are."""
        optimizers = {f"optimizer {name}": _settings_of(one) for name, one in each(self.optimizers)}
        return {**optimizers, **{f"state {n}": type(state).__name__ for n, state in self._states.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {name: state.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != self._states.keys():
            raise ValueError
        for name, own in self._states.items():
            own.load_state_dict(_in_the_kinds_of(own.state_dict(), state[name]))


def _settings_of(optimizer: Any) -> str:
    """The class and, for each group, the number of parameters and the settings."""
    groups = [
        ", ".join(
            [
                f"{len(group['params'])} parameters",
                *(f"{name} {value:g}" for name, value in group.items() if type(value) in (int, float)),
            ]
        )
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} of {'; '.join(groups)}"


def _in_the_kinds_of(own: Any, read: Any) -> Any:
    """What was read, with tuples and counters where `own` has them; JSON has none."""
    if isinstance(own, tuple | Counter):
        return type(own)(read)
    if isinstance(own, dict) and isinstance(read, dict):
        return {key: _in_the_kinds_of(own.get(key), value) for key, value in read.items()}
    if isinstance(own, list) and isinstance(read, list) and len(own) == len(read):
        return [_in_the_kinds_of(one, value) for one, value in zip(own, read, strict=True)]
    return read


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them."""

    def as_word(value: object) -> str:
        if isinstance(value, Path):
            return str(value)
        raise UserError(f"the config holds {printable(repr(value))[:99]}: give numbers, words and paths")

    found: dict[str, Any] = json.loads(json.dumps(dict(config), default=as_word))
    return found
