"""A copy of a model without data costs what the model costs, and knows the numbers of its batch.

A `Budget` measures such a copy under FSDP2. The tests of FSDP2 run it on two ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from budgets import MODELS, adapted, on_budget
from hypothesis import given
from hypothesis import strategies as st
from listed_models import LISTED
from mixed_models import MIXED, skip_unless_it_runs
from tiny_models import build
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from dynalora_optim import Blocks, Budget, DynamicAllocationOptimizer, LiveBytes
from dynalora_optim.memory._block_meter import BlockMeter
from dynalora_optim.memory._reads import KnownNumbers

FAMILIES: dict[str, Callable[[], Any]] = {
    **{name: partial(adapted, name) for name in MODELS},
    **LISTED,
    **MIXED,
}
# Those in which code reads values: a mask, the places of an image, positions, chosen experts.
READ = ("bart", "llava", "qwen2_vl", "mixtral", "mixtures", "gemma3")


def costs_of(make: Callable[[], Any], *, padded: bool | None, **settings: Any) -> Any:
    tiny = make()
    if padded is not None:
        tiny.batch["attention_mask"] = torch.ones_like(tiny.batch["attention_mask"])
        tiny.batch["attention_mask"][0, 0] = not padded
    optimizer = on_budget(tiny, **settings)
    tiny.loss()
    return optimizer._allocation.costs


def same_costs(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    skip_unless_it_runs(make())
    real = costs_of(make, **options)
    with monkeypatch.context() as patch:
        patch.setattr(BlockMeter, "is_sharded", True)
        assert costs_of(make, **options) == real


@pytest.mark.parametrize("name", READ)
def test_a_copy_without_data_costs_what_the_model_costs(name, monkeypatch):
    same_costs(FAMILIES[name], monkeypatch, padded=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(READ)))
def test_a_copy_of_any_family_costs_what_the_model_costs(name, monkeypatch):
    same_costs(FAMILIES[name], monkeypatch, padded=None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_code_that_looks_into_a_mask_finds_what_is_in_it(name, padded, monkeypatch):
    same_costs(FAMILIES[name], monkeypatch, padded=padded)


@pytest.mark.parametrize("name", ["bert", "llama", "encoder"])
def test_what_never_trains_does_not_train_in_the_copy(name, monkeypatch):
    """The optimizer gives it detached parameters; a copy of the model has no such optimizer."""

    def whole() -> Any:
        tiny = build(name)
        tiny.model.train()
        return tiny

    same_costs(whole, monkeypatch, padded=None, groups=Blocks(outside="frozen"))


@contextmanager
def numbers(*, padded: bool = False) -> Iterator[KnownNumbers]:
    mode = FakeTensorMode()

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    with mode, KnownNumbers(fake, padded=padded) as found:
        yield found


def test_what_is_made_of_a_batchs_numbers_is_known():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    weight = torch.randn(5, 2)
    with numbers() as known:
        fake = known.argument(weight.requires_grad_())
        given = known.argument(mask)
        assert given.sum(1).tolist() == [2, 1]
        assert int(given.sum(1).max()) == 2
        assert not given.bool().all()
        hidden = torch.nn.functional.embedding(given, fake)
        assert isinstance(hidden, FakeTensor)
        assert hidden.shape == (2, 3, 2)
        chosen = hidden[given.bool()]
        assert isinstance(chosen, FakeTensor)
        assert chosen.shape == (3, 2)
        assert torch.arange(4).tolist() == [0, 1, 2, 3]
        positions = torch.full((2, 3), 7).masked_fill(given == 0, 0)
        assert positions.tolist() == [[7, 7, 0], [7, 0, 0]]
        given.zero_()
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0]]  # the batch itself does not change


def test_what_is_made_of_weights_is_not_known():
    weight = torch.randn(4, 4, requires_grad=True)
    with numbers() as known, torch.no_grad(), LiveBytes() as memory:
        hidden = known.argument(weight)
        assert (hidden > 0).all().item() is True
        assert hidden.sum().item() == 1.0
        out = torch.zeros(4, 4)
        out += hidden  # plain, in place: it stays so, and what it holds is not known
        assert out.shape == (4, 4)
        out[:2] = hidden[:2]
        assert memory.live == 64  # of out: an argument is no new tensor
    with numbers(padded=True) as known:
        assert (known.argument(weight) > 0).all().item() is False


@pytest.mark.parametrize("size", [2**20, 2**20 + 1])
def test_a_large_tensor_has_no_numbers(size):
    with numbers() as known:
        assert isinstance(known.argument(torch.ones(size)), FakeTensor) == (size > 2**20)
        assert isinstance(torch.zeros(size), FakeTensor) == (size > 2**20)
        assert isinstance(torch.zeros(1).expand(size), FakeTensor) == (size > 2**20)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 3))
def test_positions_from_lengths_are_those_of_plain_tensors(lengths, width):
    def made(lengths: Tensor) -> Tensor:
        mask = torch.arange(6)[None] < lengths[:, None]
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return torch.cat([starts, mask.nonzero().flatten(), mask.sum().view(1)]) * width

    plain = made(torch.tensor(lengths))
    with numbers() as known:
        assert made(known.argument(torch.tensor(lengths))).tolist() == plain.tolist()


@lru_cache(maxsize=8)
def grid(size: int) -> list[Tensor]:
    """As models make positions, once for each size."""
    return [torch.arange(size * 2.0**18).view(size, -1)]


@lru_cache
def of_a_size(size: int) -> int:
    return size


class Gridded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + grid(len(x))[0].mean() * of_a_size(1)
        for block in self.blocks:
            x = block(x)
        return x.sum()


def by_blocks(model: nn.Module) -> DynamicAllocationOptimizer:
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    groups, allocator = Blocks(outside="frozen"), Budget(memory=1.0)
    return DynamicAllocationOptimizer(inner, model, groups=groups, allocator=allocator)


def test_what_a_function_caches_is_not_left_without_data(monkeypatch):
    torch.manual_seed(0)
    gc.unfreeze()  # as outside of these tests, where caches can be found
    grid(2)
    of_a_size(2)
    model = Gridded()
    optimizer = by_blocks(model)
    monkeypatch.setattr(BlockMeter, "is_sharded", True)
    model(torch.randn(8, 4)).backward()  # its grid is too large to have numbers in the copy
    optimizer.step()
    assert type(grid(8)[0]) is Tensor
    assert of_a_size.cache_info().currsize == 2  # what holds no tensor stays


@pytest.mark.parametrize("name", ["bert", "qwen2_vl"])
def test_a_model_that_is_too_large_to_measure_is_measured_without_data(name):
    real = costs_of(FAMILIES[name], padded=None)
    tiny = FAMILIES[name]()
    optimizer = on_budget(tiny)
    fails = []

    def full(module: nn.Module, args: Any, output: Any) -> None:
        if type(output) is Tensor and not fails:
            fails.append(module)
            raise torch.OutOfMemoryError("there is no memory left")

    linear = next(m for m in tiny.model.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(full)
    tiny.loss().backward()
    assert fails
    assert optimizer._allocation.costs == real
    optimizer.step()


@pytest.mark.parametrize("how", ["ours", "peft"])
@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_measuring_that_is_given_up_anywhere_leaves_no_trace_in_the_copy(name, how, monkeypatch):
    def costs(room: int | None) -> Any:
        tiny = adapted(name, how)
        optimizer = on_budget(tiny)
        monkeypatch.setattr(optimizer._costing, "_room", lambda: room)
        optimizer.measure(**tiny.batch)
        return optimizer._allocation.costs

    with LiveBytes() as memory:
        want = costs(None)
    for part in range(1, 8):
        assert costs(part * memory.peak // 8) == want


def test_what_has_no_copy_without_data_says_that_there_is_no_memory():
    class Full(Gridded):
        def forward(self, x: Tensor) -> Tensor:
            if optimizer._costing._is_measuring:
                raise torch.OutOfMemoryError("there is no memory left")
            return super().forward(x)

    model = Full()
    optimizer = by_blocks(model)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        model(torch.randn(8, 4))
    assert all(p.grad is None for p in model.parameters())


def test_what_is_written_into_a_given_tensor_has_no_memory_of_its_own():
    """A small buffer is a plain tensor; TRL's loss multiplies into parts of one."""
    mode = FakeTensorMode()

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tuple(tensor.shape), tensor.stride())

    hidden, weight = fake(torch.ones(8, 4)), fake(torch.ones(4, 6))
    with mode, KnownNumbers(fake, padded=False), LiveBytes() as memory:
        buffer = torch.empty(8, 10)
        before = memory.live
        torch.mm(hidden, weight, out=buffer[:, :6])
        assert memory.peak == before == 8 * 10 * 4
