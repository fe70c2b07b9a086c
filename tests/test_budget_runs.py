"""Runs on a budget: no step exceeds it, a resume repeats it, a larger batch is fitted to it."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from budgets import (
    MODELS,
    adapted,
    clear,
    costs_of,
    gradients,
    measured,
    on_budget,
)
from tiny_models import CLASSES, ROOMY, TINY, TinyModel
from toy import ToyModel, batch, same, train, weights, wrapped

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import Budget, GradientNorm, ImportanceTracker, Periodic
from dynalora_optim.allocation._search import least_peak

SMALL = replace(TINY, blocks=4)
TIGHT = Budget(memory=0.5, compute=0.8)


@pytest.mark.parametrize(
    ("name", "how", "base"),
    [
        *((name, "ours", "discounted") for name in MODELS),
        ("bert", "ours", "topk"),
        ("llama", "ours", "topk"),
        ("gpt2", "peft", "discounted"),
        ("llama", "peft", "discounted"),
    ],
)
def test_no_step_of_a_run_exceeds_the_budget(name, how, base):
    tiny = adapted(name, how)
    budget = Budget(memory=0.55, compute=0.9, base=base)
    optimizer = on_budget(tiny, budget, rule=torch.optim.AdamW, period=1)
    tiny.loss()
    limit = budget.limit(costs_of(optimizer))
    for _ in range(13):
        clear(tiny)
        peak, _ = measured(tiny.loss)
        assert peak <= limit
        optimizer.step()
    assert len(optimizer.record) == 14
    if base == "discounted":
        assert len({reallocation.chosen for reallocation in optimizer.record}) > 2


@pytest.mark.parametrize("name", MODELS)
def test_all_modules_in_the_least_memory_train_like_the_plain_optimizer(name):
    """With ``"topk"`` and no bound on compute, the budget only decides what is recomputed.

    In the first step, before the loop is known, it trains the last block alone.
    """
    tiny = adapted(name, sizes=SMALL)
    plain = replace(tiny, model=copy.deepcopy(tiny.model))
    adamw = torch.optim.AdamW(plain.model.parameters(), lr=0.01)
    other = on_budget(tiny)
    tiny.loss()
    costs = costs_of(other)
    other.close()
    least = least_peak(costs, 0, range(len(costs.blocks)))
    optimizer = on_budget(tiny, Budget(memory=least, base="topk"), rule=torch.optim.AdamW, period=2)
    for step in range(6):
        peak, _ = measured(tiny.loss)
        assert peak <= least < 0.8 * costs.whole_peak
        plain.loss().backward()
        for mine, other in zip(plain.model.parameters(), tiny.model.parameters(), strict=True):
            if step == 0 and other.grad is None:
                mine.grad = None
        assert (optimizer.active_groups == optimizer.groups) == (step > 0)
        for each in (adamw, optimizer):
            each.step()
            each.zero_grad()
    assert same(weights(tiny.model), weights(plain.model))


def saved_and_loaded(*parts) -> list:
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def run(tiny: TinyModel, optimizer, steps: int) -> None:
    for _ in range(steps):
        tiny.loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("stop", [1, 5, 6])
def test_a_resumed_run_goes_on_bit_for_bit_and_measures_nothing(stop, monkeypatch):
    options = {"period": 3, "rule": torch.optim.AdamW}
    whole = adapted("bert", sizes=SMALL)
    optimizer = on_budget(whole, TIGHT, **options)
    run(whole, optimizer, stop)
    states = saved_and_loaded(whole.model, optimizer)
    run(whole, optimizer, 12 - stop)

    fresh = adapted("bert", sizes=SMALL, seed=3)
    resumed = on_budget(fresh, TIGHT, **options)
    fresh.batch = whole.batch
    fresh.model.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    monkeypatch.setattr(resumed._costing, "measure", None)
    run(fresh, resumed, 12 - stop)
    assert same(weights(whole.model), weights(fresh.model))
    assert list(resumed.record) == list(optimizer.record)
    assert costs_of(resumed) == costs_of(optimizer)
    assert resumed._allocation._spending._compute == optimizer._allocation._spending._compute > 0


def test_a_copy_of_model_and_optimizer_goes_its_own_way():
    tiny = adapted("llama", sizes=SMALL)
    optimizer = on_budget(tiny, TIGHT, period=2)
    run(tiny, optimizer, 3)
    model, copied = copy.deepcopy((tiny.model, optimizer))
    other = replace(tiny, model=model)
    before = weights(tiny.model)
    run(other, copied, 4)
    assert same(before, weights(tiny.model))
    run(tiny, optimizer, 4)
    assert same(weights(tiny.model), weights(model))
    copied.close()
    model.train()
    caches = [one(**tiny.batch).past_key_values for one in (model, tiny.model)]
    assert caches[1] is None
    run(tiny, optimizer, 1)


def test_a_larger_batch_is_measured_and_the_choice_shrinks_until_it_fits():
    tiny = adapted("bert", sizes=replace(ROOMY, blocks=10))
    other = on_budget(tiny)
    tiny.loss()
    memory = least_peak(costs_of(other), 0, range(10))
    other.close()
    optimizer = on_budget(tiny, Budget(memory=memory, base="topk"), period=100)
    run(tiny, optimizer, 2)
    assert optimizer.active_groups == optimizer.groups
    usual, elements = tiny.batch, costs_of(optimizer).batch
    tiny.batch = {key: torch.cat([value, value[:1]]) for key, value in usual.items()}
    tiny.loss()
    assert costs_of(optimizer).batch == elements * 5 // 4
    kept = optimizer.active_groups
    assert kept == optimizer.groups[-len(kept) :] != optimizer.groups
    clear(tiny)
    peak, _ = measured(tiny.loss)
    assert peak <= memory
    clear(tiny)
    tiny.batch = usual
    run(tiny, optimizer, 1)  # a smaller one changes nothing
    assert optimizer.active_groups == kept


def test_a_larger_batch_that_can_never_fit_is_refused_and_changes_nothing():
    tiny = adapted("bert", sizes=SMALL)
    optimizer = on_budget(tiny, Budget(memory=400_000))
    run(tiny, optimizer, 2)
    costs, chosen, small = costs_of(optimizer), optimizer.active_groups, tiny.batch
    tiny.batch = {key: torch.cat([value] * 64) for key, value in small.items()}
    with pytest.raises(ValueError, match=r"Budget\(memory=400000\) cannot hold"):
        tiny.loss()
    assert costs_of(optimizer) == costs
    assert optimizer.active_groups == chosen
    tiny.batch = small
    run(tiny, optimizer, 60)  # also through selections, which ask for the largest batch
    assert len(optimizer.record) > 2


def test_a_step_before_any_forward_says_so():
    optimizer = wrapped(ToyModel(), allocator=Budget(memory=1.0))
    with pytest.raises(RuntimeError, match=r"measured nothing.*in train\(\) mode"):
        optimizer.step()


def test_evaluation_measures_nothing():
    model = ToyModel()
    optimizer = wrapped(model, allocator=Budget(memory=0.9))
    with torch.no_grad():
        model(batch())
    model.eval()
    model(batch())
    assert optimizer._allocation.costs is None
    model.train()
    train(model, optimizer, 1)
    costs = costs_of(optimizer)
    with torch.no_grad():
        model(batch(rows=64))
    assert costs_of(optimizer) == costs


def test_accumulation_neither_measures_nor_moves_the_clock_between_steps():
    tiny = adapted("bert", sizes=SMALL)
    optimizer = on_budget(tiny, TIGHT, period=1)
    tiny.loss().backward()
    costs, chosen = costs_of(optimizer), optimizer.active_groups
    once = gradients(tiny)
    for _ in range(2):
        tiny.loss().backward()
    assert costs_of(optimizer) == costs
    assert optimizer.active_groups == chosen
    for name, gradient in gradients(tiny).items():
        torch.testing.assert_close(gradient, 3 * once[name])
    optimizer.step()
    assert optimizer.record[-1].step == 1


@pytest.mark.parametrize("memory", [1.0, 0.6])
def test_a_gradient_probe_stays_within_the_budget(memory):
    tiny = adapted("bert")
    importance = ImportanceTracker(GradientNorm(), probe=True)
    optimizer = on_budget(tiny, Budget(memory=memory), importance=importance, period=3)
    tiny.loss()
    limit = optimizer.allocator.limit(costs_of(optimizer))
    for _ in range(9):
        peak, _ = measured(tiny.loss)
        assert peak <= limit
        held = {name for name, p in tiny.model.named_parameters() if p.grad is not None}
        allowed = {
            name
            for group in optimizer.module_groups
            if group["name"] in optimizer.active_groups or group["name"] not in optimizer.groups
            for name in group["param_names"]
        }
        assert held <= allowed
        optimizer.step()
        optimizer.zero_grad()
    assert all(score > 0 for score in optimizer.tracker.scores().values())


def test_all_modules_warm_up_within_the_budget():
    tiny = adapted("bert")
    budget = Budget(memory=0.6)
    optimizer = on_budget(tiny, budget, period=Periodic(1, warmup=3))
    tiny.loss()
    limit = budget.limit(costs_of(optimizer))
    for step in range(6):
        # The first step shows how the loop works; for that the least that can train does.
        assert (optimizer.active_groups == optimizer.groups) == (0 < step < 3) or step > 3
        peak, _ = measured(tiny.loss)
        assert peak <= limit
        optimizer.step()
        optimizer.zero_grad()


def test_tied_word_embeddings_are_no_obstacle():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=CLASSES * 16, n_positions=16, n_embd=32, n_layer=4, n_head=4
    )
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    inject(model, LoRAConfig(rank=4, alpha=8, targets=["c_attn"]))
    model.train()
    ids = torch.randint(0, 48, (2, 8))
    tiny = TinyModel("gpt2-lm", model, {"input_ids": ids, "labels": ids}, ["c_attn"], [])
    optimizer = on_budget(tiny, Budget(memory=0.8), period=1)
    run(tiny, optimizer, 3)
    assert not costs_of(optimizer).prefix
    optimizer.close()
