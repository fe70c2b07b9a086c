"""Models and optimizers that change, are copied, interrupted or thrown away in mid-training."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import KINDS, Foreign, assert_as_torch, decided, each_kind, foreign_groups, hooks, made
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.flop_counter import FlopCounterMode
from toy import ToyAdapter, ToyModel, backward, batch, names, same, train, weights, wrapped

from dynalora_adapters import LoRAConfig, inject, remove
from dynalora_optim import (
    AllocationContext,
    Allocator,
    Budget,
    DiscountedStochastic,
    DynamicAllocationOptimizer,
    Ema,
    Once,
    Pause,
    Periodic,
    RoundRobin,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)


def test_an_optimizer_can_be_collected_while_other_code_uses_fake_tensors():
    """Measuring a copy does, and so do torch.compile and estimates of memory."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    inject(model, LoRAConfig(rank=2, alpha=4, targets="all-linear"))
    optimizer = DynamicAllocationOptimizer(AdamW(model.parameters()), model, active=1)
    assert sum(layer.active for layer in model) == 1
    optimizer.itself = optimizer  # so that only a garbage collection deletes it
    kept = weakref.ref(optimizer)
    del optimizer
    with FakeTensorMode(), FlopCounterMode(display=False):
        gc.collect()
    assert kept() is None
    assert not hooks(model)
    assert all(layer.active for layer in model)
    model(torch.ones(1, 4)).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in model)


# Modules that come and go


def test_deleted_modules_are_left_alone_as_by_plain_torch():
    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        train(model, optimizer, 3)
        del model.layers[3:]
        train(model, optimizer, 3, start=3)

    assert_as_torch("flagged", loop)


def test_a_run_goes_on_and_resumes_without_the_deleted_modules():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1, allocator="round_robin")
    train(model, optimizer, 2)
    del model.layers[4:]
    train(model, optimizer, 6)
    twin, other = copy.deepcopy((model, optimizer))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (twin, other)):
        train(*pair, 4, start=8)
    assert same(weights(model), weights(twin))
    assert decided(other) == decided(optimizer)


def test_modules_may_be_added_after_others_were_deleted():
    model = ToyModel()
    optimizer = wrapped(model, active=6, period=1)
    train(model, optimizer, 2)
    del model.layers[4:]
    model.late = ToyAdapter(3)
    model.head = nn.Sequential(model.head, model.late)
    del model.late
    optimizer.add_param_group({"params": [model.head[1].A, model.head[1].B]})
    before = weights(model)
    train(model, optimizer, 3)
    assert not torch.equal(before["head.1.A"], weights(model)["head.1.A"])
    assert set(optimizer.groups) == {*names(6), "head.1"}


def test_a_module_that_takes_anothers_name_is_refused():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1)
    train(model, optimizer, 2)
    model.layers[5] = nn.Sequential(ToyAdapter(8), nn.Tanh())
    before = optimizer.state_dict()["param_groups"]
    with pytest.raises(
        ValueError, match=r"group 'layers.5.0' no longer has the modules.*close\(\)"
    ):
        optimizer.add_param_group({"params": list(model.layers[5][0].parameters())})
    assert optimizer.state_dict()["param_groups"] == before
    assert not model.layers[5][0]._forward_hooks


def two_towers() -> nn.Module:
    torch.manual_seed(0)
    towers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
    model = nn.Sequential(*towers)
    inject(towers[0], LoRAConfig(rank=2, alpha=4, targets="all-linear"))
    return model


def test_adapters_injected_later_train_as_with_plain_torch():
    def run(wrap: bool) -> dict[str, Tensor]:
        model = two_towers()
        optimizer: Optimizer = AdamW(model.parameters(), lr=0.05)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0, period=2)
        train(model, optimizer, 3)
        optimizer.zero_grad()
        inject(model[1], LoRAConfig(rank=2, alpha=4, targets="all-linear"))
        optimizer.add_param_group(
            {"params": [p for n, p in model[1].named_parameters() if "lora_" in n]}
        )
        train(model, optimizer, 3, start=3)
        return weights(model)

    assert same(run(False), run(True))


def test_a_loop_goes_on_after_remove_as_with_plain_torch():
    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        train(model, optimizer, 3)
        remove(model)
        train(model, optimizer, 3, start=3)

    assert_as_torch("lora", loop)
    model, optimizer = made("lora", active=2)
    loop(model, optimizer)
    assert sum(optimizer.tracker.importance().values()) == pytest.approx(1)
    optimizer.close()
    assert hooks(model) == 0


# Two optimizers


def towers(active: float, **second: Any) -> tuple[nn.Module, list[DynamicAllocationOptimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(ToyModel(4), nn.Linear(3, 8), KINDS["foreign"][0]())
    first = wrapped(model[0], active=active, period=2)
    options = {"active": active, "period": 3, "groups": foreign_groups, "seed": 1, **second}
    return model, [first, wrapped(model[2], **options)]


def train_both(model: nn.Module, optimizers: list[Any], steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def test_two_optimizers_over_an_encoder_and_a_decoder_are_two_plain_ones():
    plain, _ = towers(1.0)
    plain = copy.deepcopy(plain)
    train_both(plain, [AdamW(part.parameters(), lr=0.05) for part in (plain[0], plain[2])], 6)
    model, optimizers = towers(1.0)
    train_both(model, optimizers, 6)
    assert same(weights(plain), weights(model))


def test_two_optimizers_do_not_disturb_each_other():
    model, (first, second) = towers(1)
    train_both(model, [first, second], 5)
    assert [len(o.active_groups) for o in (first, second)] == [1, 1]
    second.close()
    flags = [layer[0].active for layer in model[0].layers]
    assert flags.count(True) == 1
    assert hooks(model[2]) == 0
    before = weights(model[2])
    train(model, first, 2)
    assert flags.count(True) == 1
    assert same(before, weights(model[2]))


# Copies


@each_kind
def test_a_copy_of_the_model_alone_disturbs_nobody(kind):
    model, optimizer = made(kind, active=2)
    train(model, optimizer, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(duplicate, AdamW(duplicate.parameters()), 2)
    for pair in ((model, optimizer), (twin, twin_optimizer)):
        train(*pair, 4, start=3)
    assert same(weights(model), weights(twin))
    assert decided(optimizer) == decided(twin_optimizer)


@each_kind
def test_a_copy_of_the_model_alone_can_be_driven_by_an_optimizer_of_its_own(kind):
    model, optimizer = made(kind, active=1)
    train(model, optimizer, 3)
    duplicate = copy.deepcopy(model)
    fresh, rule = KINDS[kind][0](), KINDS[kind][1]
    fresh.load_state_dict(model.state_dict())
    for one in (duplicate, fresh):
        train(one, wrapped(one, active=1.0, **rule), 3)
    assert same(weights(duplicate), weights(fresh))
    assert not any(parameter.grad is None for parameter in trained(duplicate, kind))


def trained(model: nn.Module, kind: str) -> list[Tensor]:
    """The parameters that have a gradient after a backward pass of ``model`` with no optimizer."""
    backward(model)
    return [p for p in model.parameters() if p.requires_grad]


def test_a_copy_of_the_tracker_keeps_its_scores():
    model, optimizer = made("flagged", active=2)
    train(model, optimizer, 3)
    scores = optimizer.tracker.scores()
    duplicates = [copy.deepcopy(optimizer.tracker), pickle.loads(pickle.dumps(optimizer.tracker))]
    train(model, optimizer, 3, start=3)
    assert optimizer.tracker.scores() != scores
    assert [duplicate.scores() for duplicate in duplicates] == [scores, scores]


CONTEXT: dict[str, Any] = {
    "scores": (5.0, 1.0, 3.0, 2.0),
    "updates": (4, 0, 1, 2),
    "active": 2,
    "reallocation": 3,
}
ALLOCATORS: list[Allocator] = [
    TopK(),
    Threshold(0.7),
    Stochastic(),
    Stochastic("bernoulli"),
    DiscountedStochastic(),
    UniformRandom(),
    RoundRobin(),
]


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_copies_of_allocators_select_alike(allocator):
    def selections(one: Allocator) -> list[list[int]]:
        contexts = (AllocationContext(generator=random.Random(i), **CONTEXT) for i in range(20))
        return [list(one.select(context)) for context in contexts]

    for duplicate in (copy.deepcopy(allocator), pickle.loads(pickle.dumps(allocator))):
        assert duplicate == allocator
        assert selections(duplicate) == selections(allocator)


@pytest.mark.parametrize("value", [Budget(memory=0.5), Periodic(3), Once(4), Ema(0.5)], ids=repr)
def test_copies_of_settings_are_equal(value):
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("then", ["go on", "step", "close", "copy", "reallocate and probe"])
def test_a_forward_that_is_interrupted_takes_no_parameter_away(error, then):
    # torch runs hooks after an Exception, but not after these.
    options = {"importance": "gradient"} if then == "reallocate and probe" else {}
    model, optimizer = made("foreign", active=1, period=1, **options)
    parameters = dict(model.named_parameters())
    train(model, optimizer, 2)
    backward(model)
    for layer in model[:4]:
        layer.raises = error()
        with pytest.raises(error):
            model(batch())
        layer.raises = None
    if then == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
        parameters = {n: optimizer_parameter(optimizer, n) for n in parameters}
    elif then == "close":
        optimizer.close()
    elif then != "go on":
        optimizer.step()
    if then in ("go on", "copy"):
        train(model, optimizer, 2)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]


def rebuilt(model: nn.Module, optimizer: DynamicAllocationOptimizer) -> None:
    """What a notebook does when the cell that builds the optimizer runs again."""
    assert list(model.parameters()) == optimizer.param_groups[0]["params"]
    train(model, wrapped(model, active=1, groups=foreign_groups), 2)


def loaded(model: nn.Module, optimizer: DynamicAllocationOptimizer) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert all(p.data_ptr() == state[n].data_ptr() for n, p in model.named_parameters())


def converted(model: nn.Module, optimizer: DynamicAllocationOptimizer) -> None:
    model.double()
    assert model(batch().double()).dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}


AFTERWARDS: dict[str, Callable[[nn.Module, DynamicAllocationOptimizer], object]] = {
    "optimizer": rebuilt,
    "load assign": loaded,
    "double": converted,
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "step": lambda model, optimizer: optimizer.step(),
    "state_dict": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "hold": lambda model, optimizer: optimizer.hold(optimizer.groups[1:2]),
    "active_parameters": lambda model, optimizer: optimizer.active_parameters(),
    "close": lambda model, optimizer: optimizer.close(),
    "part": lambda model, optimizer: model[:3](batch()),
}


@pytest.mark.parametrize("then", AFTERWARDS)
@pytest.mark.parametrize("at", ["the first forward", "a later one"])
@pytest.mark.parametrize("training", [True, False])
def test_whatever_comes_after_an_interrupt_finds_the_parameters(then, at, training):
    model, optimizer = made("foreign", active=1, period=9)
    if at == "a later one":
        train(model, optimizer, 1)
    held = set(optimizer.param_groups[0]["params"])
    for layer in model[:4]:
        layer.raises = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            model.train(training)(batch())
        layer.raises = None
        if then in ("optimizer", "close"):
            continue
        AFTERWARDS[then](model.train(), optimizer)
        model.float()
    if then in ("optimizer", "close"):
        AFTERWARDS[then](model.train(), optimizer)
    if then != "load assign":
        assert set(model.parameters()) == held
    if then not in ("optimizer", "close", "load assign"):
        before = weights(model)
        backward(model)
        optimizer.step()
        moved = {n[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {*optimizer.active_groups, "4"}


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_a_forward_has_used_is_freed_at_once(interrupted):
    model, optimizer = made("foreign", active=1, period=9)
    x = batch()
    input_of_model = weakref.ref(x)
    gc.disable()
    try:
        if interrupted:
            model[0].raises = model[1].raises = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                model(x)
            model[0].raises.__traceback__ = model[1].raises.__traceback__ = None
            model.zero_grad()
        else:
            model(x).sum().backward()
        del x
        assert input_of_model() is None
    finally:
        gc.enable()
    assert len(optimizer.active_groups) == 1


def test_a_model_that_was_interrupted_can_be_thrown_away():
    def interrupted() -> weakref.ref[nn.Module]:
        model, _optimizer = made("foreign", active=1, period=9)
        for layer in model[:2]:
            layer.raises = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                model(batch())
            layer.raises = None
        return weakref.ref(model)

    model = interrupted()
    gc.collect()
    assert model() is None


def test_modules_that_contain_each_other_find_their_parameters_after_an_interrupt():
    torch.manual_seed(0)
    inner, model = Foreign(), nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3))
    model[0].append(inner)
    rule = {"groups": lambda name, _: {"0": "a", "0.0": "a", "0.1": "a", "1": "b"}.get(name)}
    parameters = dict(model.named_parameters())
    optimizer = wrapped(model, active=1, **rule)
    optimizer.hold(["b"])
    inner.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(batch())
    inner.raises = None
    optimizer.step()
    assert all(parameter is parameters[n] for n, parameter in model.named_parameters())


def optimizer_parameter(optimizer: Optimizer, name: str) -> Tensor:
    groups = getattr(optimizer, "module_groups", optimizer.param_groups)
    for group in groups:
        if name in group["param_names"]:
            return group["params"][group["param_names"].index(name)]
    raise KeyError(name)


class Interrupted(AdamW):
    """Raises in its ``step``, before any update, while ``interrupts`` is not 0."""

    interrupts = 0

    def step(self, closure: Any = None) -> Any:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize(
    "options", [{}, {"lr_time": "local", "pause": Pause(warmup=2)}], ids=["global", "local"]
)
def test_an_update_that_was_interrupted_can_be_repeated(options):
    def run(interrupts: bool) -> Any:
        model = ToyModel()
        inner = Interrupted(model.parameters(), lr=0.05)
        optimizer = DynamicAllocationOptimizer(inner, model, active=2, period=2, **options)
        scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        for step in range(8):
            backward(model, step)
            if interrupts and step in (0, 3, 4):
                inner.interrupts = 1
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return weights(model), decided(optimizer), optimizer.learning_rates()

    (plain, *expected), (interrupted, *found) = run(False), run(True)
    assert same(plain, interrupted)
    assert found == expected


def test_a_selection_that_was_interrupted_is_made_after_the_next_step():
    class Interrupts(TopK):
        now = False

        def select(self, context: AllocationContext) -> list[int]:
            if self.now:
                raise KeyboardInterrupt
            return super().select(context)

    model = ToyModel()
    optimizer = wrapped(model, active=2, period=3, allocator=Interrupts())
    train(model, optimizer, 2)
    before = decided(optimizer)[2]
    Interrupts.now = True
    backward(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    Interrupts.now = False
    assert optimizer.active_groups == before
    assert [layer[0].active for layer in model.layers] == [name in before for name in names()]
    train(model, optimizer, 3)
    assert [entry.step for entry in optimizer.record] == [0, 4, 6]
