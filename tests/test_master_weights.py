"""Low-precision weights that train on float32 copies: what is kept, how it is rounded."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_model import LanguageModel, backward, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy import same, weights, wrapped

from dynalora_optim import Backward, Blocks, DynamicAllocationOptimizer
from dynalora_optim.update._master_weights import MASTER, stochastically_rounded

BF16 = torch.bfloat16
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def by_blocks(model: nn.Module, rule: Any = AdamW, **options: Any) -> DynamicAllocationOptimizer:
    settings = {"groups": "blocks", "active": 1, "period": 2, "allocator": "round_robin"}
    return wrapped(model, rule, **{**settings, "master_weights": "nearest", **options})


def half(**options: Any) -> LanguageModel:
    return LanguageModel(**options).bfloat16()


def copies(optimizer: DynamicAllocationOptimizer) -> set[str]:
    """The parameters that have a float32 copy."""
    return {
        name
        for group in optimizer.module_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if MASTER in optimizer.state.get(parameter, {})
    }


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 numbers towards zero and away from it; equal if x is one."""
    bits = x.view(torch.int32)
    low = bits.bitwise_and(-(1 << 16))
    high = torch.where(bits == low, low, low + (1 << 16))
    return low.view(torch.float32), high.view(torch.float32)


# Rounding


@given(values=st.lists(floats, min_size=1, max_size=20), seed=st.integers(0, 2**40))
def test_only_the_two_neighbours_come_out(values, seed):
    x = torch.tensor(values)
    rounded = stochastically_rounded(x, torch.Generator().manual_seed(seed))
    low, high = neighbours(x)
    assert rounded.dtype == BF16
    assert all((rounded.float() == low) | (rounded.float() == high))
    exact = low == high
    assert torch.equal(rounded.float()[exact], x[exact])


@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_what_can_be_represented_stays_as_it_is(bits):
    numbers = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(BF16)
    rounded = stochastically_rounded(numbers.float(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded, numbers, rtol=0, atol=0, equal_nan=True)


def test_infinities_and_nans_are_kept():
    strange = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    x = torch.cat([strange.view(torch.float32), torch.tensor([torch.inf, -torch.inf])])
    for seed in range(20):
        rounded = stochastically_rounded(x, torch.Generator().manual_seed(seed))
        assert rounded[:4].isnan().all()
        assert rounded[4:].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("share", [0.0, 1 / 65536, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_the_number_itself(share, sign):
    draws, gap = 400_000, 2**-7  # of the bfloat16 numbers above 1
    x = torch.full((draws,), sign * (1 + share * gap))
    rounded = stochastically_rounded(x, torch.Generator().manual_seed(0))
    ups = (rounded.abs() > 1).double().mean().item()
    deviation = (share * (1 - share) / draws) ** 0.5
    assert abs(ups - share) <= 5 * deviation
    assert (deviation > 0) == (0 < ups < 1)


# Training


@pytest.mark.parametrize("rule", [AdamW, SGD])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_block_trains_as_its_float32_twin(rule, rounding):
    """One period of one block, by hand: float32 weights, each step's gradient from the rounded."""
    model, twin = half(), half()
    options = {"master_weights": rounding, "groups": Blocks(outside="frozen"), "period": 5}
    optimizer = by_blocks(model, rule, lr=1e-3, **options)
    twin.requires_grad_(False)
    twin.layers[0].requires_grad_(True)
    pairs = [(p, p.detach().float()) for p in twin.layers[0].parameters()]
    by_hand = rule([master for _, master in pairs], lr=1e-3)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        backward(twin, step)
        for weight, master in pairs:
            master.grad, weight.grad = weight.grad.float(), None
        by_hand.step()
        with torch.no_grad():
            for weight, master in pairs:
                weight.copy_(master)
        trained = dict(model.layers[0].named_parameters())
        for name, weight in twin.layers[0].named_parameters():
            assert torch.equal(trained[name], weight), name
    for parameter, (_, master) in zip(model.layers[0].parameters(), pairs, strict=True):
        assert torch.equal(optimizer.state[parameter][MASTER], master)


def test_small_updates_add_up():
    # The weight is 1, and each update a thousandth of the gap to its neighbour.
    for master_weights, expected in ((None, 1.0), ("nearest", 1 + 2**-7)):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).bfloat16()
        nn.init.ones_(model[0].weight)
        options = {"groups": lambda name, _: name or None, "master_weights": master_weights}
        optimizer = wrapped(
            model, SGD, active=1, period=10_000, always_active=["0"], lr=1, **options
        )
        for _ in range(1000):
            model[0].weight.grad = torch.full_like(model[0].weight, -(2**-7) / 1000)
            optimizer.step()
        assert model[0].weight.item() == expected


@given(active=st.integers(1, 4), period=st.integers(1, 3), seed=st.integers(0, 9))
def test_copies_exist_where_training_is_and_the_weights_are_their_rounding(active, period, seed):
    model = half()
    options = {"active": active, "period": period, "seed": seed, "allocator": "random"}
    optimizer = by_blocks(model, pause="drop", **options)
    seen: set[str] = set()
    for step in range(5):
        before = set(optimizer.active_groups)
        train(model, optimizer, 1, start=step)
        paused = before - set(optimizer.active_groups)
        expected = {
            name
            for group in optimizer.module_groups
            if group["name"] in (before - paused) | {"position", "embed_tokens", "norm"}
            for name in group["param_names"]
        }
        assert copies(optimizer) == expected
        for parameter, values in optimizer.state.items():
            moments = [v for v in values.values() if isinstance(v, Tensor) and v.ndim]
            assert {moment.dtype for moment in moments} == {torch.float32}
            assert torch.equal(values[MASTER].bfloat16(), parameter)
            assert values[MASTER].grad is None
        seen |= before
    assert seen


def test_the_memory_of_a_copy_is_free_when_its_block_pauses():
    model = half()
    optimizer = by_blocks(model, pause="keep", period=2)
    train(model, optimizer, 1)
    held = [
        weakref.ref(optimizer.state[parameter][MASTER].untyped_storage())
        for parameter in model.layers[0].parameters()
    ]
    assert all(ref() is not None for ref in held)
    train(model, optimizer, 1, start=1)
    gc.collect()
    assert optimizer.active_groups == ["layers.1"]
    assert all(ref() is None for ref in held)


def test_a_stochastic_end_keeps_the_mean_of_the_copy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    model.bfloat16()
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    ends = {}
    for rounding in ("nearest", "stochastic"):
        twin = copy.deepcopy(model)
        options = {"groups": lambda name, _: name or None, "master_weights": rounding}
        optimizer = wrapped(twin, SGD, active=1, period=1, allocator="round_robin", lr=1, **options)
        weight = twin[0].weight
        weight.grad = torch.full_like(weight, -0.25 * 2**-7)
        optimizer.step()
        assert optimizer.active_groups == ["1"]
        ends[rounding] = weight.double().mean().item() - 1
    assert ends["nearest"] == 0
    assert ends["stochastic"] == pytest.approx(0.25 * 2**-7, rel=0.03)  # 5 standard deviations


def test_a_step_without_a_gradient_loses_no_copy():
    model = half()
    optimizer = by_blocks(model, period=10)
    train(model, optimizer, 1)
    parameter = model.layers[0].up.weight
    master = optimizer.state[parameter][MASTER]
    backward(model, 1)
    parameter.grad = None
    optimizer.step()
    assert optimizer.state[parameter][MASTER] is master


def test_float32_weights_have_no_copies():
    plain, mixed = LanguageModel(), LanguageModel()
    train(plain, by_blocks(plain, master_weights=None), 6)
    optimizer = by_blocks(mixed)
    train(mixed, optimizer, 6)
    assert same(weights(plain), weights(mixed))
    assert not copies(optimizer)


def test_weights_of_both_precisions_train_together():
    model = half()
    for layer in model.layers:
        layer.norm.float()
    optimizer = by_blocks(model)
    with torch.autocast("cpu", BF16):
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert copies(optimizer)
    assert not any("norm" in name and "layers" in name for name in copies(optimizer))


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"master_weights": "nearest", "pause": "drop"},
        {"master_weights": "stochastic", "pause": "keep"},
        {"master_weights": "stochastic", "pause": "offload", "backward": Backward(fused=True)},
    ],
    ids=["badam", "stochastic", "fused"],
)
def test_nothing_is_lost_at_a_checkpoint(options, at):
    model = half(dropout=0.2)
    optimizer = by_blocks(model, period=3, lr=1e-3, **options)
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    twin, its = copy.deepcopy((model, optimizer))
    train(model, optimizer, 9, start=at)
    file.seek(0)
    again = half(dropout=0.2, seed=4)
    resumed = by_blocks(again, period=3, lr=1e-3, **options)
    for thing, saved in zip((again, resumed), torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(saved)
    train(again, resumed, 9, start=at)
    train(twin, its, 9, start=at)
    assert same(weights(again), weights(model))
    assert same(weights(twin), weights(model))
    assert copies(resumed) == copies(optimizer)


@pytest.mark.parametrize(
    ("master_weights", "dtype", "message"),
    [
        ("up", BF16, "master_weights='up': pass one of nearest, stochastic, None"),
        ("stochastic", torch.float16, r"rounds to bfloat16, but \d+ parameter\(s\) are float16"),
    ],
)
def test_other_settings_are_refused(master_weights, dtype, message):
    with pytest.raises(ValueError, match=message):
        by_blocks(LanguageModel().to(dtype), master_weights=master_weights)


def test_optimizers_with_weights_of_their_own_are_refused():
    class Averaging(AdamW):
        def eval(self) -> None: ...

    with pytest.raises(ValueError, match="writes its own weights into the model"):
        by_blocks(half(), Averaging)
