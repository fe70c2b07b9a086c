"""Whose checkpoints are on: those of a plan while it holds the blocks, the user's otherwise."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from budgets import adapted, clear, gradients
from tiny_models import TINY, TinyModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynalora_adapters import LoRALinear
from dynalora_optim.groups._blocks import find_blocks
from dynalora_optim.switching._recompute import Recomputer, checkpoints_itself, is_reentrant

NAMES = ("gradient_checkpointing", "_gradient_checkpointing_func")


def tiny(name: str = "bert") -> tuple[TinyModel, list[nn.Module]]:
    found = adapted(name, sizes=replace(TINY, blocks=4))
    return found, [block.module for block in find_blocks(found.model)]


def users(blocks: list[nn.Module]) -> list[list[object]]:
    """What stands in the blocks themselves."""
    return [[vars(block).get(name, "absent") for name in NAMES] for block in blocks]


def runs_of(model: TinyModel, blocks: list[nn.Module]) -> tuple[list[int], dict[str, Tensor]]:
    """How often each block runs in a step, and the gradients of it."""
    counts = [0] * len(blocks)

    def counted(module: nn.Module, args: object) -> None:
        counts[inner.index(module)] += 1

    inner = [next(m for m in block.modules() if isinstance(m, LoRALinear)) for block in blocks]
    handles = [module.register_forward_pre_hook(counted) for module in inner]
    clear(model)
    model.loss().backward()
    for handle in handles:
        handle.remove()
    return counts, gradients(model)


def enable(model: TinyModel, use_reentrant: bool = False) -> None:
    model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "encoder"])
def test_a_plan_holds_every_block_and_gives_all_back(name, use_reentrant):
    model, blocks = tiny(name)
    _, expected = runs_of(model, blocks)
    if name != "encoder":
        enable(model, use_reentrant)
    before = users(blocks)
    forwards = ["forward" in vars(block) for block in blocks]
    recomputer = Recomputer()
    for recomputed in ([1, 3], [], [0, 1, 2, 3], [3]):
        recomputer.recompute([blocks[b] for b in recomputed], among=blocks)
        counts, found = runs_of(model, blocks)
        assert counts == [1 + (b in recomputed) for b in range(4)]
        assert not any(map(checkpoints_itself, blocks))
        assert not any(map(is_reentrant, blocks))
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)
    recomputer.recompute(())
    assert users(blocks) == before
    assert ["forward" in vars(block) for block in blocks] == forwards


def switch_on(model: TinyModel, blocks: list[nn.Module]) -> None:
    enable(model, use_reentrant=True)


def by_attribute(model: TinyModel, blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, checkpoint


def switch_off(model: TinyModel, blocks: list[nn.Module]) -> None:
    model.model.gradient_checkpointing_disable()


def flags_on(model: TinyModel, blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.gradient_checkpointing = True


def flags_off(model: TinyModel, blocks: list[nn.Module]) -> None:
    for block in blocks:
        block.gradient_checkpointing = False


def another_function(model: TinyModel, blocks: list[nn.Module]) -> None:
    for block in blocks:
        block._gradient_checkpointing_func = checkpoint


def nothing(model: TinyModel, blocks: list[nn.Module]) -> None:
    pass


TOGGLES = [switch_on, switch_off, flags_on, flags_off, another_function, nothing]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("first", [switch_on, switch_off, nothing])
@pytest.mark.parametrize("later", TOGGLES)
def test_what_the_user_has_switched_last_stands(first, later, holds):
    """In mid-run, once or twice, whichever blocks are recomputed then and later."""
    for ends in ([], [0, 2], [0, 1, 2, 3]):
        model, blocks = tiny()
        twin, plain = tiny()
        recomputer = Recomputer()
        for toggle in (first, later):
            toggle(model, blocks)
            toggle(twin, plain)
            for recomputed in ([1, 2], ends):
                chosen = [blocks[b] for b in recomputed]
                recomputer.recompute(chosen, among=blocks if holds else ())
                if not holds and all(map(checkpoints_itself, plain)):
                    assert users(blocks)[0][0] is True  # left alone
        recomputer.recompute(())
        flags, expected = users(blocks), users(plain)
        assert [flag for flag, _ in flags] == [flag for flag, _ in expected]
        assert all(
            type(flag) is type(other[0]) for (flag, _), other in zip(flags, expected, strict=True)
        )
        for (_, function), (_, other) in zip(flags, expected, strict=True):
            assert getattr(function, "keywords", function) == getattr(other, "keywords", other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("first", [by_attribute, switch_off, nothing])
def test_a_copy_that_was_made_while_a_plan_held_the_blocks_knows_the_users_switch(first, duplicate):
    model, blocks = tiny()
    first(model, blocks)
    before = users(blocks)
    recomputer = Recomputer()
    recomputer.recompute([blocks[1]], among=blocks)
    twin, other = duplicate((model, recomputer))  # goes on with its own
    alone = duplicate(model)  # another one drives it later
    for copied, driver in ((twin, other), (alone, Recomputer())):
        own = [block.module for block in find_blocks(copied.model)]
        driver.recompute([own[2]], among=own)
        assert runs_of(copied, own)[0] == [1, 1, 2, 1]
        driver.recompute(())
        assert [flag for flag, _ in users(own)] == [flag for flag, _ in before]
        assert [type(f).__name__ for _, f in users(own)] == [type(f).__name__ for _, f in before]
    assert runs_of(model, blocks)[0] == [1, 2, 1, 1]
    recomputer.recompute(())
    assert users(blocks) == before


@pytest.mark.parametrize("on", [True, False])
def test_compiled_blocks_are_held_too(on):
    model, blocks = tiny()
    _, expected = runs_of(model, blocks)
    if on:
        enable(model)
    before = users(blocks)
    for block in blocks:
        block.compile(backend="eager")
    recomputer = Recomputer()
    for recomputed in ([1], [0, 3], []):
        recomputer.recompute([blocks[b] for b in recomputed], among=blocks)
        assert [bool(block.gradient_checkpointing) for block in blocks] == [False] * 4
        clear(model)
        model.loss().backward()
        for key, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)
    recomputer.recompute(())
    assert users(blocks) == before
