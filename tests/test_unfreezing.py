"""Modules that are frozen at first join when the user unfreezes them."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch.optim import AdamW
from toy import ToyModel, names, same, train, weights, wrapped

from dynalora_optim import Backward, Budget, DynamicAllocationOptimizer


def adapters(model: ToyModel, layers: slice) -> list[torch.nn.Parameter]:
    return [p for layer in model.layers[layers] for p in (layer[0].A, layer[0].B)]


def frozen(last: int = 3) -> ToyModel:
    model = ToyModel()
    for parameter in adapters(model, slice(last, None)):
        parameter.requires_grad_(False)
    return model


def unfreeze(
    model: ToyModel, optimizer: torch.optim.Optimizer, added: bool, first: int = 3
) -> None:
    found = adapters(model, slice(first, None))
    for parameter in found:
        parameter.requires_grad_(True)
    if added:
        optimizer.add_param_group({"params": found, "lr": 0.02})


def held(model: ToyModel, added: bool) -> AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad or not added]
    return AdamW(parameters, lr=0.05)


@pytest.mark.parametrize("first", [0, 3])  # 0: the head alone trains at first
@pytest.mark.parametrize("added", [False, True])
def test_all_active_is_the_plain_optimizer(added, first, caplog):
    model, twin = frozen(first), frozen(first)
    plain = held(model, added)
    optimizer = DynamicAllocationOptimizer(held(twin, added), twin, active=1.0)
    (line,) = caplog.messages
    assert f"every parameter of {6 - first} module group(s), such as layers.{first}.0" in line
    assert optimizer.groups == names(first)
    for one, of in ((model, plain), (twin, optimizer)):
        train(one, of, 2)
        unfreeze(one, of, added, first)
        train(one, of, 3, start=2)
    assert same(weights(model), weights(twin))
    assert optimizer.groups == optimizer.active_groups == names()


def test_the_log_says_which_need_add_param_group(caplog):
    model = frozen()
    kept = [*adapters(model, slice(0, 4)), *model.head.parameters()]  # layers 4 and 5 are left out
    optimizer = DynamicAllocationOptimizer(AdamW(kept, lr=0.05), model, active=1.0)
    held, lacking = caplog.messages
    assert "of 1 module group(s), such as layers.3.0" in held
    assert "add_param_group" not in held
    assert "of 2 module group(s), such as layers.4.0" in lacking
    assert "add_param_group() with their parameters, which the optimizer lacks" in lacking
    for parameter in adapters(model, slice(3, None)):
        parameter.requires_grad_(True)
    train(model, optimizer, 2)
    assert optimizer.groups == names(4)  # as with a plain optimizer, the others do not train
    optimizer.add_param_group({"params": adapters(model, slice(4, None))})
    train(model, optimizer, 2)
    assert optimizer.groups == names()


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("added", [False, True])
def test_they_are_chosen_like_the_others_from_then_on(added, first):
    model = frozen(first)
    optimizer = DynamicAllocationOptimizer(
        held(model, added), model, active=2, period=1, allocator="round_robin"
    )
    train(model, optimizer, 2)
    unfreeze(model, optimizer, added, first)
    chosen = set()
    for step in range(2, 9):
        before = weights(model)
        idle = set(names()) - set(optimizer.active_groups)
        train(model, optimizer, 1, start=step)
        after = weights(model)
        for name in idle:
            assert torch.equal(before[f"{name}.A"], after[f"{name}.A"])
        chosen |= set(optimizer.active_groups)
        assert len(optimizer.active_groups) == 2
    assert chosen == set(names())


@pytest.mark.parametrize("first", [0, 3])
def test_a_run_resumes_after_they_have_joined(first):
    def make():
        model = frozen(first)
        return model, wrapped(model, active=2, period=2)

    (model, optimizer), (twin, other) = make(), make()
    train(model, optimizer, 2)
    unfreeze(model, optimizer, added=False, first=first)
    train(model, optimizer, 3, start=2)
    twin.load_state_dict(model.state_dict())
    unfreeze(twin, other, added=False, first=first)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, of in ((model, optimizer), (twin, other)):
        train(one, of, 4, start=5)
    assert same(weights(model), weights(twin))
    assert optimizer.record.state_dict() == other.record.state_dict()


def test_a_run_with_a_head_alone_is_saved_and_resumed():
    def begun():
        model = frozen(0)
        return model, wrapped(model, active=2, period=2)

    (model, optimizer), (twin, other) = begun(), begun()
    train(model, optimizer, 3)
    assert optimizer.active_groups == []
    saved = json.loads(json.dumps(optimizer.record.state_dict()))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.record.state_dict() == saved
    for one, of in ((model, optimizer), (twin, other)):
        train(one, of, 2, start=3)
        unfreeze(one, of, added=False, first=0)
        train(one, of, 4, start=5)
    assert same(weights(model), weights(twin))
    assert len(optimizer.active_groups) == 2


def test_a_budget_needs_a_module_that_trains():
    model = frozen(0)
    for options in ({"allocator": Budget(0.5)}, {"backward": Backward(checkpoint_idle=True)}):
        with pytest.raises(ValueError, match="needs the blocks of a module that trains"):
            DynamicAllocationOptimizer(AdamW(model.parameters()), model, **options)


def test_a_cell_that_is_run_again_after_freezing_takes_over(caplog):
    model = ToyModel()
    first = wrapped(model, active=1.0)
    for parameter in adapters(model, slice(3, None)):
        parameter.requires_grad_(False)
    second = wrapped(model, active=1.0)
    assert "takes over the 6 module groups" in caplog.text
    with pytest.raises(RuntimeError, match="close"):
        first.step()
    train(model, second, 1)
    unfreeze(model, second, added=False)
    train(model, second, 1)
    assert second.active_groups == names()


def test_a_run_saved_between_unfreezing_and_the_next_step_resumes():
    def begun():
        model = frozen()
        return model, wrapped(model, active=2, period=1)

    def unfreeze(model):
        for parameter in adapters(model, slice(3, None)):
            parameter.requires_grad_(True)

    model, optimizer = begun()
    train(model, optimizer, 2)
    unfreeze(model)
    resumed, its = begun()
    unfreeze(resumed)
    resumed.load_state_dict(model.state_dict())
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run, one in ((model, optimizer), (resumed, its)):
        train(run, one, 4, start=2)
        assert one.groups == names()
    assert its.record.state_dict() == optimizer.record.state_dict()
    assert same(weights(model), weights(resumed))


@pytest.mark.parametrize("bad", ["record", "modules", "active"])
def test_a_state_that_is_refused_lets_nothing_join(bad):
    source = ToyModel()
    its = wrapped(source, active=2)
    train(source, its, 2)
    state = copy.deepcopy(its.state_dict())
    if bad == "record":
        state["record"] = 3
    else:
        packed = json.loads(state["param_groups"][0]["dynalora"])
        if bad == "active":
            packed["active_setting"] = 7
        else:
            packed["modules"]["layers.4.0"]["updates"] = -1
        state["param_groups"][0]["dynalora"] = json.dumps(packed)
    model = frozen()
    optimizer = wrapped(model, active=2)
    before = optimizer.groups, optimizer.active_groups, weights(model)
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(state)
    assert (optimizer.groups, optimizer.active_groups) == before[:2]
    assert set(optimizer.tracker.scores()) == set(names(3))
    assert same(weights(model), before[2])
    train(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(its.state_dict()))
    assert optimizer.groups == names()
    assert optimizer.active_groups == its.active_groups


def test_modules_that_are_frozen_in_mid_run_are_named_once_and_a_new_optimizer_leaves_them_out(
    caplog,
):
    model = ToyModel(layers=3)
    optimizer = wrapped(model, active=1, period=1, allocator="round_robin")
    train(model, optimizer, 3)
    with caplog.at_level(logging.WARNING, logger="dynalora_optim"):
        model.layers[1].requires_grad_(False)
        before = weights(model)
        train(model, optimizer, 6)
    assert same(
        {name: value for name, value in before.items() if "layers.1" in name},
        {name: value for name, value in weights(model).items() if "layers.1" in name},
    )
    (told,) = [record.getMessage() for record in caplog.records]
    assert "1 module group(s) that are active now, such as layers.1.0" in told
    optimizer = wrapped(model, active=1, period=1, allocator="round_robin")
    assert optimizer.groups == ["layers.0.0", "layers.2.0"]
