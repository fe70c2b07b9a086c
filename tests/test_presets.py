"""Presets against the methods they are named after: the same weights, step by step."""

from __future__ import annotations

import io
import math
import random
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_model import OUTSIDE, LanguageModel, backward, moved, of_layer, train
from torch import nn
from torch.optim import SGD, AdamW
from toy import named, same, weights, wrapped

from dynalora_optim import (
    AllocationContext,
    Backward,
    Blocks,
    Budget,
    DynamicAllocationOptimizer,
    LiveBytes,
    RoundRobin,
    badam,
    blocks_on_budget,
    lisa,
)
from dynalora_optim._base.live_bytes import storage_bytes
from dynalora_optim._base.trees import tensors

PERIOD = 3


def adamw(model: nn.Module, **options: Any) -> AdamW:
    return AdamW(model.parameters(), lr=0.01, **{"weight_decay": 0.1, **options})


# BAdam


def peer(model: nn.Module, order: str) -> Any:
    """The optimizer of the badam package, which counts its steps from 1.

    It switches when ``(global_step + 1) % switch_block_every == 0`` after the count of a step, so
    that its first period has one step less than all others. Counted from -1, all are equal.
    """
    package = pytest.importorskip("badam")
    optimizer = package.BlockOptimizer(
        base_optimizer=adamw(model),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=PERIOD,
        switch_mode=order,
        verbose=0,
    )
    optimizer.global_step = -1
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.filterwarnings("ignore:BAdam expect model to be loaded in fp16/bf16")
def test_badam_is_the_badam_package_to_the_last_bit(order, dtype):
    theirs, ours = LanguageModel().to(dtype), LanguageModel().to(dtype)
    reference = peer(theirs, order)
    optimizer = badam(ours, adamw(ours), period=PERIOD, order=order)
    start, seen = weights(ours), []
    for step in range(5 * PERIOD):
        train(theirs, reference, 1, start=step)
        train(ours, optimizer, 1, start=step)
        assert same(weights(theirs), weights(ours)), f"after step {step}"
        seen += optimizer.active_groups
    assert len(set(seen)) == 4
    assert moved(ours, start) == of_layer(ours, 0, 1, 2, 3)


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
def test_badam_is_algorithm_1(order):
    """Block by block, each time with new moments, by hand."""
    model, twin = LanguageModel(), LanguageModel()
    optimizer = badam(model, adamw(model), period=PERIOD, order=order, seed=3)
    active = ""
    for start in range(0, 6 * PERIOD, PERIOD):
        before, (active,) = active, optimizer.active_groups
        block = twin.get_submodule(active)
        twin.requires_grad_(False)
        block.requires_grad_(True)
        if active != before:  # a random cycle may begin with the block that ended the last
            by_hand = adamw(block)
        train(twin, by_hand, PERIOD, start=start)
        train(model, optimizer, PERIOD, start=start)
        assert same(weights(twin), weights(model))


def test_badam_keeps_the_state_of_one_block():
    model = LanguageModel().bfloat16()
    optimizer = badam(model, adamw(model), period=1)
    for step in range(5):
        (active,) = optimizer.active_groups
        backward(model, step)
        held = set(model.get_submodule(active).parameters())
        assert set(optimizer.state) <= held
        optimizer.step()
        assert not set(optimizer.state) & held, "it has switched"


# LISA


def test_lisa_is_freezing_by_hand_to_the_last_bit():
    """Embeddings, norm and head always, and the layers drawn; moments of all are kept.

    The random layers are read off our record: the reference knows no generator of ours.
    """
    model, twin = LanguageModel(layers=6), LanguageModel(layers=6)
    optimizer = lisa(model, adamw(model), layers=2, period=PERIOD)
    reference = adamw(twin)
    start = weights(model)
    train(model, optimizer, 8 * PERIOD)
    drawn = {event.step: event.chosen for event in optimizer.record}
    assert sorted(drawn) == list(range(0, 8 * PERIOD + 1, PERIOD))
    for step in range(8 * PERIOD):
        if step in drawn:
            for position, layer in enumerate(twin.layers):
                layer.requires_grad_(f"layers.{position}" in drawn[step])
        train(twin, reference, 1, start=step)
    assert same(weights(twin), weights(model))
    assert all(len(set(chosen)) == 2 for chosen in drawn.values())
    assert len(set(drawn.values())) > 3
    assert moved(model, start) >= OUTSIDE


# Blocks on a budget


def whole_peaks(model: nn.Module, optimizer: DynamicAllocationOptimizer, steps: int) -> list[int]:
    """Train, and return for each step the bytes of everything that was alive at its peak."""
    found = []
    for step in range(steps):
        before = storage_bytes([*model.parameters(), *tensors(list(optimizer.state.values()))])
        with LiveBytes() as memory:
            train(model, optimizer, 1, start=step)
        found.append(before + memory.peak)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [1.0, 1.3, 2.0])
def test_blocks_on_a_budget_keep_within_the_total_and_all_train(more, dtype):
    model = LanguageModel().to(dtype)
    optimizer = blocks_on_budget(model, adamw(model), total=1)
    with pytest.raises(ValueError, match="cannot hold a step") as refused:
        train(model, optimizer, 1)
    least = named(refused.value)
    total = int(least * more)
    model = LanguageModel().to(dtype)
    optimizer = blocks_on_budget(model, adamw(model), total=total, period=1)
    start = weights(model)
    assert max(whole_peaks(model, optimizer, 30)) <= total
    assert moved(model, start) == of_layer(model, 0, 1, 2, 3)


@pytest.mark.parametrize("amounts", [{}, {"total": "1GiB", "memory": 0.5}])
def test_blocks_on_a_budget_need_one_amount(amounts):
    model = LanguageModel()
    with pytest.raises(ValueError, match="pass exactly one of them"):
        blocks_on_budget(model, adamw(model), **amounts)


def roomy(model: nn.Module, optimizer: Any, **options: Any) -> DynamicAllocationOptimizer:
    return blocks_on_budget(model, optimizer, memory=0.8, **options)


PRESETS = pytest.mark.parametrize("preset", [lisa, badam, roomy])


# All


@PRESETS
def test_every_setting_of_a_preset_can_be_replaced(preset):
    model = LanguageModel()
    optimizer = preset(
        model,
        SGD(model.parameters(), lr=0.01),
        groups=Blocks(2, "frozen"),
        allocator=RoundRobin("ascending"),
        active=1,
        period=1,
        pause="keep",
        backward=Backward(fused=True),
        always_active=["norm"],
    )
    assert optimizer.groups == ["layers.0-1", "layers.2-3"]
    before = weights(model)
    train(model, optimizer, 1)
    assert moved(model, before) == of_layer(model, 0, 1) | {"norm.weight", "norm.bias"}
    assert optimizer.active_groups == ["layers.2-3"]


def spelled_out(model: nn.Module, name: str) -> DynamicAllocationOptimizer:
    return {
        "lisa": lambda: wrapped(model, groups="blocks", active=2, period=2, allocator="random"),
        "badam": lambda: wrapped(
            model,
            groups=Blocks(outside="frozen"),
            active=1,
            period=2,
            allocator=RoundRobin("descending"),
            pause="drop",
            master_weights="nearest",
        ),
        "roomy": lambda: wrapped(
            model,
            groups=Blocks(outside="frozen"),
            allocator=Budget(memory=0.8, compute=0.6),
            period=2,
            pause="drop",
            master_weights="nearest",
        ),
    }[name]()


@PRESETS
def test_a_preset_sets_nothing_that_its_arguments_could_not(preset):
    ends = []
    for by_name in (True, False):
        model = LanguageModel().bfloat16()
        if by_name:
            optimizer = preset(model, AdamW(model.parameters(), lr=0.05), period=2)
        else:
            optimizer = spelled_out(model, preset.__name__)
        train(model, optimizer, 9)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("at", [4, 6])
@PRESETS
def test_a_preset_resumes(preset, at):
    def begin(seed: int = 0) -> tuple[nn.Module, DynamicAllocationOptimizer]:
        model = LanguageModel(seed=seed).bfloat16()
        return model, preset(model, adamw(model), period=PERIOD, seed=7)

    model, optimizer = begin()
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 8, start=at)
    file.seek(0)
    pair = begin(seed=1)
    for thing, saved in zip(pair, torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(saved)
    train(*pair, 8, start=at)
    assert same(weights(pair[0]), weights(model))


# The order of blocks


def selections(order: RoundRobin, modules: int, active: int, count: int) -> list[list[int]]:
    """The first selections of a run, each told who was idle for how long."""
    idle, found = [0] * modules, []
    for reallocation in range(count):
        context = AllocationContext(
            scores=(0.0,) * modules,
            updates=(0,) * modules,
            active=active,
            reallocation=reallocation,
            generator=random.Random(0),
            idle=tuple(idle),
        )
        found.append(list(order.select(context)))
        idle = [0 if m in found[-1] else length + 1 for m, length in enumerate(idle)]
    return found


@given(modules=st.integers(1, 12), active=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_random_cycle_visits_all(modules, active, seed):
    active = min(active, modules)
    turns = math.ceil(modules / active)
    found = selections(RoundRobin("random", seed=seed), modules, active, 3 * turns)
    for cycle in range(3):
        visited = [*chain(*found[cycle * turns : (cycle + 1) * turns])]
        assert sorted(visited[:modules]) == list(range(modules))
        assert visited[modules:] == visited[: len(visited) - modules], "filled up from its first"
        assert all(len(set(chosen)) == active for chosen in found)


def test_random_cycles_differ():
    cycles = selections(RoundRobin("random"), 8, 8, 5)
    assert len({tuple(cycle) for cycle in cycles}) == 5
    others = selections(RoundRobin("random", seed=1), 8, 8, 5)
    assert cycles != others


@given(modules=st.integers(1, 12), active=st.integers(1, 12))
def test_descending_mirrors_ascending(modules, active):
    active = min(active, modules)
    up, down = (selections(RoundRobin(o), modules, active, 9) for o in ("ascending", "descending"))
    assert down == [[modules - 1 - m for m in chosen] for chosen in up]
    first = [m % modules for turn in range(9) for m in range(turn * active, (turn + 1) * active)]
    if active < modules:
        assert [*chain(*up)] == first


def test_other_orders_are_refused():
    with pytest.raises(ValueError, match="pass 'ascending', 'descending' or 'random'"):
        RoundRobin("up")
    assert replace(RoundRobin(), order="random").order == "random"
