"""Modules become inactive between two forwards of one backward: each is recomputed as it ran."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from budgets import adapted, clear, gradients, on_budget
from test_budget_loops import WIDE, rows
from tiny_models import TinyModel, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynalora_optim import Blocks, Budget, DynamicAllocationOptimizer, LiveBytes

SMALL, LARGE = (1, 6), (8, 16)


def loss(tiny: TinyModel, shape: tuple[int, int]) -> Tensor:
    return tiny.model(**rows(tiny, *shape)).loss


def checkpoint_blocks(tiny: TinyModel, how: str) -> None:
    """Checkpoint the blocks as a user does: by the model's switch, or in their code."""
    blocks = next(module for module in tiny.model.modules() if isinstance(module, nn.ModuleList))
    if how in ("switch", "reentrant"):
        tiny.model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    if how == "reentrant":
        tiny.model.enable_input_require_grads()
    for block in blocks if how in ("block", "parts") else ():
        for module in block.children() if how == "parts" else [block]:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def all_active(tiny: TinyModel) -> DynamicAllocationOptimizer:
    inner = torch.optim.SGD(tiny.model.parameters(), lr=0.01)
    return DynamicAllocationOptimizer(inner, tiny.model, active=1.0)


def deactivate_between_forwards(optimizer: DynamicAllocationOptimizer) -> set[str]:
    """Make every other group inactive, as a budget does; return those that stay active."""
    switch, stay = optimizer._driver.switch, set(optimizer.groups[::2])
    with switch.former.recalled(True):
        switch.set_flags(list(optimizer._driver.groups()), stay)
    return stay


@pytest.mark.parametrize("checkpoints", ["none", "switch", "reentrant", "block", "parts"])
@pytest.mark.parametrize("adapters", ["ours", "peft"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_forward_is_recomputed_with_what_was_active_in_it(name, adapters, checkpoints):
    tiny, plain = (adapted(name, adapters, sizes=WIDE) for _ in range(2))
    plain.model.load_state_dict(tiny.model.state_dict())
    checkpoint_blocks(tiny, checkpoints)
    optimizer = all_active(tiny)
    first = loss(tiny, SMALL)
    stay = deactivate_between_forwards(optimizer)
    (first + loss(tiny, LARGE)).backward()
    (loss(plain, SMALL) + loss(plain, LARGE)).backward()
    found, want = gradients(tiny), gradients(plain)
    names = [key for key in want if not any(f"{group}." in key for group in optimizer.groups)]
    names += [key for key in want if any(f"{group}." in key for group in stay)]
    assert len(names) < len(want)
    for key in names:
        torch.testing.assert_close(found[key], want[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpoints", ["none", "switch", "reentrant", "block", "parts"])
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_a_whole_block_is_recomputed_with_what_was_active_in_it(name, checkpoints):
    """Its own forward alone is recomputed, so that no hook of the block runs."""
    tiny, plain = (build(name, 0, WIDE) for _ in range(2))
    for one in (tiny, plain):
        one.model.train()
    checkpoint_blocks(tiny, checkpoints)
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(tiny.model.parameters(), lr=0.01),
        tiny.model,
        groups=Blocks(outside="frozen"),
        active=1.0,
    )
    first = loss(tiny, SMALL)
    stay = deactivate_between_forwards(optimizer)
    (first + loss(tiny, LARGE)).backward()
    (loss(plain, SMALL) + loss(plain, LARGE)).backward()
    found, want = gradients(tiny), gradients(plain)
    names = [key for key in want if any(key.startswith(f"{group}.") for group in stay)]
    assert 0 < len(names) < len(want)
    for key in names:
        torch.testing.assert_close(found[key], want[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("adapters", ["ours", "peft"])
def test_after_the_step_no_hook_is_left(adapters):
    tiny = adapted("llama", adapters, sizes=WIDE)
    optimizer = all_active(tiny)
    loss(tiny, SMALL).backward()
    counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()]
    deactivate_between_forwards(optimizer)
    loss(tiny, SMALL).backward()
    optimizer.step()
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()]
    assert after == counts


@pytest.mark.parametrize("adapters", ["ours", "peft"])
def test_a_copy_made_between_two_forwards_is_active_in_all_its_own(adapters):
    tiny = adapted("bert", adapters, sizes=WIDE)
    checkpoint_blocks(tiny, "switch")
    optimizer = all_active(tiny)
    loss(tiny, SMALL).backward()
    want = gradients(tiny)
    clear(tiny)
    deactivate_between_forwards(optimizer)
    tiny.model = copy.deepcopy(tiny.model)
    loss(tiny, SMALL).backward()
    found = gradients(tiny)
    assert found.keys() == want.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, want[key], rtol=0, atol=0)


def grown(
    share: float, adapters: str, checkpoints: str
) -> tuple[float, int, DynamicAllocationOptimizer]:
    """A forward grows while all groups are active; gradients are those of the unshaped model.

    Return the peak of this step as a share of the budget, how many groups stay active, and the
    optimizer.
    """
    tiny, plain = (adapted("llama", adapters, sizes=WIDE) for _ in range(2))
    with LiveBytes() as memory:
        (loss(plain, SMALL) + loss(plain, LARGE)).backward()
    limit = round(share * memory.peak)
    checkpoint_blocks(tiny, checkpoints)
    optimizer = on_budget(tiny, Budget(memory=limit), period=1)
    while len(optimizer.record) < 2 or len(optimizer.active_groups) < len(optimizer.groups):
        (loss(tiny, SMALL) + loss(tiny, SMALL)).backward()
        optimizer.step()
        clear(tiny)
    clear(plain)
    plain.model.load_state_dict(tiny.model.state_dict())

    with LiveBytes() as memory:
        first = loss(tiny, SMALL)
        assert len(optimizer.active_groups) == len(optimizer.groups)
        (first + loss(tiny, LARGE)).backward()
    active = set(optimizer.active_groups)
    (loss(plain, SMALL) + loss(plain, LARGE)).backward()
    found, want = gradients(tiny), gradients(plain)
    trained = {g for g in optimizer.groups if any(key.startswith(f"{g}.") for key in found)}
    assert trained == active
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-5, atol=1e-7)
    return memory.peak / limit, len(active), optimizer


@pytest.mark.parametrize("checkpoints", ["none", "switch", "parts"])
@pytest.mark.parametrize("adapters", ["ours", "peft"])
def test_a_growing_forward_takes_the_memory_of_what_can_be_recomputed(checkpoints, adapters):
    share, active, optimizer = grown(0.4, adapters, checkpoints)
    assert share <= 1
    assert active == len(optimizer.groups)


@pytest.mark.parametrize("checkpoints", ["none", "switch"])
@pytest.mark.parametrize(("adapters", "share"), [("ours", 0.36), ("peft", 0.32)])
def test_a_budget_that_a_growing_forward_exceeds_trains_less_in_that_step(
    checkpoints, share, adapters
):
    taken, active, optimizer = grown(share, adapters, checkpoints)
    assert taken <= 1
    assert 0 < active < len(optimizer.groups)


def test_what_is_recomputed_after_all_counts_as_compute():
    def compute(batches: tuple[tuple[int, int], ...]) -> float:
        """The FLOPs of a step whose first forwards were planned as if all were small."""
        tiny = adapted("llama", "ours", sizes=WIDE)
        limit = round(0.4 * whole)
        optimizer = on_budget(tiny, Budget(memory=limit), period=1)
        for _ in range(3):
            (loss(tiny, SMALL) + loss(tiny, SMALL)).backward()
            optimizer.step()
            clear(tiny)
        optimizer.hold(optimizer.groups)
        forwards = [loss(tiny, batch) for batch in batches]
        flops, of_all = optimizer._allocation._spending._step
        sum(forwards).backward()
        return flops / of_all

    plain = adapted("llama", "ours", sizes=WIDE)
    with LiveBytes() as memory:
        (loss(plain, SMALL) + loss(plain, LARGE)).backward()
    whole = memory.peak
    assert compute((SMALL, SMALL)) == pytest.approx(1.0)
    assert compute((SMALL, LARGE)) > 1.2
