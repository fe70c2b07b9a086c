"""Any sequence of what a training script does: the allocation's laws hold after every move.

Hypothesis drives one run through steps, skipped steps, evaluation, saving and loading, copies, new
layers and changes of the budget. At the end a second run repeats the moves that affect training in
a plain loop, without a scaler, files, copies or evaluation, and must come out the same bit for bit.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import any_allocator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from toy import ToyAdapter, ToyModel, batch, same, weights

from dynalora_optim import (
    DynamicAllocationOptimizer,
    ForwardNorm,
    GradientNorm,
    ImportanceTracker,
    LocalLR,
    Once,
    Pause,
    Periodic,
)
from dynalora_optim.allocation._context import uses_active

LAYERS, MOST_LAYERS, FEATURES, RATE = 3, 6, 4, 0.05
RULES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1),
}
# How the gradients of a step come about. All must come to the same.
WAYS = ["plain", "plain", "closure", "scaler", "evaluation between", "round trip between"]

options = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(sorted(RULES)),
        "measure": st.sampled_from([ForwardNorm(), ForwardNorm(p=1), GradientNorm()]),
        "window": st.sampled_from(["run", "period"]),
        "every": st.sampled_from([1, 1, 2]),
        "probe": st.booleans(),  # of a gradient measure
        "allocator": any_allocator,
        "active": st.integers(1, LAYERS) | st.sampled_from([0.3, 0.5, 0.9]),
        "period": st.integers(1, 3) | st.integers(1, 6).map(Once),
        "seed": st.integers(0, 2**32),
        "warmup": st.sampled_from([0, 0, 2]),
        "lr_time": st.sampled_from(["global", "local", "own"]),
        "activation_warmup": st.sampled_from([0, 3]),
        "on_activate": st.sampled_from(["keep", "reset_momentum", "reset"]),
    }
)


def factor(step: int) -> float:
    """The learning-rate schedule."""
    return 1 / (1 + step / 8)


class Run:
    """A model in training, and what may happen to it. Each method is one move."""

    def __init__(self, chosen: dict[str, Any], *, seed: int = 0, plain: bool = False) -> None:
        rest = dict(chosen)
        inner = RULES[rest.pop("rule")]
        measure, probe = rest.pop("measure"), rest.pop("probe")
        self.probes = probe and isinstance(measure, GradientNorm)
        tracker = ImportanceTracker(
            measure, window=rest.pop("window"), every=rest.pop("every"), probe=self.probes
        )
        if rest["lr_time"] == "own":
            rest["lr_time"] = LocalLR(factor)
        period, warmup = rest.pop("period"), rest.pop("warmup")
        at = period.at if isinstance(period, Once) else period
        rest["period"] = (Once if isinstance(period, Once) else Periodic)(at, warmup=warmup)
        moments, ramp = rest.pop("on_activate"), rest.pop("activation_warmup")
        rest["pause"] = Pause(moments=moments, warmup=ramp)
        if not uses_active(rest["allocator"]):
            del rest["active"]
        self.model = ToyModel(LAYERS, FEATURES, seed)
        self.optimizer = DynamicAllocationOptimizer(
            inner(self.model.parameters()), self.model, importance=tracker, **rest
        )
        self.scheduler = LambdaLR(self.optimizer, factor)
        # Powers of two: scaling the loss changes no bit of an unscaled gradient.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=not plain)

    def backward(self, number: int, how: str = "plain") -> None:
        """Add the gradients of one batch."""
        loss = self.model(batch(number, features=FEATURES)).square().mean()
        if how == "scaler":
            loss = self.scaler.scale(loss)
        loss.backward()
        if how == "evaluation between":
            self.evaluate()
        elif how == "round trip between":
            self.round_trip()

    def step(self, first: int, micro_batches: int, how: str) -> None:
        """Update with the gradients of some batches."""
        numbers = range(first, first + micro_batches)

        def closure() -> float:
            for number in numbers:
                self.backward(number)
            return 0.5

        if how == "closure":
            assert self.optimizer.step(closure) == 0.5
            return
        for number in numbers:
            self.backward(number, how)
        if how == "scaler":
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def overflow(self, number: int) -> None:
        """Run into gradients that are not finite, on which the scaler skips the update."""
        loss = self.model(batch(number, features=FEATURES)).square().mean()
        self.scaler.scale(loss * torch.inf).backward()
        if self.scaler.is_enabled():  # in the plain loop the user does not call step
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def evaluate(self, training: bool = False, grad: bool = True) -> None:
        """Run forward without training on it."""
        self.model.train(training)
        with torch.set_grad_enabled(grad):
            self.model(batch(999, features=FEATURES))
        self.model.train()

    def round_trip(self) -> None:
        """What ``accelerator.prepare`` does."""
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def zero_grad(self, set_to_none: bool) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step_scheduler(self) -> None:
        """Lower the rates."""
        self.scheduler.step()

    def set_active(self, active: float) -> None:
        """Change the budget."""
        if uses_active(self.optimizer.allocator):
            self.optimizer.active = active

    def append_layer(self) -> None:
        """Adapt one more layer."""
        torch.manual_seed(len(self.model.layers))
        layer = ToyAdapter(FEATURES)
        self.model.layers.append(nn.Sequential(layer, nn.Tanh()))
        self.optimizer.add_param_group({"params": [layer.A, layer.B], "lr": RATE})
        # torch's schedulers do not take in new param groups: build it anew, as old as it was.
        epoch = self.scheduler.last_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", RATE)
        self.scheduler = LambdaLR(self.optimizer, factor)
        self.scheduler.last_epoch = epoch
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor(epoch)

    def adapters(self) -> dict[str, ToyAdapter]:
        """The adapters by the names of their groups."""
        return {f"layers.{i}.0": layer[0] for i, layer in enumerate(self.model.layers)}

    def flags(self) -> list[bool]:
        """Which adapters are switched on."""
        return [adapter.active for adapter in self.adapters().values()]

    def state(self) -> dict[str, Any]:
        """What a script saves."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """What a script does with it."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class TrainingScript(RuleBasedStateMachine):
    """One run, its moves, and a ledger of what must have come of them."""

    @initialize(chosen=options)
    def begin(self, chosen):
        self.chosen = chosen
        self.run = Run(chosen)
        self.active = chosen["active"]
        self.moves: list[tuple[str, tuple[Any, ...]]] = []
        self.batches = 0  # used so far
        self.steps = 0  # made by the optimizer
        self.active_sum = 0  # of the sizes of the active sets that these steps found
        self.updated: set[str] = set()
        self.idle: dict[str, list[torch.Tensor]] = {}  # weights of inactive groups
        self.left_behind: list[tuple[Run, dict[str, torch.Tensor], list[bool]]] = []
        self.selected_at: list[int] = []
        self.selection_made()

    def do(self, move: str, *arguments: Any) -> None:
        self.moves.append((move, arguments))
        getattr(self.run, move)(*arguments)

    def selection_made(self) -> None:
        self.selected_at.append(self.steps)
        self.newcomer_waits = False
        modules, active = len(self.run.model.layers), self.active
        self.size = active if isinstance(active, int) else max(1, round(active * modules))
        if self.steps < self.chosen["warmup"]:
            self.size = modules
        elif not uses_active(self.chosen["allocator"]):
            self.size = None  # as the scores have it

    def is_due(self) -> bool:
        since, period = self.steps - self.chosen["warmup"], self.chosen["period"]
        if since <= 0:
            return since == 0
        on_time = since == period.at if isinstance(period, Once) else since % period == 0
        return on_time or self.newcomer_waits

    def take_batches(self, count: int) -> int:
        self.batches += count
        return self.batches - count

    # Moves that affect training

    @rule(
        micro_batches=st.integers(1, 3),
        how=st.sampled_from(WAYS),
        set_to_none=st.booleans(),
    )
    def train(self, micro_batches, how, set_to_none):
        optimizer, adapters = self.run.optimizer, self.run.adapters()
        active = optimizer.active_groups
        if self.run.probes and how == "scaler":
            how = "plain"  # a probe reads gradients as they come, scaled
        self.do("step", self.take_batches(micro_batches), micro_batches, how)
        self.steps += 1
        self.active_sum += len(active)
        self.updated.update(active)
        if self.is_due():
            self.selection_made()
        for name in set(adapters) - set(optimizer.active_groups):
            assert adapters[name].A.grad is None
            assert adapters[name].B.grad is None
        if self.chosen["on_activate"] == "reset":
            for name in set(optimizer.active_groups) - set(active):
                assert adapters[name].A not in optimizer.state
                assert adapters[name].B not in optimizer.state
                self.updated.discard(name)
        self.do("zero_grad", set_to_none)

    @rule()
    def overflow(self):
        self.do("overflow", self.take_batches(1))

    @rule()
    def step_scheduler(self):
        self.do("step_scheduler")

    @rule(active=st.integers(1, LAYERS) | st.sampled_from([0.2, 0.5, 1.0]))
    def set_active(self, active):
        if uses_active(self.chosen["allocator"]):
            self.active = active
        self.do("set_active", active)

    @precondition(lambda self: len(self.run.model.layers) < MOST_LAYERS)
    @rule()
    def append_layer(self):
        optimizer = self.run.optimizer
        if len(optimizer.active_groups) < len(optimizer.groups):
            self.newcomer_waits = True
        else:  # all are active, so the new one is too
            self.selected_at.append(self.steps)
            self.size = None if self.size is None else self.size + 1
        self.do("append_layer")

    # Moves that leave no trace

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.run.zero_grad(set_to_none)

    @rule(mode=st.sampled_from([(False, False), (False, True), (True, False)]))
    def evaluate(self, mode):
        training, grad = mode
        self.run.evaluate(training, grad)

    @precondition(lambda self: not self.run.probes)  # a probe would find them, added to its own
    @rule(value=st.floats(-10, 10, width=32))
    def plant_stale_gradients(self, value):
        for name, adapter in self.run.adapters().items():
            if name not in self.run.optimizer.active_groups:
                adapter.A.grad = torch.full_like(adapter.A, value)

    @rule(used=st.booleans())
    def save_and_load(self, used):
        file = io.BytesIO()
        torch.save(self.run.state(), file)
        file.seek(0)
        fresh = Run(self.chosen, seed=5)
        while len(fresh.model.layers) < len(self.run.model.layers):
            fresh.append_layer()
        if used:  # what it did before must not show
            for number in range(2):
                fresh.step(900 + number, 1, "plain")
                fresh.zero_grad(True)
        fresh.load(torch.load(file, weights_only=True))
        self.run = fresh

    @rule()
    def round_trip(self):
        self.run.round_trip()

    @rule(go_on_with_copy=st.booleans())
    def deepcopy(self, go_on_with_copy):
        twin = copy.deepcopy(self.run)
        if go_on_with_copy:
            self.run, twin = twin, self.run
        self.left_behind.append((twin, weights(twin.model), twin.flags()))

    # Laws

    @invariant()
    def the_active_set_is_of_the_right_size(self):
        groups, active = self.run.optimizer.groups, self.run.optimizer.active_groups
        assert groups == list(self.run.adapters())
        assert active == [name for name in groups if name in set(active)]
        assert len(active) >= 1
        if uses_active(self.chosen["allocator"]):
            assert self.run.optimizer.active == self.active
        assert self.size in (None, len(active))

    @invariant()
    def exactly_the_inactive_adapters_are_switched_off(self):
        active = self.run.optimizer.active_groups
        for name, adapter in self.run.adapters().items():
            # While a probe waits for its backward pass, the inactive ones are on too.
            assert adapter.active == (name in active) or (self.run.probes and adapter.active)
            assert adapter.A.requires_grad
            assert adapter.B.requires_grad

    @invariant()
    def inactive_weights_stand_still(self):
        active = self.run.optimizer.active_groups
        for name, adapter in self.run.adapters().items():
            now = [adapter.A.detach(), adapter.B.detach()]
            if name in active:
                self.idle.pop(name, None)
                continue
            then = self.idle.setdefault(name, [weight.clone() for weight in now])
            assert all(map(torch.equal, now, then)), name

    @invariant()
    def the_record_follows_the_schedule_and_counts_the_steps(self):
        record = self.run.optimizer.record
        assert len(record) == len(self.selected_at)
        assert [entry.step for entry in record] == self.selected_at
        assert sum(record.counts().values()) == self.active_sum
        assert record[-1].chosen == tuple(self.run.optimizer.active_groups)

    @invariant()
    def state_exists_for_what_was_updated_only(self):
        adapters = self.run.adapters()
        expected = {p for name in self.updated for p in (adapters[name].A, adapters[name].B)}
        if self.steps:
            expected.update(self.run.model.head.parameters())
        assert set(self.run.optimizer.state) == expected

    @invariant()
    def importance_sums_to_one(self):
        importance = self.run.optimizer.tracker.importance()
        assert sum(importance.values()) == pytest.approx(1.0)
        assert list(importance) == self.run.optimizer.groups

    def teardown(self):
        if not hasattr(self, "moves"):
            return
        replay = Run(self.chosen, plain=True)
        for move, arguments in self.moves:
            if move == "step":
                replay.step(*arguments[:2], "plain")
            elif move == "zero_grad":
                replay.zero_grad(True)
            else:
                getattr(replay, move)(*arguments)
        optimizer, other = self.run.optimizer, replay.optimizer
        assert same(weights(self.run.model), weights(replay.model))
        assert optimizer.record.state_dict() == other.record.state_dict()
        # As text: a probe that met an overflow holds a nan, which equals nothing.
        assert str(optimizer.tracker.scores()) == str(other.tracker.scores())
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
        for run, before, flags in self.left_behind:
            assert same(weights(run.model), before)
            assert run.flags() == flags


TestTrainingScript = TrainingScript.TestCase
TestTrainingScript.settings = settings(
    max_examples=max(75, settings().max_examples), stateful_step_count=30
)
TestTrainingScript.pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step", "ignore:Seems like"
)
