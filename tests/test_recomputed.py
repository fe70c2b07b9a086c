"""A forward that is recomputed runs again as it ran, whoever checkpoints and whoever watches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import LiveBytes

Context = Callable[[], AbstractContextManager[object]]


# --- Our own adapter layer, which has two ways of computing the same output.


class Mlp(nn.Module):
    """Blocks of two adapted layers, checkpointed from outside or not at all."""

    def __init__(self, how: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)) for _ in range(3)
        )
        self.how = how
        inject(self, LoRAConfig(rank=2, alpha=4, targets=["0", "2"]))
        for name, parameter in self.double().named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.how is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.how)
        return x.square().mean()


def rows(seed: int = 1, *, needs_gradient: bool = True) -> Tensor:
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(needs_gradient)  # a reentrant checkpoint asks for that


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@contextmanager
def hooked_everywhere():
    handle = register_module_forward_hook(lambda module, args, output: None)
    with ExitStack() as stack:
        stack.callback(handle.remove)
        yield


@contextmanager
def hooked(model: nn.Module):
    bases = (module for name, module in model.named_modules() if name.endswith("base_layer"))
    with ExitStack() as stack:
        for base in bases:
            stack.callback(base.register_forward_hook(lambda m, args, output: None).remove)
        yield


WATCHERS: dict[str, Context] = {
    "FlopCounterMode": partial(FlopCounterMode, display=False),
    "LiveBytes": LiveBytes,
    "global hook": hooked_everywhere,
    "profiler": partial(torch.profiler.profile, with_modules=True, with_flops=True),
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("how", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("watcher", [*WATCHERS, "hooks"])
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_watcher_that_begins_or_ends_before_the_backward_changes_nothing(watcher, during, how):
    model, plain = Mlp(how), Mlp()
    watch = WATCHERS.get(watcher, partial(hooked, model))
    plain(rows()).backward()
    expected = gradients(plain)
    for _ in range(2):
        with watch() if during == "forward" else nullcontext():
            loss = model(rows())
        with watch() if during == "backward" else nullcontext():
            loss.backward()
        assert_equal(gradients(model), expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_each_forward_is_recomputed_in_its_own_way(order):
    """Watched and unwatched forwards before any backward, an evaluation in between."""
    model, plain = Mlp(False), Mlp()
    losses = []
    for number in range(4):
        with hooked_everywhere() if number % 2 else nullcontext():
            losses.append(model(rows(number)))
        with torch.no_grad(), nullcontext() if number % 2 else hooked_everywhere():
            model(rows())
    for number in order:
        losses[number].backward(retain_graph=True)
        losses[number].backward()
        found = gradients(model)
        (2 * plain(rows(number))).backward()
        assert_equal(found, gradients(plain))


def test_many_changes_of_the_way_are_not_kept_for_ever():
    model = Mlp()
    for _ in range(200):
        model(rows())
        with hooked_everywhere():
            model(rows())
    way = model.blocks[0][0]._one_step
    assert len(way._nodes) == len(way._ways) <= 64
    assert copy.deepcopy(model).blocks[0][0]._one_step._nodes == []
