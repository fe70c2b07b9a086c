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
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import Backward, DynamicAllocationOptimizer, LiveBytes

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
    way = model.blocks[0][0]._way
    assert len(way._ways._nodes) == len(way._ways._values) <= 64
    assert copy.deepcopy(model).blocks[0][0]._way._ways._nodes == []


# --- Modules that hooks make idle: blocks as a whole, and layers without a flag.


class Recomputing(torch.autograd.Function):
    """A checkpoint of somebody's own, as other libraries have them."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


def once_more(run, x):
    return Recomputing.apply(run, x)


def not_at_all(run, x):
    return run(x)


def to_the_end(run, x):
    with set_checkpoint_early_stop(False):
        return checkpoint(run, x, use_reentrant=False)


HOW = {
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "non-reentrant to the end": to_the_end,
    "reentrant": partial(checkpoint, use_reentrant=True),
    "a function of its own": once_more,
}


class Part(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.how = how
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.scale = nn.ParameterList([torch.ones(6), torch.ones(1)])

    def both(self, x):
        penalty = sum(p.square().sum() for p in self.down.parameters())  # not by attribute
        return self.down(torch.tanh(self.up(x))) * self.scale[0] * self.scale[1] + 0.01 * penalty


class Methods(Part):
    def forward(self, x):
        return x + self.how(self.both, x)


class Submodules(Part):
    def forward(self, x):
        h = torch.tanh(self.how(self.up, x))
        return x + self.how(self.down, h)


class Closures(Part):
    def forward(self, x):
        return x + self.how(lambda x: torch.nn.functional.linear(x, self.up.weight[:6]), x)


class Nested(nn.Module):
    """A block whose part checkpoints itself, inside a checkpoint of the block's own."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how, self.inner = how, Methods(how)
        self.last = nn.Linear(6, 6)

    def both(self, x):
        return self.last(self.inner(x))

    def forward(self, x):
        return self.how(self.both, x)


class Wrapped(nn.Module):
    """A block in torch's own wrapper."""

    def __init__(self, how) -> None:
        super().__init__()
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

        reentrant = getattr(how, "keywords", {}).get("use_reentrant")
        impl = wrappers.CheckpointImpl.REENTRANT if reentrant else None
        self.inner = wrappers.checkpoint_wrapper(
            Methods(not_at_all), impl or wrappers.CheckpointImpl.NO_REENTRANT
        )

    def forward(self, x):
        return self.inner(x)


class Stack(nn.Module):
    def __init__(self, kind, how, outer=not_at_all) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind(how) for _ in range(4)).double()
        self.head = nn.Linear(6, 2).double()
        self.outer = outer

    def forward(self, x):
        for block in self.blocks:
            x = self.outer(block, x)
        return self.head(x).square().mean()


def assert_as_frozen(model, optimizer, x: Callable[[], Tensor], plain=None) -> None:
    """The loss and all gradients are those of a model whose idle parameters are frozen."""
    plain = copy.deepcopy(model) if plain is None else plain
    idle = {
        name
        for name, p in model.named_parameters()
        if not any(p is active for active in optimizer.active_parameters())
    }
    assert idle
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name not in idle)
    losses = [m(x()) for m in (model, plain)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert_equal(gradients(model), gradients(plain))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def blocks_of(model, **options):
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"groups": "blocks", "allocator": "random", "active": 2, "period": 1, **options}
    return DynamicAllocationOptimizer(inner, model, **options)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", [Methods, Submodules, Closures, Nested, Wrapped])
def test_an_idle_block_stays_idle_in_any_recomputation(kind, how):
    model = Stack(kind, HOW[how])
    plain = Stack(kind, HOW[how])
    optimizer = blocks_of(model)
    seen = set()
    for step in range(6):
        seen |= set(optimizer.active_groups)
        plain.load_state_dict(model.state_dict())
        assert_as_frozen(model, optimizer, partial(rows, step), plain)
        model(rows(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) > 2


@pytest.mark.parametrize("outer", ["non-reentrant", "reentrant", "a function of its own"])
def test_an_idle_block_that_checkpoints_itself_inside_another_checkpoint(outer):
    model = Stack(Methods, HOW["non-reentrant"], HOW[outer])
    optimizer = blocks_of(model)
    plain = Stack(Methods, HOW["non-reentrant"], HOW[outer])
    assert_as_frozen(model, optimizer, rows, plain)


@pytest.mark.parametrize("options", [{"backward": Backward(checkpoint_idle=True)}, {"active": 1}])
@pytest.mark.parametrize("kind", [Methods, Nested])
def test_blocks_that_checkpoint_themselves_while_others_are_recomputed_too(kind, options):
    model, plain = (Stack(kind, HOW["non-reentrant"]) for _ in range(2))
    optimizer = blocks_of(model, **options)
    for _ in range(4):
        assert_as_frozen(model, optimizer, rows, plain)
        model(rows()).backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.load_state_dict(model.state_dict())


def test_nothing_is_left_behind_by_a_close_a_copy_or_a_resume():
    model = Stack(Methods, HOW["non-reentrant"])
    kinds = {name: type(module._parameters) for name, module in model.named_modules()}
    optimizer = blocks_of(model)
    model(rows()).backward()
    gradients(model)
    twin = copy.deepcopy(model)
    other = blocks_of(twin)
    other.load_state_dict(optimizer.state_dict())
    assert other.active_groups == optimizer.active_groups
    assert_as_frozen(twin, other, rows, Stack(Methods, HOW["non-reentrant"]))
    for driven, one in ((twin, other), (model, optimizer)):
        one.close()
        assert {name: type(m._parameters) for name, m in driven.named_modules()} == kinds
        driven(rows()).backward()
        assert len(gradients(driven)) == len(list(driven.parameters()))
