"""Full-parameter training by blocks: who is in which group, what moves, and what is never kept."""

from __future__ import annotations

import copy
import functools
import gc
import io
from typing import Any

import pytest
import torch
from budgets import costs_of, measured, on_budget, shape, some_plans
from hypothesis import given
from hypothesis import strategies as st
from kinds import hooks
from language_model import OUTSIDE, LanguageModel, backward, moved, of_layer, tokens, train
from processes import on_ranks
from tiny_models import NAMES, ROOMY, Sizes, build
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy import same, weights, wrapped

from dynalora_optim import Backward, Blocks, Budget, DynamicAllocationOptimizer, LiveBytes
from dynalora_optim.groups._rules import find_groups

LAYERS = [f"layers.{i}" for i in range(4)]
IN_TURN = {"active": 1, "period": 1, "allocator": "round_robin"}
roles = st.sampled_from(["allocated", "always_active", "frozen"])


def by_blocks(model: nn.Module, **options: Any) -> DynamicAllocationOptimizer:
    """AdamW by blocks, one at a time, in turn."""
    return wrapped(model, **{"groups": "blocks", **IN_TURN, **options})


# Who is in which group


def test_a_block_is_a_group_and_so_is_each_module_outside():
    model = LanguageModel()
    groups = {group.name: group for group in find_groups(model, "blocks")}
    assert list(groups) == ["position", "embed_tokens", *LAYERS, "norm"]
    for name in LAYERS:
        assert groups[name].modules == (model.get_submodule(name),), "hooked as a whole, once"
        assert list(groups[name].parameters()) == list(model.get_submodule(name).parameters())
        assert (groups[name].role, groups[name].aliases) == ("allocated", ())
    assert groups["embed_tokens"].modules == (model.embed_tokens, model.lm_head)
    assert groups["embed_tokens"].aliases == ("lm_head",)
    assert {groups[name].role for name in ("position", "embed_tokens", "norm")} == {"always_active"}


@functools.cache
def four_blocks(name: str) -> nn.Module:
    return build(name, sizes=Sizes(blocks=4)).model


@pytest.mark.parametrize("name", NAMES)
@given(size=st.integers(1, 5), outside=roles)
def test_every_parameter_is_in_one_group_and_blocks_are_apart(name, size, outside):
    model = four_blocks(name)
    groups = find_groups(model, Blocks(block_size=size, outside=outside))
    held = [id(parameter) for group in groups for parameter in group.parameters()]
    assert sorted(held) == sorted(map(id, model.parameters()))
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    of_blocks = [group for group in groups if group.modules[0] in {*blocks}]
    assert [module for group in of_blocks for module in group.modules] == list(blocks)
    assert all(len(group.modules) == size for group in of_blocks[:-1])
    assert {group.role for group in groups if group not in of_blocks} <= {outside}


def test_several_blocks_in_a_row_are_one_group():
    names = [
        group.name for group in find_groups(LanguageModel(5), Blocks(2)) if "layers" in group.name
    ]
    assert names == ["layers.0-1", "layers.2-3", "layers.4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 1.5}, "block_size"),
        ({"outside": "active"}, "pass one of allocated, always_active, frozen"),
    ],
)
def test_blocks_refuse_other_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Blocks(**options)


def test_models_without_blocks_of_their_own_are_refused():
    with pytest.raises(ValueError, match=r"found no repeated blocks in Linear.*groups=callable"):
        find_groups(nn.Linear(2, 2), "blocks")
    model = LanguageModel()
    model.layers[2] = model.layers[0]
    with pytest.raises(ValueError, match="holds one block several times"):
        find_groups(model, "blocks")
    with pytest.raises(ValueError, match="leaves none to allocate"):
        by_blocks(LanguageModel(), always_active=["layers.*"])


# What moves


@given(size=st.integers(1, 4), outside=roles, tied=st.booleans(), seed=st.integers(0, 9))
def test_what_moves_is_the_active_blocks_and_what_outside_says(size, outside, tied, seed):
    model = LanguageModel(tied=tied)
    optimizer = by_blocks(model, groups=Blocks(size, outside), allocator="random", seed=seed)
    rest = OUTSIDE | (set() if tied else {"lm_head.weight"})
    for step in range(5):
        before, active = weights(model), optimizer.active_groups
        train(model, optimizer, 1, start=step)
        expected = {"allocated": set(), "always_active": rest, "frozen": set()}[outside]
        for group in optimizer.module_groups:
            if group["name"] in active:
                expected = expected | set(group["param_names"])
        assert moved(model, before) == expected
        assert len(active) == 1


def test_modules_outside_can_be_groups_of_their_own():
    optimizer = by_blocks(LanguageModel(), groups=Blocks(outside="allocated"))
    assert optimizer.groups == ["position", "embed_tokens", *LAYERS, "norm"]


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens", "*head"])
def test_always_active_wins_and_knows_tied_modules_by_either_name(pattern):
    model = LanguageModel()
    optimizer = by_blocks(model, groups=Blocks(outside="frozen"), always_active=[pattern])
    before = weights(model)
    train(model, optimizer, 1)
    assert moved(model, before) == {"embed_tokens.weight"} | of_layer(model, 0)


def test_a_callable_makes_groups_of_parts_of_blocks():
    model = LanguageModel()

    def rule(name: str, module: nn.Module) -> str | None:
        return name if name.startswith("layers.") and isinstance(module, nn.Linear) else None

    optimizer = wrapped(model, groups=rule, **IN_TURN)
    assert optimizer.groups == [f"{name}.{part}" for name in LAYERS for part in ("up", "down")]
    before = weights(model)
    train(model, optimizer, 1)
    norms = {name for name in before if "layers" in name and "norm" in name}
    assert moved(model, before) == OUTSIDE | norms | {"layers.0.up.weight", "layers.0.up.bias"}


def test_an_optimizer_need_not_hold_what_is_frozen():
    model = LanguageModel()
    inner = torch.optim.AdamW(model.layers.parameters(), lr=0.05)
    optimizer = DynamicAllocationOptimizer(inner, model, groups=Blocks(outside="frozen"), **IN_TURN)
    before = weights(model)
    train(model, optimizer, 4)
    assert moved(model, before) == of_layer(model, 0, 1, 2, 3)
    other = LanguageModel()
    inner = torch.optim.AdamW(other.layers[:3].parameters())
    with pytest.raises(ValueError, match=r"holds no parameter of 1 module group.*layers.3"):
        DynamicAllocationOptimizer(inner, other, groups="blocks")


def test_a_head_added_later_is_what_outside_says():
    model = LanguageModel(tied=False)
    inner = torch.optim.AdamW(model.layers.parameters(), lr=0.05)
    optimizer = DynamicAllocationOptimizer(inner, model, groups="blocks", **IN_TURN)
    optimizer.add_param_group({"params": model.lm_head.parameters()})
    assert optimizer.groups == LAYERS
    before = weights(model)
    train(model, optimizer, 1)
    assert moved(model, before) == {"lm_head.weight"} | of_layer(model, 0)


# What is never kept


@pytest.mark.parametrize("name", [name for name in NAMES if name != "stack"])
def test_no_gradient_of_an_idle_block_exists_even_for_an_instant(name):
    tiny = build(name, sizes=Sizes(blocks=3))
    optimizer = by_blocks(tiny.model, groups=Blocks(outside="frozen"))
    arrived: set[int] = set()
    for parameter in tiny.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: arrived.add(id(p)))
    for _ in range(3):
        arrived.clear()
        tiny.loss().backward()
        assert arrived == set(map(id, optimizer.active_parameters()))
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_of_idle_blocks_take_no_memory():
    def gradient_bytes(**options: Any) -> tuple[int, int]:
        tiny = build("llama", sizes=ROOMY)
        optimizer = by_blocks(tiny.model, groups=Blocks(outside="frozen"), **options)
        with LiveBytes() as memory:
            tiny.loss().backward()
        return memory.live, sum(p.nbytes for p in optimizer.active_parameters())

    for active in (1, 2, 4):
        live, expected = gradient_bytes(active=active)
        assert expected <= live < expected + 64, "with what the model keeps of its first batch"


def test_a_budget_needs_embeddings_that_train_always_or_never():
    tiny = build("llama")
    optimizer = on_budget(tiny, groups=Blocks(outside="allocated"))
    with pytest.raises(ValueError, match="runs before the blocks"):
        tiny.loss()
    optimizer.close()


@pytest.mark.parametrize("outside", ["frozen", "always_active"])
@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_a_budget_predicts_the_peak_of_training_by_blocks(name, outside):
    tiny = build(name, sizes=ROOMY)
    optimizer = on_budget(tiny, groups=Blocks(outside=outside))
    tiny.loss().backward()
    costs = costs_of(optimizer)
    assert (costs.prefix is None) == (outside == "frozen")
    for plan in some_plans(costs, 6):
        shape(optimizer, plan)
        tiny.model.zero_grad(set_to_none=True)
        peak, flops = measured(tiny.loss)
        assert costs.peak(plan) == pytest.approx(peak, rel=0.02), plan
        assert costs.flops(plan) == flops


def test_a_budget_trains_by_blocks_within_its_memory():
    tiny = build("llama", sizes=ROOMY)
    optimizer = on_budget(tiny, Budget(memory=0.5), groups=Blocks(outside="frozen"), period=1)
    peaks = []
    tiny.loss()
    for _ in range(6):
        optimizer.zero_grad()
        peaks.append(measured(tiny.loss)[0])
        optimizer.step()
    costs = costs_of(optimizer)
    assert max(peaks) <= 1.02 * 0.5 * costs.peak(costs.all_active)


# Recomputing idle blocks


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("outside", ["always_active", "frozen"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "stack"])
def test_recomputing_idle_blocks_changes_no_gradient(name, outside):
    found, peaks = [], []
    for checkpoint_idle in (False, True):
        tiny = build(name, sizes=Sizes(length=8, blocks=4, dropout=0.2))
        if hasattr(tiny.model, "config"):
            tiny.model.config.use_cache = False  # keys that come from a cache round otherwise
        optimizer = by_blocks(
            tiny.model,
            groups=Blocks(outside=outside),
            backward=Backward(checkpoint_idle=checkpoint_idle),
        )
        for step in range(4):
            torch.manual_seed(step)
            peaks.append(measured(tiny.loss)[0])
            found.append(gradients(tiny.model))
            optimizer.step()
            optimizer.zero_grad()
    plain, shaped = found[:4], found[4:]
    assert all(same(one, other) for one, other in zip(plain, shaped, strict=True))
    assert sum(peaks[4:]) < sum(peaks[:4])


def test_recomputation_sees_detached_parameters_in_plain_blocks():
    # The hooks that detach a block's parameters have long gone when its forward runs again.
    model = LanguageModel(dropout=0.3)
    optimizer = by_blocks(model, backward=Backward(checkpoint_idle=True))
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    for step in range(4):
        arrived.clear()
        backward(model, step)
        assert sorted(arrived) == sorted(OUTSIDE | of_layer(model, step))
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def test_a_block_that_trains_in_part_is_not_recomputed():
    model = LanguageModel()
    optimizer = by_blocks(
        model, backward=Backward(checkpoint_idle=True), always_active=["layers.3"]
    )
    assert optimizer.active_groups == ["layers.0"]
    patched = ["forward" in vars(layer) for layer in model.layers]
    assert patched == [False, True, True, False]


def test_recomputing_idle_blocks_needs_blocks_and_no_budget():
    model = LanguageModel()
    with pytest.raises(ValueError, match="has no effect with Budget"):
        by_blocks(model, backward=Backward(checkpoint_idle=True), allocator=Budget(memory=0.5))
    plain = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with pytest.raises(ValueError, match="found no repeated blocks in Sequential"):
        wrapped(plain, groups=lambda name, _: name or None, backward=Backward(checkpoint_idle=True))
    assert hooks(model) == hooks(plain) == 0


# The life of it


@pytest.mark.parametrize("at", [3, 5, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"groups": Blocks(2, "always_active")},
        {"groups": Blocks(outside="frozen"), "backward": Backward(checkpoint_idle=True)},
        {"groups": Blocks(outside="allocated"), "allocator": "random"},
    ],
    ids=["pairs", "frozen", "allocated"],
)
def test_a_run_resumes_in_the_middle_of_a_period(options, at):
    options = {"period": 3, "active": 1, **options}
    model = LanguageModel(dropout=0.2)
    optimizer = by_blocks(model, **options)
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 8, start=at)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = LanguageModel(dropout=0.2, seed=5)
    resumed = by_blocks(again, **options)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 8, start=at)
    assert same(weights(again), weights(model))


@pytest.mark.parametrize("outside", ["frozen", "always_active", "allocated"])
def test_a_copy_goes_its_own_way_as_the_original_would(outside):
    model = LanguageModel()
    optimizer = by_blocks(
        model, groups=Blocks(outside=outside), backward=Backward(checkpoint_idle=True), period=2
    )
    train(model, optimizer, 3)
    twin, its = copy.deepcopy((model, optimizer))
    before = weights(model)
    train(twin, its, 6, start=3)
    assert same(weights(model), before)
    train(model, optimizer, 6, start=3)
    assert same(weights(model), weights(twin))


def test_a_copied_model_begins_anew_with_other_settings():
    model = LanguageModel()
    original = by_blocks(model, groups=Blocks(outside="frozen"))
    twin = copy.deepcopy(model)
    optimizer = by_blocks(twin)
    before = weights(twin)
    train(twin, optimizer, 1)
    assert moved(twin, before) == OUTSIDE | of_layer(twin, 0)
    assert not original._driver.is_closed


@pytest.mark.parametrize("how", ["close", "forget"])
def test_at_the_end_everything_trains_again(how):
    model = LanguageModel()
    optimizer = by_blocks(
        model, groups=Blocks(outside="frozen"), backward=Backward(checkpoint_idle=True)
    )
    train(model, optimizer, 2)
    if how == "close":
        optimizer.close()
    else:
        del optimizer
        gc.collect()
    assert hooks(model) == 0
    backward(model)
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def test_compiled_frozen_modules_get_no_gradient():
    model = LanguageModel()
    optimizer = by_blocks(model, groups=Blocks(outside="frozen"))
    compiled = torch.compile(model, backend="eager")
    logits = compiled(tokens())
    logits.square().mean().backward()
    found = gradients(model)
    assert optimizer.active_groups == ["layers.0"]
    assert not OUTSIDE & found.keys()
    assert all(found[name].any() for name in of_layer(model, 0))
    assert not any(found[name].any() for name in found.keys() - of_layer(model, 0))


# Several processes


def train_on_rank(rank: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for outside in ("frozen", "always_active"):
        model = LanguageModel().double()
        module = DistributedDataParallel(model)
        optimizer = by_blocks(
            model, groups=Blocks(outside=outside), backward=Backward(checkpoint_idle=True)
        )
        for step in range(6):
            backward(module, 2 * step + rank)
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(model))
        optimizer.close()
    return found


def train_on_both(outside: str) -> dict[str, torch.Tensor]:
    model = LanguageModel().double()
    optimizer = by_blocks(model, groups=Blocks(outside=outside))
    for step in range(6):
        for rank in range(2):
            backward(model, 2 * step + rank)
        for parameter in optimizer.active_parameters():
            parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.distributed
def test_two_processes_train_as_one_that_sees_both_batches():
    start = weights(LanguageModel().double())
    ranks = on_ranks(train_on_rank)
    for outside, one, other in zip(("frozen", "always_active"), *ranks, strict=True):
        assert same(one, other)
        alone = train_on_both(outside)
        for name, weight in alone.items():
            torch.testing.assert_close(one[name], weight, rtol=1e-9, atol=1e-12)
        still = {name for name in start if torch.equal(start[name], one[name])}
        assert still == (OUTSIDE if outside == "frozen" else set())


def test_a_model_that_keeps_keys_and_values_is_told_not_to():
    # A block that runs twice would add its keys to the cache twice.
    tiny = build("gpt2")
    assert tiny.model.config.use_cache
    optimizer = by_blocks(tiny.model, backward=Backward(checkpoint_idle=True))
    tiny.loss().backward()
    assert tiny.model(**tiny.batch).past_key_values is None
    optimizer.close()
    assert tiny.model.config.use_cache
