"""Inactive means unmoved, ungraded and unsaved, for our protocol and for foreign modules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import ToyAdapter, ToyModel, backward, batch, names, train, weights, wrapped

from dynalora_optim import DynamicAllocationOptimizer


class Foreign(nn.Module):
    """An adapter that knows nothing of the protocol: no flag, its parameters in submodules."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(features, features).requires_grad_(False)
        self.down = nn.Linear(features, 2, bias=False)
        self.up = nn.Linear(2, features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def foreign_model(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(Foreign(), nn.Tanh()) for _ in range(layers)))


def foreign_groups(name: str, module: nn.Module) -> str | None:
    return name if isinstance(module, Foreign) else None


def inactive_parameters(model: nn.Module, optimizer: DynamicAllocationOptimizer) -> list[str]:
    idle = set(optimizer.groups) - set(optimizer.active_groups)
    return [
        name
        for group in optimizer.module_groups
        if group["name"] in idle
        for name in group["param_names"]
    ]


RULES = {
    "SGD with momentum and decay": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}),
}


@pytest.mark.parametrize(("rule", "options"), RULES.values(), ids=RULES)
@given(active=st.integers(1, 5), seed=st.integers(0, 100))
def test_inactive_modules_do_not_move_and_active_ones_do(rule, options, active, seed):
    model = ToyModel()
    inner = rule(model.parameters(), lr=0.01, **options)
    optimizer = DynamicAllocationOptimizer(inner, model, active=active, period=2, seed=seed)
    for step in range(6):
        before, frozen = weights(model), inactive_parameters(model, optimizer)
        backward(model, step)
        assert all(model.get_parameter(name).grad is None for name in frozen)
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, old in before.items() if not torch.equal(old, weights(model)[name])}
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert moved == trainable - set(frozen)


@pytest.mark.parametrize("stale", ["zero", "ones"])
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
def test_a_gradient_put_on_a_frozen_module_does_not_move_it(rule, stale):
    model = ToyModel()
    optimizer = wrapped(model, rule, active=2, period=100)
    train(model, optimizer, 2)
    frozen, before = inactive_parameters(model, optimizer), weights(model)
    assert frozen
    for name in frozen:
        parameter = model.get_parameter(name)
        parameter.grad = torch.full_like(parameter, 0.0 if stale == "zero" else 1.0)
    optimizer.step()
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in frozen)
    assert all(model.get_parameter(name).grad is None for name in frozen)


def test_a_module_that_becomes_active_later_is_trained():
    # Systems that build their optimizer from what is unfrozen at the time never train the rest.
    model = ToyModel()
    optimizer = wrapped(model, active=1, period=1, allocator="round_robin")
    before = weights(model)
    train(model, optimizer, 6)
    after = weights(model)
    for name in names():
        assert not torch.equal(after[f"{name}.A"], before[f"{name}.A"])
    assert optimizer.record.counts() == dict.fromkeys(names(), 1)


def test_requires_grad_stays_true_for_ever():
    model = ToyModel()
    optimizer = wrapped(model, active=1, period=1)
    train(model, optimizer, 4)
    assert all(p.requires_grad for layer in model.layers for p in (layer[0].A, layer[0].B))


def test_the_output_does_not_depend_on_what_is_active():
    model = ToyModel()
    expected = model(batch())
    wrapped(model, active=1)
    assert torch.equal(model(batch()), expected)


def test_active_gradients_are_those_of_the_free_model():
    free, model = ToyModel(), ToyModel()
    optimizer = wrapped(model, active=3)
    backward(free)
    backward(model)
    frozen = inactive_parameters(model, optimizer)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in frozen:
            assert torch.equal(parameter.grad, free.get_parameter(name).grad), name


def test_states_appear_when_a_module_is_first_active():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1, allocator="round_robin")
    sizes = []
    for step in range(4):
        train(model, optimizer, 1, start=step)
        sizes.append(len(optimizer.state))
    assert sizes == [6, 10, 14, 14], "two modules and the head, then two more, then all"


def test_update_counters_count_updates_not_selections():
    model = ToyModel()
    optimizer = wrapped(model, active=6, period=1)
    optimizer.step()  # no gradient anywhere
    assert set(optimizer._allocation.updates.values()) == {0}
    train(model, optimizer, 2)
    assert set(optimizer._allocation.updates.values()) == {2}


def test_always_active_groups_are_not_allocated():
    model = ToyModel()
    optimizer = wrapped(model, active=1, period=1, always_active=["layers.5.*", "layers.0.0"])
    assert optimizer.groups == names()[1:5]
    for step in range(3):
        before = weights(model)
        train(model, optimizer, 1, start=step)
        for layer in (0, 5):
            assert not torch.equal(model.layers[layer][0].A, before[f"layers.{layer}.0.A"])


# Foreign modules, made inactive from outside


def saved_bytes(loss_of) -> int:
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of()
    return sum(storages.values())


def test_a_foreign_module_is_made_inactive_to_the_same_effect():
    model = foreign_model()
    free = foreign_model()
    x = batch()
    optimizer = wrapped(model, groups=foreign_groups, active=2, period=1)
    assert torch.equal(model(x), free(x))
    free_bytes = saved_bytes(lambda: free(x))
    for step in range(4):
        before, frozen = weights(model), inactive_parameters(model, optimizer)
        assert len(frozen) == 2 * 4  # base and adapter: the callable names the whole module
        assert saved_bytes(lambda: model(x)) < free_bytes
        backward(model, step)
        assert all(model.get_parameter(name).grad is None for name in frozen)
        optimizer.step()
        optimizer.zero_grad()
        after = weights(model)
        assert all(torch.equal(after[name], before[name]) for name in frozen)
        assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_foreign_module_stays_inactive_under_checkpointing(use_reentrant):
    model = foreign_model()
    optimizer = wrapped(model, groups=foreign_groups, active=2)
    h = batch().requires_grad_()
    for layer in model:
        h = checkpoint(layer, h, use_reentrant=use_reentrant)
    h.square().mean().backward()
    frozen = inactive_parameters(model, optimizer)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert (parameter.grad is not None) == (parameter.requires_grad and name not in frozen)


def test_parameters_return_when_the_forward_raises():
    class Fails(Foreign):
        def forward(self, x):
            raise RuntimeError("planted")

    model = nn.Sequential(Fails(), Fails())
    expected = dict(model.named_parameters())
    wrapped(model, groups=foreign_groups, active=1)
    for module in model:
        with pytest.raises(RuntimeError, match="planted"):
            module(batch())
    assert dict(model.named_parameters()) == expected


def test_a_parameter_used_behind_the_modules_back_is_still_not_moved():
    # A weight read without calling its module gets a gradient; the update leaves it out.
    model = foreign_model(2)
    optimizer = wrapped(model, groups=foreign_groups, active=1)
    (idle,) = set(optimizer.groups) - set(optimizer.active_groups)
    weight = model.get_submodule(idle).up.weight
    before = weight.detach().clone()
    (model(batch()).sum() + weight.square().sum()).backward()
    assert weight.grad is not None
    optimizer.step()
    assert torch.equal(weight, before)


def test_an_adapter_without_a_flag_is_treated_as_foreign():
    class Flagless(ToyAdapter):
        def __init__(self, features):
            super().__init__(features)
            del self.active

        def forward(self, x):
            return self.base(x) + x @ self.A.T @ self.B.T

    model = nn.Sequential(Flagless(8), Flagless(8))
    optimizer = wrapped(model, active=1)
    backward(model)
    idle = [name for name in optimizer.groups if name not in optimizer.active_groups]
    assert [model.get_submodule(name).A.grad for name in idle] == [None]
