"""The backward graph as a budget asks for it: the same gradients, and all undone by `close`."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from budgets import (
    MODELS,
    adapted,
    clear,
    costs_of,
    gradients,
    in_blocks,
    on_budget,
    shape,
    some_plans,
)
from tiny_models import TINY, TinyModel
from torch import nn
from toy import ToyAdapter, ToyModel, batch, same, train, weights, wrapped

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import Budget
from dynalora_optim.allocation._costs import Plan

SMALL = replace(TINY, blocks=4)


def seeded_gradients(tiny: TinyModel) -> dict[str, torch.Tensor]:
    clear(tiny)
    torch.manual_seed(7)
    tiny.loss().backward()
    return gradients(tiny)


def double(tiny: TinyModel) -> TinyModel:
    tiny.model.double()
    for key, value in tiny.batch.items():
        if value.is_floating_point():
            tiny.batch[key] = value.double()
    return tiny


@pytest.mark.parametrize(
    ("how", "dtype", "error", "dropout"),
    [("ours", torch.float32, 1e-6, 0.2), ("peft", torch.float64, 1e-12, 0.0)],
)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_unshaped_model(name, how, dtype, error, dropout):
    tiny = adapted(name, how, sizes=replace(SMALL, dropout=dropout))
    tiny = double(tiny) if dtype == torch.float64 else tiny
    expected = seeded_gradients(tiny)
    optimizer = on_budget(tiny)
    tiny.loss()
    costs = costs_of(optimizer)
    for plan in some_plans(costs, 6, seed=1):
        shape(optimizer, plan)
        found = seeded_gradients(tiny)
        trained = {
            name
            for group in optimizer.module_groups
            if group["name"] not in optimizer.groups
            or in_blocks([group["name"]], optimizer) <= plan.active
            for name in group["param_names"]
            if name in expected
        }
        assert found.keys() == trained
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=error, atol=error)


def outputs_with_graph(tiny: TinyModel, optimizer) -> list[bool]:
    recorded: list[bool] = []

    def note(module, args, output):
        if torch._C._current_graph_task_id() == -1:
            first = output if isinstance(output, torch.Tensor) else output[0]
            recorded.append(first.grad_fn is not None)

    blocks = [block.module for block in optimizer._driver._blocks]
    handles = [block.register_forward_hook(note) for block in blocks]
    tiny.loss().backward()
    for handle in handles:
        handle.remove()
    return recorded


@pytest.mark.parametrize("name", MODELS)
def test_below_the_lowest_active_block_no_graph_is_recorded(name):
    tiny = adapted(name, sizes=SMALL)
    optimizer = on_budget(tiny)
    tiny.loss()
    for lowest in range(4):
        shape(optimizer, Plan(frozenset({lowest}), frozenset({3})))
        assert outputs_with_graph(tiny, optimizer) == [b >= lowest for b in range(4)]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_checkpointed_as_planned_and_put_back(name):
    tiny = adapted(name, sizes=SMALL)
    before = state_of(tiny.model)
    optimizer = on_budget(tiny)
    tiny.loss()
    shape(optimizer, Plan(frozenset({1}), frozenset({1, 3})))
    blocks = [block.module for block in optimizer._driver._blocks]
    if hasattr(blocks[0], "gradient_checkpointing"):
        switched = [bool(block.gradient_checkpointing) for block in blocks]
        assert switched == [False, True, False, True]
        assert blocks[1]._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    else:
        assert ["forward" in vars(block) for block in blocks] == [False, True, False, True]
    optimizer.close()
    assert state_of(tiny.model) == before


def state_of(model: nn.Module) -> dict[str, object]:
    """What an optimizer in charge changes in a model."""
    keys = ("forward", "gradient_checkpointing", "_gradient_checkpointing_func", "active")
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        name: [vars(m).get(key) for key in keys]
        + [len(getattr(m, kind)) for kind in hooks]
        + [getattr(getattr(m, "config", None), "use_cache", None)]
        for name, m in model.named_modules()
    }


def test_the_caching_of_keys_and_values_is_off_while_in_charge():
    tiny = adapted("llama", sizes=SMALL)
    assert tiny.model.config.use_cache
    optimizer = on_budget(tiny)
    assert tiny.model(**tiny.batch).past_key_values is None
    assert tiny.model.config.use_cache, "a checkpoint of the model says what it said"
    tiny.model.eval()
    assert tiny.model(**tiny.batch).past_key_values is not None
    tiny.model.train()
    optimizer.close()
    assert tiny.model(**tiny.batch).past_key_values is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_budget_decides_also_what_the_user_has_checkpointed(reentrant):
    """Until it is closed: what the budget has room for is kept, and its shares are of all kept."""
    tiny, plain = adapted("bert", sizes=SMALL), adapted("bert", sizes=SMALL)
    expected = seeded_gradients(tiny)
    tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = state_of(tiny.model)
    optimizer, other = on_budget(tiny, Budget(memory=1.0)), on_budget(plain, Budget(memory=1.0))
    tiny.loss()
    plain.loss()
    costs, uncheckpointed = costs_of(optimizer), costs_of(other)
    assert costs.flops(costs.all_active) == uncheckpointed.flops(costs.all_active)
    # The embeddings' graph, which the switch of transformers asks for, is alive in the forward.
    assert 1 <= costs.peak(costs.all_active) / uncheckpointed.peak(costs.all_active) < 1.1
    shape(optimizer, Plan(frozenset({2}), frozenset({3})))
    blocks = [block.module for block in optimizer._driver._blocks]
    assert [bool(block.gradient_checkpointing) for block in blocks] == [False, False, False, True]
    for name, gradient in seeded_gradients(tiny).items():
        torch.testing.assert_close(gradient, expected[name])
    optimizer.close()
    assert state_of(tiny.model) == before


@pytest.mark.parametrize("on", [True, False])
def test_what_the_user_has_switched_last_stands(on):
    """``gradient_checkpointing_enable()`` and ``_disable()`` in the middle of a run."""
    tiny = adapted("bert", sizes=SMALL)
    optimizer = on_budget(tiny)
    tiny.loss()
    blocks = [block.module for block in optimizer._driver._blocks]
    shape(optimizer, Plan(frozenset({1}), frozenset({1, 3})))
    assert [bool(block.gradient_checkpointing) for block in blocks] == [False, True, False, True]
    if on:
        tiny.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        tiny.model.gradient_checkpointing_disable()
    expected = [block.gradient_checkpointing for block in blocks]
    assert expected == [on] * 4
    optimizer.close()
    assert [block.gradient_checkpointing for block in blocks] == expected


def test_checkpoints_that_the_user_has_switched_off_are_off_afterwards():
    tiny = adapted("bert", sizes=SMALL)
    tiny.model.gradient_checkpointing_enable({"use_reentrant": True})
    tiny.model.gradient_checkpointing_disable()
    before = state_of(tiny.model)
    optimizer = on_budget(tiny)
    tiny.loss()
    shape(optimizer, Plan(frozenset({2}), frozenset({2, 3})))
    assert state_of(tiny.model) != before
    optimizer.close()
    assert state_of(tiny.model) == before


@pytest.mark.parametrize("how", ["ours", "peft"])
def test_enable_input_require_grads_is_undone_with_a_warning(how, caplog):
    tiny = adapted("bert", how, sizes=SMALL)
    (tiny.model if how == "ours" else tiny.model.get_base_model()).enable_input_require_grads()
    optimizer = on_budget(tiny)
    with caplog.at_level(logging.WARNING, logger="dynalora_optim"):
        tiny.loss()
    assert sum("enable_input_require_grads" in r.message for r in caplog.records) == 1
    shape(optimizer, Plan(frozenset({2})))
    assert outputs_with_graph(tiny, optimizer) == [False, False, True, True]
    blocks = [block.module for block in optimizer._driver._blocks]
    optimizer.close()
    inputs = []
    blocks[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0].requires_grad))
    tiny.loss()
    assert inputs == [True]


class Skipping(ToyModel):
    """Layer drop: one of its blocks does not run."""

    def forward(self, x):
        for layer in self.layers[1:]:
            x = layer(x)
        return self.head(x)


class Looped(ToyModel):
    """Every block runs twice."""

    def forward(self, x):
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return self.head(x)


class Preceded(ToyModel):
    """An adapter before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ToyAdapter(8)

    def forward(self, x):
        return super().forward(self.first(x))


class Shared(ToyModel):
    """One block, listed several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0]] * 3)


class Wrapped(nn.Module):
    """A model whose blocks lie in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = ToyModel(), nn.Linear(3, 3)

    def forward(self, x):
        return self.shift(self.inner(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Skipping, r"layers\.0 did not|must run once each"),
        (Looped, r"layers\.0 did not|must run once each"),
        (Preceded, r"'first' runs before the blocks.*always_active=\['first'\]"),
    ],
)
def test_a_forward_that_cannot_be_understood_is_refused_and_leaves_the_model_as_it_was(
    make, message
):
    model = make()
    optimizer = wrapped(model, allocator=Budget(memory=0.8))
    before, values = state_of(model), weights(model)
    with pytest.raises(ValueError, match=message):
        model(batch())
    assert state_of(model) == before
    assert same(values, weights(model))
    optimizer.close()
    assert model(batch()).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Shared, r"several times"),
        (partial(ToyModel, layers=1), r"no repeated blocks.*'discounted'"),
    ],
)
def test_a_model_without_blocks_of_its_own_is_refused_at_once(make, message):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        wrapped(model, allocator=Budget(memory=0.8))
    assert state_of(model) == before


def test_albert_whose_blocks_are_one_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.AlbertForSequenceClassification(config)
    inject(model, LoRAConfig(rank=2, alpha=4, targets=["query", "value"]))
    with pytest.raises(ValueError, match=r"no repeated blocks"):
        wrapped(model, allocator=Budget(memory=0.8))


def test_a_group_before_the_blocks_may_be_always_active():
    model = Preceded()
    optimizer = wrapped(model, allocator=Budget(memory=1.0), always_active=["first"])
    train(model, optimizer, 2)
    assert costs_of(optimizer).prefix
    assert model.first.A in optimizer.state


def test_blocks_in_a_part_of_the_model_are_found():
    model = Wrapped()
    optimizer = wrapped(model, allocator=Budget(memory=0.9), period=1)
    train(model, optimizer, 4)
    assert optimizer._costing.block_names(costs_of(optimizer)) == [
        f"inner.layers.{i}" for i in range(6)
    ]
