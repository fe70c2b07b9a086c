"""On a GPU: the same numbers as the wrapped optimizer's, in every kind of loop.

Each test runs on the CPU as well, where a slip shows without a GPU.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from devices import (
    DROP,
    FUSED,
    OFFLOAD,
    saved_and_loaded,
)
from language_model import LanguageModel, tokens
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy import ToyModel, batch, same, weights, wrapped

from dynalora_adapters import LoRALinear
from dynalora_optim import Backward, DynamicAllocationOptimizer
from dynalora_optim.update._master_weights import MASTER, stochastically_rounded

RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "AdamW foreach": (AdamW, {"foreach": True}),
    "AdamW fused": (AdamW, {"fused": True}),
    "AdamW capturable": (AdamW, {"capturable": True}),
    "AdamW capturable, tensor rate": (AdamW, {"capturable": True, "lr": torch.tensor(0.05)}),
    "AdamW amsgrad": (AdamW, {"amsgrad": True, "foreach": True}),
    "Adam fused": (torch.optim.Adam, {"fused": True, "weight_decay": 0.1}),
    "SGD foreach": (SGD, {"momentum": 0.9, "foreach": True}),
    "SGD fused": (SGD, {"momentum": 0.9, "fused": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


def on(device: str, tree: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, (Tensor, nn.Module)) else x, tree
    )


def toy(device: str) -> ToyModel:
    return ToyModel().to(device)


def loss_of(model: nn.Module, device: str, step: int = 0) -> Tensor:
    return model(batch(step).to(device)).float().square().mean()


def train(model: nn.Module, optimizer: Any, device: str, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        loss_of(model, device, step).backward()
        optimizer.step()
        optimizer.zero_grad()


# The wrapped optimizer


@pytest.mark.parametrize(("rule", "options"), RULES.values(), ids=RULES)
def test_all_active_is_the_wrapped_optimizer_bit_for_bit(rule, options, device):
    if device == "cpu" and options.get("capturable"):
        pytest.skip("torch's capturable optimizers are for GPUs")
    ends = []
    for wrap in (False, True):
        model = toy(device)
        optimizer = rule(model.parameters(), **{"lr": 0.05, **on(device, options)})
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0, period=2)
        train(model, optimizer, device, 8)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_frozen_module_is_unmoved_and_has_no_gradient(options, device):
    model = toy(device)
    rule = partial(AdamW, weight_decay=0.5, **options)
    optimizer = wrapped(model, rule, active=2, period=2, allocator="round_robin")
    chosen = set()
    for step in range(12):
        active = set(optimizer.active_groups)
        before = weights(model)
        loss_of(model, device, step).backward()
        for name, parameter in model.named_parameters():
            if ".0.A" in name or ".0.B" in name:
                assert (parameter.grad is not None) == (name.rsplit(".", 1)[0] in active)
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, new in weights(model).items() if not torch.equal(new, before[name])}
        expected = {f"{group}.{part}" for group in active for part in "AB"}
        assert moved == expected | {"head.weight", "head.bias"}
        chosen |= active
    assert chosen == set(optimizer.groups)


@pytest.mark.parametrize("active", [1.0, 2])
def test_a_step_that_the_scaler_skips_moves_nothing_and_counts_nothing(active, device):
    ends = []
    for wrap in (False, True):
        model = toy(device)
        optimizer: Any = AdamW(model.parameters(), lr=0.05)
        if wrap:
            options = {"active": active, "period": 2, "allocator": "round_robin"}
            optimizer = DynamicAllocationOptimizer(optimizer, model, **options)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        for step in range(6):
            with torch.autocast(device, torch.float16):
                loss = loss_of(model, device, step) * (math.inf if step == 3 else 1.0)
            before = weights(model)
            counts = dict(optimizer._allocation.updates) if wrap else {}
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert same(before, weights(model)) == (step == 3)
            if wrap:
                assert (optimizer._allocation.updates == counts) == (step == 3)
        assert scaler.get_scale() == 2.0**9
        ends.append(weights(model))
    assert same(*ends) == (active == 1.0)


def test_bf16_autocast_is_torchs_own(device):
    ends = []
    for wrap in (False, True):
        model = toy(device)
        optimizer: Any = AdamW(model.parameters(), lr=0.05)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0, period=2)
        for step in range(6):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model, device, step)
            loss.backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocasts", [False, True])
def test_adapters_in_half_precision_have_gradients_in_float32(half, autocasts, device):
    """As in float64 from the same numbers; the sum over the rows keeps its digits on a GPU."""
    torch.manual_seed(0)
    base = nn.Linear(96, 64).requires_grad_(False).to(device, half)
    layer = LoRALinear(base, rank=4, alpha=6)
    nn.init.normal_(layer.lora_B, std=0.5)
    x = torch.randn(2, 600, 96, device=device, dtype=half, requires_grad=True)
    seed = torch.randn(2, 600, 64, device=device, dtype=half)
    with torch.autocast(device, half, enabled=autocasts):
        out = layer(x)
    grads = torch.autograd.grad(out, [x, layer.lora_A, layer.lora_B], seed)
    assert [g.dtype for g in grads] == [half, torch.float32, torch.float32]
    wide = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    delta = nn.functional.linear(nn.functional.linear(wide[0], wide[1]), wide[2])
    exact = nn.functional.linear(wide[0], base.weight.double(), base.bias.double()) + 1.5 * delta
    expected = torch.autograd.grad(exact, wide, seed.double())
    for mine, right in zip((out, *grads), (exact, *expected), strict=True):
        assert (mine.double() - right).norm() < 2 * torch.finfo(half).eps * right.norm()


# Checkpoints


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("map_location", [None, "cpu"])
@pytest.mark.parametrize(
    "options",
    [{}, OFFLOAD, DROP, {"importance": "gradient"}, {"lr_time": "local"}, FUSED],
    ids=["keep", "offload", "drop", "gradient", "local", "fused"],
)
def test_a_run_resumes_bit_for_bit(options, map_location, at, device):
    settings = {"active": 2, "period": 2, "allocator": "stochastic", **options}
    rule = partial(AdamW, fused=True)
    model = toy(device)
    optimizer = wrapped(model, rule, **settings)
    train(model, optimizer, device, at)
    states = saved_and_loaded(model, optimizer, map_location=map_location)
    train(model, optimizer, device, 6, start=at)
    again = ToyModel(seed=3).to(device)
    resumed = wrapped(again, rule, **settings)
    for thing, saved in zip((again, resumed), states, strict=True):
        thing.load_state_dict(saved)
    train(again, resumed, device, 6, start=at)
    assert same(weights(again), weights(model))
    assert list(resumed.record) == list(optimizer.record)


# Full parameters: copies in float32, updates within the backward pass


def by_blocks(model: nn.Module, rule: Any = AdamW, **options: Any) -> DynamicAllocationOptimizer:
    settings = {"groups": "blocks", "active": 1, "period": 2, "allocator": "round_robin"}
    return wrapped(model, rule, **{**settings, **options})


def language_loss(model: nn.Module, device: str, step: int = 0) -> Tensor:
    ids = tokens(step).to(device)
    logits = model(ids)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())


def train_language(model: nn.Module, optimizer: Any, device: str, steps: int) -> None:
    for step in range(steps):
        language_loss(model, device, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_bf16_block_trains_as_its_float32_twin(rounding, device):
    """One period of one block, by hand: float32 weights, each step's gradient from the rounded."""
    model, twin = (LanguageModel(tied=False).bfloat16().to(device) for _ in range(2))
    optimizer = by_blocks(model, lr=1e-3, master_weights=rounding, period=5)
    named = dict(twin.named_parameters())
    held = {n for g in optimizer.module_groups for n in g["param_names"]}
    trained = [n for n in named if n in held and ("layers." not in n or n.startswith("layers.0"))]
    masters = {name: named[name].detach().float() for name in trained}
    by_hand = AdamW(masters.values(), lr=1e-3)
    for step in range(4):
        language_loss(model, device, step).backward()
        gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        for name, master in masters.items():
            master.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        by_hand.step()
        for name, parameter in model.named_parameters():
            if name in masters:
                assert torch.equal(optimizer.state[parameter][MASTER], masters[name]), name
                assert torch.equal(parameter, masters[name].bfloat16()), name


def test_stochastic_rounding_keeps_the_mean_and_takes_a_neighbour(device):
    draws, share, gap = 400_000, 0.1, 2**-7  # of the bfloat16 numbers above 1
    x = torch.full((draws,), 1 + share * gap, device=device)
    generator = torch.Generator(device).manual_seed(0)
    rounded = stochastically_rounded(x, generator).double()
    assert set(rounded.unique().tolist()) == {1.0, 1 + gap}
    ups = (rounded > 1).double().mean().item()
    assert abs(ups - share) <= 5 * (share * (1 - share) / draws) ** 0.5


FUSED_RUNS = {
    "plain": {},
    "offloaded": OFFLOAD,
    "dropped": DROP,
    "recomputed": {"checkpoint_idle": True},
    "local rates": {"lr_time": "local"},
}


@pytest.mark.parametrize("rule_options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("options", FUSED_RUNS.values(), ids=FUSED_RUNS)
def test_updates_within_the_backward_pass_give_the_same_weights(options, rule_options, device):
    # In float64, and with few rows: the embedding's gradient is a sum in no fixed order on a GPU.
    ends = []
    settings = dict(options)
    recomputed = settings.pop("checkpoint_idle", False)
    for fused in (False, True):
        model = LanguageModel(tied=False).double().to(device)
        settings["backward"] = Backward(fused=fused, checkpoint_idle=recomputed)
        optimizer = by_blocks(model, partial(AdamW, **rule_options), lr=0.01, **settings)
        train_language(model, optimizer, device, 7)
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
    if device == "cpu":
        assert same(*ends)


def test_one_gradient_is_alive_at_a_time(device):
    model = LanguageModel(tied=False).to(device)
    optimizer = by_blocks(model, active=1.0, **FUSED)
    train_language(model, optimizer, device, 2)
    language_loss(model, device, 2).backward()
    left = [p.grad for p in model.parameters() if p.grad is not None]  # one number each
    assert all(grad.untyped_storage().nbytes() <= 8 for grad in left)
