"""Copies of a model come out fully active; a plain optimizer over a live model is told."""

from __future__ import annotations

import copy
import gc
import io
import logging
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict
from kinds import KINDS, each_kind, made
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from toy import ToyModel, backward, batch, same, train, weights, wrapped

from dynalora_optim import DynamicAllocationOptimizer, ImportanceTracker


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
    "twice": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@each_kind
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_trains_all_its_modules_as_a_model_that_was_never_driven(kind, how):
    model, optimizer = made(kind, active=1, period=3)
    train(model, optimizer, 2)
    duplicate = COPIES[how](model)
    fresh = KINDS[kind][0]()
    fresh.load_state_dict(model.state_dict())
    active = list(optimizer.active_groups)
    for one in (duplicate, fresh):
        train(one, AdamW(one.parameters(), lr=0.01), 3)
    assert same(weights(duplicate), weights(fresh))
    backward(duplicate)
    assert not any(p.grad is None for p in duplicate.parameters() if p.requires_grad)
    assert optimizer.active_groups == active, "the model itself is as it was"
    backward(model)
    idle = set(optimizer.groups) - set(active)
    held = {id(p) for g in optimizer.module_groups if g["name"] in idle for p in g["params"]}
    assert all(p.grad is None for p in model.parameters() if id(p) in held)


def trained_here(models: dict[str, nn.Module]) -> dict[str, Any]:
    """The weights after three steps, as arrays, and the parameters that then get no gradient."""
    ends: dict[str, Any] = {}
    for kind, model in models.items():
        train(model, AdamW(model.parameters(), lr=0.01), 3)
        backward(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        without = [n for n, p in trained.items() if p.grad is None]
        ends[kind] = {n: w.numpy() for n, w in weights(model).items()}, without
    return ends


def test_a_model_that_is_sent_to_a_spawned_process_trains_whole_there():
    driven, never = {}, {}
    held = []
    for kind, (make, _) in KINDS.items():
        driven[kind], optimizer = made(kind, active=1, period=3)
        held.append(optimizer)
        train(driven[kind], optimizer, 2)
        never[kind] = make()
        never[kind].load_state_dict(copy.deepcopy(driven[kind].state_dict()))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(trained_here, (driven,))
    for kind, (ends, without) in trained_here(never).items():
        assert without == found[kind][1] == []
        assert all((found[kind][0][name] == end).all() for name, end in ends.items())
    assert all(len(optimizer.active_groups) == 1 for optimizer in held)


class Checkpointed(nn.Module):
    """A model that recomputes its layers in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        *layers, head = getattr(self.model, "layers", self.model)
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return getattr(self.model, "head", head)(x)


@each_kind
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model_that_recomputes_its_blocks_trains_all_its_modules(kind, how):
    make, rule = KINDS[kind]
    model = Checkpointed(make())
    optimizer = wrapped(model, active=1, period=3, **rule)
    train(model, optimizer, 2)
    duplicate, fresh = COPIES[how](model), Checkpointed(make())
    fresh.load_state_dict(model.state_dict())
    for one in (duplicate, fresh):
        train(one, AdamW(one.parameters(), lr=0.01), 3)
    assert same(weights(duplicate), weights(fresh))
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other, 2, start=2)
    train(model, optimizer, 2, start=2)
    assert same(weights(twin), weights(model)), "the choice goes on with a copy of both"


@each_kind
def test_a_copy_of_model_and_optimizer_keeps_the_choice(kind):
    model, optimizer = made(kind, active=1, period=3)
    train(model, optimizer, 2)
    for twin, other in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        backward(model)
        backward(twin)
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        assert [a.grad is None for a, _ in pairs] == [p.grad is None for p in twin.parameters()]
        assert other.active_groups == optimizer.active_groups
        optimizer.zero_grad()


def test_copies_are_active_also_after_an_optimizer_that_was_replaced_is_deleted():
    model = ToyModel()
    former = wrapped(model, active=1)
    optimizer = wrapped(model, active=1)
    del former
    gc.collect()
    copied = copy.deepcopy(model)
    assert all(layer[0].active for layer in copied.layers)
    assert len(optimizer.active_groups) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("seen", [False, True])
def test_copies_are_active_also_while_a_probe_is_open(copied, seen):
    model = ToyModel()
    tracker = ImportanceTracker("gradient", probe=True)
    optimizer = wrapped(model, active=1, importance=tracker)
    if seen:
        backward(model)
    twin = copied(model)
    backward(twin)
    twin.zero_grad()
    backward(twin)
    assert all(p.grad is not None for layer in twin.layers for p in (layer[0].A, layer[0].B))
    backward(model, 1)
    assert len(optimizer.active_groups) == 1


def test_after_close_nothing_is_left_in_the_modules():
    model = ToyModel()
    before = [set(vars(module)) for module in model.modules()]
    optimizer = wrapped(model, active=1)
    copy.deepcopy(model)
    optimizer.close()
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_plain_optimizer_over_a_live_model_is_told_once(caplog):
    model = ToyModel()
    optimizer = wrapped(model, active=1)
    train(model, optimizer, 1)
    assert not caplog.records
    stranger = SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        train(model, stranger, 3)
    (record,) = caplog.records
    assert "SGD trains 6 of the 6 module groups" in record.getMessage()
    assert "close()" in record.getMessage()


STEPS: dict[str, Callable[[Any], object]] = {
    "step": lambda inner: inner.step(),
    "GradScaler": lambda inner: torch.amp.GradScaler("cpu", enabled=False).step(inner),
    "wrapper": lambda inner: Outer(inner).step(),
}


class Outer(torch.optim.Optimizer):
    """As Lookahead is written: an optimizer that holds another, and its groups."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([torch.zeros(1)], {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step()


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("before", ["at once", "after steps of its own", "after loading"])
def test_steps_of_the_wrapped_optimizer_itself_are_told_once(how, before, caplog):
    model = ToyModel()
    inner = AdamW(model.parameters(), lr=0.01)
    optimizer = DynamicAllocationOptimizer(inner, model, active=1, period=1)
    if before != "at once":
        train(model, optimizer, 2)
    if before == "after loading":
        inner.load_state_dict(inner.state_dict())
    assert not caplog.records
    for _ in range(3):
        backward(model)
        STEPS[how](inner)
    (line,) = caplog.messages
    assert "step() of the wrapped AdamW was called" in line
    assert "Pass the DynamicAllocationOptimizer" in line
    assert "close()" in line


class Patched(AdamW):
    """Calls the step of its base class, which has hooks too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("rule", [AdamW, Patched])
@pytest.mark.parametrize("patched", [False, True])
def test_steps_that_our_optimizer_makes_are_not_told(rule, patched, caplog):
    model = ToyModel()
    AdamW(model.parameters())  # so that its class has the hooks
    inner = rule(model.parameters(), lr=0.01)
    if patched:
        step = inner.step
        inner.step = lambda closure=None: step(closure)
    optimizer = DynamicAllocationOptimizer(inner, model, active=2, period=1)
    train(model, optimizer, 2)
    train(model, Outer(optimizer), 2)
    train(model, Outer(Outer(optimizer)), 2)
    torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    optimizer.close()
    train(model, inner, 2)
    train(model, Outer(inner), 2)
    assert not caplog.records
    assert len(optimizer.record) == 9


def test_saving_the_wrapped_optimizer_is_not_told(caplog):
    model = ToyModel()
    inner = AdamW(model.parameters(), lr=0.01)
    optimizer = DynamicAllocationOptimizer(inner, model, active=1.0)
    torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, inner)
    assert not caplog.records
    assert len(optimizer.groups) == 6


def test_others_are_not_told(caplog):
    model, other = ToyModel(), ToyModel()
    head = list(model.head.parameters())
    optimizer = wrapped(model, active=1)
    strangers = [SGD(head, lr=0.1), SGD(other.parameters(), lr=0.1)]
    backward(model)
    backward(other)
    for stranger in strangers:
        stranger.step()
    optimizer.step()
    duplicate = copy.deepcopy(model)
    train(duplicate, SGD(duplicate.parameters(), lr=0.1), 1)
    optimizer.close()
    train(model, SGD(model.parameters(), lr=0.1), 1)
    assert not caplog.records


@each_kind
def test_a_shallow_copy_of_a_module_is_one_of_an_active_module(kind):
    model, optimizer = made(kind, active=1, period=9)
    for module in list(optimizer._driver.modules()):
        names = set(vars(module))
        twin = copy.copy(module)
        assert type(twin) is type(module)
        assert getattr(twin, "active", True)
        assert vars(twin).keys() == names - {"__deepcopy__", "__reduce_ex__"}
        assert set(vars(module)) == names
        mine, its = module.named_parameters(), twin.named_parameters()
        assert all(a is b for (_, a), (_, b) in zip(mine, its, strict=True))
        torch.testing.assert_close(twin(batch()), module(batch()))
    backward(model)
    idle = set(optimizer.groups) - set(optimizer.active_groups)
    held = [p for g in optimizer.module_groups if g["name"] in idle for p in g["params"]]
    assert all(parameter.grad is None for parameter in held)


@each_kind
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("when", ["within the forward", "after an interrupt"])
def test_a_copy_of_a_module_that_runs_trains_whole(kind, how, training, when):
    model, optimizer = made(kind, active=1, period=9)
    train(model, optimizer, 2)
    copies: list[nn.Module] = []

    def interrupt(*_: object) -> None:  # in each module in turn: one of them is active
        handle.remove()
        if when == "within the forward":
            copies.append(COPIES[how](model))
        else:
            raise KeyboardInterrupt

    for module in list(optimizer._driver.modules()):
        handle = next(module.children()).register_forward_pre_hook(interrupt)
        model.train(training)
        if when == "within the forward":
            backward(model)
        else:
            with pytest.raises(KeyboardInterrupt):
                model(batch())
            copies.append(COPIES[how](model))
        model.train()
    fresh = KINDS[kind][0]()
    fresh.load_state_dict(model.state_dict())
    for one in (fresh, *copies):
        one.train()
        train(one, AdamW(one.parameters(), lr=0.01), 3)
    assert len(copies) == len(optimizer.groups)
    assert all(same(weights(one), weights(fresh)) for one in copies)
    assert len(optimizer.active_groups) == 1
    backward(model)
    backward(model)
    idle = set(optimizer.groups) - set(optimizer.active_groups)
    held = [p for g in optimizer.module_groups if g["name"] in idle for p in g["params"]]
    assert all(parameter.grad is None for parameter in held), "the model itself is as it was"


def test_parametrized_weights_train_as_with_the_plain_optimizer():
    ends = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.orthogonal(model[2])
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
        if wrap:
            optimizer = DynamicAllocationOptimizer(
                optimizer, model, active=1.0, groups=lambda name, _: name if name in "02" else None
            )
        for _ in range(5):
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
