"""A training loop with everything a script does in one, over our optimizer or over a plain one.

`Loop` is one run; each of its methods is one move of a script. The same moves over the plain
optimizer are what ours must come to: the caller tells the plain run which modules are active, and
`Loop.freeze` does what a user would do by hand, with ``requires_grad``.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.checkpoint import checkpoint
from toy import ToyAdapter

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import (
    Backward,
    DynamicAllocationOptimizer,
    ImportanceTracker,
    LocalLR,
    Once,
    Pause,
    Periodic,
)
from dynalora_optim.allocation._context import uses_active

LAYERS, MOST_LAYERS, FEATURES, RATE = 4, 6, 4, 0.05

Rule = Callable[[Any], Optimizer]
RULES: dict[str, Rule] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=RATE, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=RATE),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=RATE, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=RATE, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=RATE),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=RATE / 5, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=RATE),
    "nadam": lambda p: torch.optim.NAdam(p, lr=RATE, decoupled_weight_decay=True),
    "asgd": lambda p: torch.optim.ASGD(p, lr=RATE, t0=3, foreach=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=RATE / 5),
}
KEEPS_STATE = ("adagrad", "asgd")  # their state cannot be dropped, in some versions of torch
NO_MOMENTUM = ("sgd fused", "adafactor", "adagrad", "asgd", "rprop")
# Their state has single numbers in float32, which torch's own load_state_dict casts to the
# precision of the weights: a plain run that is saved and loaded goes on with rounded numbers, too.
CAST_BY_LOADING = ("nadam", "asgd")
CLIPS = ("none", "norm", "value", "norm by group")


class Boom(Exception):
    """What a script's own code raises."""


class Interrupt(KeyboardInterrupt):
    """What Ctrl-C raises: torch runs no hook of a forward that it ends."""


# The model


class Block(nn.Module):
    """A residual block with dropout, and the trainable part that its kind says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        adapted = ToyAdapter(FEATURES) if kind == "flagged" else nn.Linear(FEATURES, FEATURES)
        self.linear = adapted
        self.dropout = nn.Dropout(0.2)
        if kind != "blocks":
            self.norm.requires_grad_(False)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        if self.fails == "forward":
            raise Boom("forward")
        if self.fails == "interrupt":
            raise Interrupt("forward")
        if self.fails == "backward" and y.requires_grad:
            y.register_hook(boom)
        return x + self.dropout(torch.tanh(y))


def boom(gradient: Tensor) -> None:
    raise Boom("backward")


class Model(nn.Module):
    """Embedding-free: rows of numbers through blocks to a head that always trains."""

    def __init__(self, kind: str, layers: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind, self.checkpoints = kind, ""  # or "recorded", or "reentrant"
        self.blocks = nn.ModuleList(Block(kind) for _ in range(layers))
        self.head = nn.Linear(FEATURES, 2)
        if kind == "lora":
            self._inject(self)

    def _inject(self, part: nn.Module) -> None:
        config = LoRAConfig(rank=2, alpha=4, targets=r".*linear", trainable=["head"])
        inject(part, config)
        for name, parameter in part.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.3)

    def append(self) -> nn.Module:
        """Add a block; return it."""
        torch.manual_seed(len(self.blocks))
        block: nn.Module = Block(self.kind)
        if self.kind == "lora":
            holder = nn.ModuleDict({"block": block, "head": nn.Linear(1, 1)})
            self._inject(holder)
            block = holder["block"]
        like = next(self.parameters())
        self.blocks.append(block.to(like.dtype).train(self.training))
        return block

    def forward(self, x: Tensor) -> Tensor:
        reentrant = self.checkpoints == "reentrant"
        x = x.requires_grad_(reentrant)  # which these ask for
        for block in self.blocks:
            if self.checkpoints and self.training:
                x = checkpoint(block, x, use_reentrant=reentrant)
            else:
                x = block(x)
        return self.head(x)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each module group, by its name."""
        return {
            name: [p for n, p in block.named_parameters() if self._trains(n)]
            for name, block in zip(self.names(), self.blocks, strict=True)
        }

    def names(self) -> list[str]:
        """The names of the module groups."""
        place = {"blocks": "blocks.{}", "flagged": "blocks.{}.linear", "lora": "blocks.{}.linear"}
        return [place[self.kind].format(i) for i in range(len(self.blocks))]

    def _trains(self, name: str) -> bool:
        parts = {"blocks": "", "flagged": ("linear.A", "linear.B"), "lora": "linear.lora_"}
        return name.startswith(parts[self.kind])


# Schedulers


def decay(step: int) -> float:
    return 1 / (1 + step / 8)


def wave(step: int) -> float:
    return 1.0 if step % 3 else 0.5


def by_group(optimizer: Optimizer) -> list[Callable[[int], float]]:
    """Another function for each of the user's groups."""
    return [(decay, wave)[i % 2] for i in range(len(optimizer.param_groups))]


def none(optimizer: Optimizer) -> list[Any]:
    return []


def warm_up_then_lambda(optimizer: Optimizer) -> list[Any]:
    first = lr_scheduler.LinearLR(optimizer, 0.2, total_iters=3)
    second = lr_scheduler.LambdaLR(optimizer, by_group(optimizer))
    return [lr_scheduler.SequentialLR(optimizer, [first, second], [3])]


def chained(optimizer: Optimizer) -> list[Any]:
    first = lr_scheduler.MultiplicativeLR(optimizer, [wave] * len(optimizer.param_groups))
    second = lr_scheduler.LinearLR(optimizer, 0.3, total_iters=4)
    return [lr_scheduler.ChainedScheduler([first, second])]


def two(optimizer: Optimizer) -> list[Any]:
    return [
        lr_scheduler.ExponentialLR(optimizer, 0.9),
        lr_scheduler.MultiplicativeLR(optimizer, [wave] * len(optimizer.param_groups)),
    ]


def lambdas(optimizer: Optimizer) -> list[Any]:
    return [lr_scheduler.LambdaLR(optimizer, by_group(optimizer))]


def one_cycle(optimizer: Optimizer) -> list[Any]:
    rates = [RATE * (i + 1) for i in range(len(optimizer.param_groups))]
    return [lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3, 2)] if rates else []


SCHEDULES = {f.__name__: f for f in (none, warm_up_then_lambda, chained, two, lambdas, one_cycle)}


# The loop


class Loop:
    """One run: a model, an optimizer, schedulers, a scaler, and how the script clips.

    Args:
        chosen: The settings, as `strategies.loops` draws them.
        plain: Whether to train with the plain optimizer.
        seed: Of the weights.
        layers: How many blocks the model has.
        joined: The modules that were frozen at first and have been unfrozen.
        regrouped: Whether the groups are made of other modules, with the same parameters.
    """

    def __init__(
        self,
        chosen: dict[str, Any],
        *,
        plain: bool = False,
        seed: int = 0,
        added: Collection[str] = (),
        regrouped: bool = False,
    ) -> None:
        self.chosen, self.plain, self.regrouped = chosen, plain, regrouped
        self.model = Model(chosen["kind"], LAYERS, seed)
        self.model.checkpoints = chosen["checkpoints"]
        self.frozen: list[str] = self.model.names()[LAYERS - chosen["frozen"] :]
        self.added: list[str] = []  # names of what has joined with a param group of its own
        self.clip = "none"
        self.pending = False  # whether there are gradients
        self.waits: set[str] = set()  # modules that train, but that the next step leaves out
        for name in self.frozen:
            for parameter in self.model.groups()[name]:
                parameter.requires_grad_(False)
        self.inner = RULES[chosen["rule"]](self.user_groups())
        self.optimizer = self.inner if plain else self.wrapped()
        self.closed = False
        for name in added:
            self.unfreeze(name) if name in self.frozen else self.append_layer()
        self.schedulers = self.scheduled()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        self.local = LocalRates(self)

    # Building

    def user_groups(self) -> list[dict[str, Any]]:
        """Three groups, none of which is a module: by turns, and the head."""
        held = self.chosen["holds_frozen"]
        own = [p for p in self.model.blocks.parameters() if p.requires_grad or held]
        if self.chosen["kind"] != "blocks":
            trained = {id(p) for params in self.model.groups().values() for p in params}
            own = [p for p in own if id(p) in trained]
        return [
            {"params": own[::2], "weight_decay": 0.1},
            {"params": own[1::2], "weight_decay": 0.0, "lr": RATE / 2},
            {"params": list(self.model.head.parameters()), "lr": RATE * 1.5},
        ]

    def wrapped(self) -> DynamicAllocationOptimizer:
        """Our optimizer around the inner one."""
        names = ("allocator", "active", "seed", "lr_time")
        rest = {name: self.chosen[name] for name in names}
        if rest["lr_time"] == "own":
            rest["lr_time"] = LocalLR(decay)
        if not uses_active(rest["allocator"]):
            del rest["active"]
        period, warmup = self.chosen["period"], self.chosen["warmup"]
        if isinstance(period, Once):
            rest["period"] = Once(period.at, warmup=warmup)
        else:
            rest["period"] = Periodic(period, warmup=warmup)
        return DynamicAllocationOptimizer(
            self.inner,
            self.model,
            importance=ImportanceTracker(
                self.chosen["measure"],
                window=self.chosen["window"],
                every=self.chosen["every"],
                probe=self.chosen["probe"],
            ),
            groups=self.rule(),
            pause=Pause(**self.chosen["pause"]),
            backward=Backward(checkpoint_idle=self.chosen["checkpoint_idle"]),
            **rest,
        )

    def rule(self) -> Any:
        """How modules form groups, of which the names are always the same."""
        is_blocks = self.chosen["kind"] == "blocks"
        if not self.regrouped:
            return "blocks" if is_blocks else "auto"
        depth = 3 if is_blocks else 2  # the parts of blocks, or the blocks around adapters

        def rule(name: str, module: nn.Module) -> str | None:
            parts = name.split(".")
            if parts[0] != "blocks" or len(parts) != depth:
                return None
            return ".".join(parts[:2]) if is_blocks else f"{name}.linear"

        return rule

    def scheduled(self) -> list[Any]:
        """The schedulers, built on the optimizer or on the one inside."""
        on = self.inner if self.chosen["schedule_inner"] else self.optimizer
        return SCHEDULES[self.chosen["schedule"]](on)

    # One step

    def loss(self, number: int) -> Tensor:
        """The loss of one batch; dropout is that of the batch too."""
        generator = torch.Generator().manual_seed(1000 + number)
        like = next(self.model.parameters())
        x = torch.randn(3, FEATURES, generator=generator).to(like.dtype)
        torch.manual_seed(number)
        return self.model(x).square().mean()

    def backward(self, number: int, scaled: bool = False, twice: bool = False) -> None:
        """Add the gradients of one batch."""
        loss = self.loss(number)
        if scaled:
            loss = self.scaler.scale(loss)
        self.pending = True
        if twice:
            loss.backward(retain_graph=True)
        loss.backward()

    def backward_of_all(self, numbers: Collection[int], between: str) -> None:
        """Add the gradients of several batches, whose forwards come before the one backward."""
        loss = sum(self.loss(number) for number in numbers)
        if between == "reference":
            with torch.no_grad():
                self.loss(999)
        elif between:
            self.evaluate(False, True)
        self.pending = True
        loss.backward()

    def discard(self, number: int) -> None:
        """Run forward, and do without the loss."""
        self.loss(number)

    def clipped(self, groups: list[dict[str, Any]] | None = None) -> None:
        """Clip as the script does now, by these groups or by those of the optimizer."""
        if self.clip == "norm":
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        elif self.clip == "value":
            nn.utils.clip_grad_value_(self.model.parameters(), 0.01)
        elif self.clip == "norm by group":
            for group in self.optimizer.param_groups if groups is None else groups:
                nn.utils.clip_grad_norm_(group["params"], 0.05)

    def step(self) -> None:
        """Update, with the rates of local time in a plain run."""
        with self.local.rates():
            self.optimizer.step()

    def step_by_closure(self, numbers: Collection[int], fails: bool = False) -> None:
        """Update by a closure, which may raise after its backward passes."""
        groups = self.optimizer.param_groups  # of the user: a plain run splits them for the update

        def closure() -> float:
            for number in numbers:
                self.backward(number)
            self.clipped(groups)
            if fails:
                raise Boom("closure")
            self.drop(self.waits)
            return 0.5

        with self.local.rates():
            assert self.optimizer.step(closure) == 0.5

    def step_by_scaler(self) -> None:
        """Update if all gradients are finite."""
        self.scaler.unscale_(self.optimizer)
        self.clipped()
        self.drop(self.waits)
        with self.local.rates():
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def overflow(self, number: int) -> None:
        """Run into gradients that are not finite."""
        (self.scaler.scale(self.loss(number)) * torch.inf).backward()
        self.pending = True

    def zero_grad(self, set_to_none: bool, by_model: bool = False) -> None:
        """Clear the gradients."""
        owner: Any = self.model if by_model else self.optimizer
        owner.zero_grad(set_to_none=set_to_none)
        self.pending = self.pending and not set_to_none

    def step_schedulers(self) -> None:
        """Go on in the schedules."""
        for scheduler in self.schedulers:
            scheduler.step()

    def fail(self, where: str, block: int, number: int) -> None:
        """Run into an exception in the forward or in the backward pass of a block."""
        module = self.model.blocks[block % len(self.model.blocks)]
        module.fails = where
        try:
            self.backward(number)
        finally:
            module.fails = False
            self.pending = True

    # What scripts do between steps

    def evaluate(self, training: bool, grad: bool) -> None:
        """Run forward without training on it."""
        was = self.model.training
        self.model.train(training)
        with torch.set_grad_enabled(grad):
            self.loss(999)
        self.model.train(was)

    def set_mode(self, training: bool) -> None:
        """Train in this mode from now on."""
        self.model.train(training)

    def set_clip(self, clip: str) -> None:
        """Clip in this way from now on."""
        self.clip = clip

    def set_checkpoints(self, kind: str) -> None:
        """Recompute every block in the backward pass, or no longer."""
        self.model.checkpoints = kind

    def set_option(self, line: int, key: str, value: float, inside: bool) -> None:
        """Change an option of a group, of the optimizer or of the one inside."""
        groups = (self.inner if inside else self.optimizer).param_groups
        groups[line % len(groups)][key] = value

    def to(self, dtype: torch.dtype) -> None:
        """Change the precision of the model, and of the state as ``load_state_dict`` does."""
        self.model.to(dtype)
        self.round_trip()

    def loading_leaves_no_trace(self) -> bool:
        """Return whether the plain optimizer goes on from a file as if there had been none."""
        is_float32 = next(self.model.parameters()).dtype == torch.float32
        return is_float32 or self.chosen["rule"] not in CAST_BY_LOADING

    def round_trip(self) -> None:
        """What ``accelerator.prepare`` does."""
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def unfreeze(self, name: str) -> None:
        """Let a module train that was frozen; add its parameters if nobody holds them."""
        self.frozen.remove(name)
        parameters = self.model.groups()[name]
        for parameter in parameters:
            parameter.requires_grad_(True)
        if not self.chosen["holds_frozen"]:
            self._add(name, parameters)

    def append_layer(self) -> None:
        """Adapt one more layer."""
        self.model.append()
        name = self.model.names()[-1]
        self._add(name, self.model.groups()[name])

    def _add(self, name: str, parameters: list[nn.Parameter]) -> None:
        self.added.append(name)
        self.optimizer.add_param_group({"params": parameters, "lr": RATE, "weight_decay": 0.05})
        if hasattr(self, "schedulers"):  # torch's schedulers do not take in new groups
            self._begin_schedules_anew()

    def _begin_schedules_anew(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group.pop("initial_lr", RATE)
        self.schedulers = self.scheduled()

    def set_active(self, active: float) -> None:
        """Change the budget."""
        if not self.plain and not self.closed and uses_active(self.optimizer.allocator):
            self.optimizer.active = active

    def close(self) -> None:
        """Go on with the plain optimizer."""
        if not self.plain:
            self.optimizer.close()
        self.optimizer, self.closed = self.inner, True

    def take_over(self, how: str, regroups: bool = False) -> None:
        """Build a new optimizer over the same model, around the same inner one or a new one."""
        self.regrouped ^= regroups
        self.former = self.optimizer  # as a variable of a notebook keeps it
        if how == "new inner":
            saved = self.optimizer.state_dict()
            if not self.plain and not self.closed:
                saved = self.optimizer.plain_state_dict()
            groups = [
                {"params": g["params"], "lr": RATE, "weight_decay": 0.0}
                for g in self.optimizer.param_groups
            ]
            self.inner = RULES[self.chosen["rule"]](groups)
            self.inner.load_state_dict(copy.deepcopy(saved))
        if not self.plain:
            self.optimizer = self.wrapped()
        else:
            self.optimizer = self.inner
        self.closed = False
        self._begin_schedules_anew()
        self.local = LocalRates(self)

    # Files and copies

    def state(self) -> dict[str, Any]:
        """What a script saves."""
        parts: list[Any] = [self.model, self.optimizer, self.scaler, *self.schedulers]
        return {"parts": [part.state_dict() for part in parts], "local": self.local.state()}

    def load(self, state: dict[str, Any]) -> None:
        """What a script does with it."""
        parts: list[Any] = [self.model, self.optimizer, self.scaler, *self.schedulers]
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.local.load(state["local"])

    def saved(self) -> bytes:
        """A file of it."""
        file = io.BytesIO()
        torch.save(self.state(), file)
        return file.getvalue()

    def shape(self) -> dict[str, Any]:
        """What the script itself knows when it starts again."""
        dtype = next(self.model.parameters()).dtype
        names = ("frozen", "added", "clip", "regrouped")
        kept = {key: copy.copy(getattr(self, key)) for key in names}
        modes = {"training": self.model.training, "checkpoints": self.model.checkpoints}
        return {"chosen": self.chosen, "plain": self.plain, "dtype": dtype, **kept, **modes}

    @staticmethod
    def resumed(shape: dict[str, Any], file: bytes, *, used: bool = False) -> Loop:
        """A run built anew that goes on from ``file``; one that was ``used`` has trained before."""
        fixed = {key: shape[key] for key in ("plain", "added", "regrouped")}
        fresh = Loop(shape["chosen"], seed=5, **fixed)
        fresh.clip, fresh.model.checkpoints = shape["clip"], shape["checkpoints"]
        fresh.model.to(shape["dtype"])
        if used:
            fresh.backward(900)
            fresh.step()
            fresh.zero_grad(True)
        for name in [name for name in fresh.frozen if name not in shape["frozen"]]:
            fresh.unfreeze(name)
        fresh.model.train(shape["training"])
        fresh.load(torch.load(io.BytesIO(file), weights_only=True))
        return fresh

    def trained_copy(self, how: str) -> dict[str, Tensor]:
        """The weights of a copy of the model after two steps with a plain optimizer."""
        if how == "deepcopy":
            twin = copy.deepcopy(self.model)
        elif how == "average":
            averaged = torch.optim.swa_utils.AveragedModel(self.model)
            averaged.update_parameters(self.model)
            twin = averaged.module
        else:
            twin = pickle.loads(pickle.dumps(self.model))
        for name, parameters in twin.groups().items():
            for parameter in parameters:
                parameter.requires_grad_(name not in self.frozen)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            torch.manual_seed(0)
            like = next(twin.parameters())
            twin(torch.ones(2, FEATURES, dtype=like.dtype)).square().mean().backward()
            optimizer.step()
        return {name: p.detach() for name, p in twin.named_parameters()}

    # The plain run

    def freeze(self, trained: Collection[str], *, returning: Collection[str] = ()) -> None:
        """Let only these modules train, and treat the state of the others as ``pause`` says."""
        pause = self.chosen["pause"]
        state = self.optimizer.state
        for name, parameters in self.model.groups().items():
            for parameter in parameters:
                parameter.requires_grad_(name in trained)
                if name not in trained:
                    parameter.grad = None
                    if pause["state"] == "drop" and not self.closed:
                        state.pop(parameter, None)
                if name in returning and pause["moments"] == "reset":
                    state.pop(parameter, None)
                if name in returning and pause["moments"] == "reset_momentum":
                    for key in ("exp_avg", "momentum_buffer"):
                        if isinstance(value := state.get(parameter, {}).get(key), Tensor):
                            value.zero_()

    def drop(self, names: Collection[str]) -> None:
        """Delete the gradients of these modules."""
        for name in names:
            for parameter in self.model.groups()[name]:
                parameter.grad = None

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradients by name."""
        return {name: p.grad for name, p in self.model.named_parameters()}

    def inner_state(self) -> dict[str, Any]:
        """The state dict of a plain optimizer that would go on from here."""
        if self.plain or self.closed:
            return self.optimizer.state_dict()
        return self.optimizer.plain_state_dict()


class LocalRates:
    """The rates of each module in a plain run: local time, and the ramp after a pause."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.steps = 0
        self.updates = dict.fromkeys(loop.model.names(), 0)
        self.returned: dict[str, int] = {}
        self.history: list[list[float]] = []

    def state(self) -> dict[str, Any]:
        keys = ("steps", "updates", "returned", "history")
        return copy.deepcopy({key: getattr(self, key) for key in keys})

    def load(self, state: dict[str, Any]) -> None:
        for key, value in copy.deepcopy(state).items():
            setattr(self, key, value)

    @contextmanager
    def rates(self) -> Iterator[None]:
        """Give each parameter a group with the rate of its module, for one update."""
        chosen, optimizer = self.loop.chosen, self.loop.optimizer
        is_own = chosen["lr_time"] != "global" or chosen["pause"]["warmup"]
        if not self.loop.plain or self.loop.closed or not is_own:
            yield
            return
        groups, before = optimizer.param_groups, copy.deepcopy(self.history)
        self._record(groups)
        owners = {id(p): m for m, params in self.loop.model.groups().items() for p in params}
        optimizer.param_groups = [
            {**group, "params": [p], "lr": self._rate(owners.get(id(p)), line, group)}
            for line, group in enumerate(groups)
            for p in group["params"]
        ]
        try:
            yield
        except Boom:
            self.history = before  # no update, no rate
            raise
        finally:
            optimizer.param_groups = groups

    def _record(self, groups: list[dict[str, Any]]) -> None:
        self.history += [[] for _ in groups[len(self.history) :]]
        for line, group in enumerate(groups):
            past = self.history[line]
            past += [group["lr"]] * (self.steps - len(past))
            past[self.steps :] = [group["lr"]]

    def _rate(self, module: str | None, line: int, group: dict[str, Any]) -> float:
        rate, time = group["lr"], self.updates.get(module, 0) if module else self.steps
        if self.loop.chosen["lr_time"] == "own":
            rate = group.get("initial_lr", group["lr"]) * decay(time)
        elif self.loop.chosen["lr_time"] == "local":
            rate = self.history[line][time]
        ramp = self.loop.chosen["pause"]["warmup"]
        if ramp and module in self.returned:
            rate *= min(1.0, (self.steps - self.returned[module] + 1) / ramp)
        return rate

    def advance(self, updated: Collection[str], returning: Collection[str]) -> None:
        """Count one step that has updated these modules."""
        self.steps += 1
        for name in updated:
            self.updates[name] = self.updates.get(name, 0) + 1
        self.returned.update(dict.fromkeys(returning, self.steps))


def go_on(loop: Loop, first: int, steps: int) -> dict[str, Any]:
    """Train for some steps; return what came of it."""
    for number in range(first, first + steps):
        loop.backward(number)
        loop.clipped()
        loop.step()
        loop.zero_grad(True)
        loop.step_schedulers()
    weights = {name: p.detach() for name, p in loop.model.named_parameters()}
    return {"weights": weights, "record": loop.optimizer.record.state_dict()}


def main(folder: Path) -> None:
    """Go on in this process from what another has left in ``folder``."""
    shape, file, first, steps = pickle.loads((folder / "run").read_bytes())
    (folder / "end").write_bytes(pickle.dumps(go_on(Loop.resumed(shape, file), first, steps)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
