"""Blocks that keep what their backward needs until it is released, and are recomputed then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from budgets import adapted, clear, gradients
from hypothesis import given
from hypothesis import strategies as st
from test_recompute_switch import enable, runs_of, tiny, users
from tiny_models import TinyModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dynalora_optim import LiveBytes
from dynalora_optim._base import torch_private_autograd
from dynalora_optim.groups._blocks import find_blocks
from dynalora_optim.switching._kept import Kept
from dynalora_optim.switching._module_switch import ModuleSwitch
from dynalora_optim.switching._recompute import Recomputer, can_keep

MODELS = ("bert", "llama", "encoder")


def keeping(model: TinyModel, blocks: list[nn.Module]) -> Recomputer:
    """The blocks keep what they need; in training dropout is on."""
    recomputer = Recomputer()
    recomputer.recompute((), keeping=blocks, among=blocks)
    return recomputer


def counted(blocks: list[nn.Module]) -> list[int]:
    """Return a list that counts how often each block has run."""
    counts = [0] * len(blocks)

    def count(place: int) -> Callable[..., None]:
        def hook(*args: object) -> None:
            counts[place] += 1

        return hook

    for place, block in enumerate(blocks):
        next(iter(block.children())).register_forward_pre_hook(count(place))
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_recomputed_until_it_is_released(name):
    model, blocks = tiny(name)
    before = users(blocks)
    _, expected = runs_of(model, blocks)
    recomputer = keeping(model, blocks)
    counts, found = runs_of(model, blocks)
    assert counts == [1] * len(blocks)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=0)
    recomputer.recompute(())
    assert users(blocks) == before
    assert not any("forward" in vars(block) for block in blocks)


@given(
    name=st.sampled_from(MODELS),
    kept=st.sets(st.integers(0, 3)),
    recomputed=st.sets(st.integers(0, 3)),
    releases=st.booleans(),
    forwards=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.3]),
    repeats=st.booleans(),
)
def test_gradients_are_those_of_the_plain_model_whatever_is_kept_and_released(
    name, kept, recomputed, releases, forwards, dropout, repeats
):
    tiny_model, blocks = tiny(name)
    for module in tiny_model.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    plain = copy.deepcopy(tiny_model)
    recomputer = Recomputer()
    keeps = [blocks[b] for b in kept - recomputed]
    recomputer.recompute([blocks[b] for b in recomputed], keeping=keeps, among=blocks)
    counts = counted(blocks)
    for model in (plain, tiny_model):
        torch.manual_seed(1)
        losses = [model.loss() for _ in range(forwards)]
        if releases and model is tiny_model:
            recomputer.kept.release()
        for _ in range(1 + repeats):
            sum(losses).backward(retain_graph=True)
    found, want = gradients(tiny_model), gradients(plain)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-5, atol=1e-6)
    again = recomputed | (kept if releases else set())
    assert counts == [forwards * (1 + (b in again) * (1 + repeats)) for b in range(4)]


def left_of(model: TinyModel, recomputer: Recomputer | None = None) -> tuple[int, int]:
    """The bytes that a forward leaves alive, and those after a release."""
    clear(model)
    with LiveBytes() as memory:
        loss = model.loss()
        held = memory.live
        if recomputer:
            recomputer.kept.release()
        released = memory.live
        assert loss.requires_grad  # the graph is alive until here
    return held, released


@pytest.mark.parametrize("name", MODELS)
def test_a_release_frees_what_a_checkpoint_frees(name):
    model, blocks = tiny(name)
    recomputer = Recomputer()
    recomputer.recompute(blocks, among=blocks)
    checkpointed, _ = left_of(model)
    recomputer.recompute((), among=blocks)
    full, _ = left_of(model)
    recomputer.recompute((), keeping=blocks, among=blocks)
    held, released = left_of(model, recomputer)
    assert released == checkpointed < full <= held


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_that_is_dropped_leaves_nothing(name):
    model, blocks = tiny(name)
    keeping(model, blocks)
    with LiveBytes() as memory:
        model.loss()
        assert memory.live == 0
    assert memory.peak


def test_an_output_that_is_changed_in_place_is_refused_as_without_it():
    def loss_of(recomputer: Recomputer | None) -> str:
        model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 1))
        block = nn.Sequential(*model[:2])
        if recomputer:
            recomputer.recompute((), keeping=[block])
        hidden = block(torch.ones(2, 3, requires_grad=True))
        loss = model[2](hidden).sum()
        with torch.no_grad():
            hidden.zero_()
        with pytest.raises(RuntimeError) as caught:
            loss.backward()
        return str(caught.value)

    words = "one of the variables needed for gradient computation has been modified by an inplace"
    assert loss_of(None).startswith(words)
    assert loss_of(Recomputer()).startswith(words)


def test_a_release_leaves_a_backward_that_has_begun_alone():
    """What an earlier backward has used is no longer there; what is left is recomputed."""
    model, blocks = tiny("llama")
    recomputer = keeping(model, blocks)
    first, second = model.loss(), model.loss()
    first.backward()
    expected = gradients(model)
    clear(model)
    recomputer.kept.release()
    second.backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)


def test_a_users_own_hooks_get_what_they_would_get_without_it():
    def packed(recomputer: Recomputer | None) -> list[torch.Size]:
        model, blocks = tiny("llama")
        if recomputer:
            recomputer.recompute((), keeping=blocks, among=blocks)
        shapes: list[torch.Size] = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss()
        loss.backward()
        return shapes

    assert packed(Recomputer()) == packed(None)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_model_has_nothing_that_was_kept(make):
    model, blocks = tiny("bert")
    recomputer = keeping(model, blocks)
    loss = model.loss()
    twin = copy.copy(model)
    twin.model = make(model.model)
    function = find_blocks(twin.model)[0].module._gradient_checkpointing_func
    assert function.keywords["kept"] is not recomputer.kept
    loss.backward()
    expected = gradients(model)
    twin.loss().backward()
    for key, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=0)


def test_a_users_own_checkpoints_stay_as_they_are():
    model, blocks = tiny("llama")
    enable(model)
    recomputer = Recomputer()
    recomputer.recompute((), keeping=blocks)  # does not hold them
    counts, _ = runs_of(model, blocks)
    assert counts == [2] * len(blocks)


def test_compiled_blocks_cannot_keep():
    model = adapted("llama")
    blocks = find_blocks(model.model)
    blocks[0].module.compile(backend="eager")
    switch = ModuleSwitch(blocks)
    assert [switch.can_keep(place) for place in range(len(blocks))] == [False, True, True, True]
    assert not can_keep(blocks[0].module)


def test_without_the_private_name_blocks_are_recomputed(monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert torch_private_autograd.current_saved_tensors_hooks() is None
    model, blocks = tiny("llama")
    _, expected = runs_of(model, blocks)
    keeping(model, blocks)
    counts, found = runs_of(model, blocks)
    assert counts == [2] * len(blocks)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-6)


def test_kept_alone_runs_a_function_without_a_checkpoint():
    kept = Kept()
    x = torch.ones(2, requires_grad=True)
    kept.keeping(torch.sin)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2).cos())
