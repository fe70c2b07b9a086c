"""Numbers, batches, moves and loops that are not as usual: the run goes on as with plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import Blocks, assert_as_torch, each_kind, made
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from toy import ToyAdapter, ToyModel, backward, batch, names, same, train, weights, wrapped

from dynalora_optim import Budget, GradientNorm, ImportanceTracker

# Numbers that are not finite


def spoilt_backward(
    model: nn.Module,
    where: str,
    value: float,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> None:
    """A forward and backward pass that ``value`` gets into."""
    x = batch(7)
    layer = next(m for m in model.modules() if isinstance(m, ToyAdapter))
    handles = []
    if where == "input":
        x[0, 0] = value
    elif where == "activation":
        handles.append(layer.register_forward_hook(lambda m, args, out: out * value))
    elif where == "gradient":
        handles.append(model.head.weight.register_hook(lambda gradient: gradient * value))
    loss = model(x).square().mean()
    scale(loss * value if where == "loss" else loss).backward()
    for handle in handles:
        handle.remove()


def spoilt_loop(
    where: str, value: float, at: int | None, *, scaled: bool
) -> Callable[[nn.Module, Optimizer], None]:
    """Train six steps; before step ``at`` there is one that runs into ``value``."""

    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)

        def update() -> None:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        for step in range(6):
            if step == at:
                spoilt_backward(model, where, value, scaler.scale)
                update()
            scaler.scale(model(batch(step)).square().mean()).backward()
            update()

    return loop


places = pytest.mark.parametrize("where", ["input", "activation", "gradient", "loss"])


@places
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_bad_number_does_what_it_does_to_plain_torch(where, value, scaled):
    for at in (0, 2, 3):  # the first step, one after a reallocation, one within a period
        plain = assert_as_torch("flagged", spoilt_loop(where, value, at, scaled=scaled))
        assert all(weight.isfinite().all() for weight in plain.values()) is scaled


@places
@pytest.mark.parametrize("window", ["run", "period", None])
def test_a_step_that_the_scaler_skips_leaves_a_gradient_driven_run_as_if_it_had_not_been(
    where, window
):
    def run(at: int | None) -> Any:
        model = ToyModel()
        tracker = ImportanceTracker(GradientNorm(), window=window)
        optimizer = wrapped(model, active=2, period=2, importance=tracker, allocator="topk")
        spoilt_loop(where, math.nan, at, scaled=True)(model, optimizer)
        return weights(model), optimizer.record.state_dict(), optimizer.tracker.scores()

    clean, clean_record, clean_scores = run(None)
    for at in (0, 2, 3):
        spoilt, record, scores = run(at)
        assert same(clean, spoilt)
        assert (record, scores) == (clean_record, clean_scores)


@places
@pytest.mark.parametrize("importance", ["forward", "gradient", "sensitivity"])
def test_without_a_scaler_idle_modules_stay_clean_and_the_clock_goes_on(where, importance):
    model, optimizer = made("flagged", active=2, importance=importance, allocator="round_robin")
    before = weights(model)
    spoilt_backward(model, where, math.nan)
    optimizer.step()
    optimizer.zero_grad()
    idle = {f"{n}.{p}" for n in names() for p in "AB"}
    idle -= {f"{n}.{p}" for n in optimizer.active_groups for p in "AB"}
    assert all(torch.equal(before[name], weights(model)[name]) for name in idle)
    train(model, optimizer, 5)
    assert [entry.step for entry in optimizer.record] == [0, 2, 4, 6]
    assert sum(optimizer.tracker.importance().values()) == pytest.approx(1)


# Batches without rows


@each_kind
@pytest.mark.parametrize("importance", ["forward", "gradient", "sensitivity"])
def test_an_empty_batch_trains_as_with_plain_torch(kind, importance):
    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        for step in range(5):
            rows = 0 if step in (0, 3) else 4
            model(batch(step, rows=rows)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_as_torch(kind, loop, importance=importance)


@each_kind
def test_an_empty_batch_adds_nothing_to_the_scores(kind):
    model, optimizer = made(kind, active=2)
    model(batch(0)).sum().backward()
    before = optimizer.tracker.scores()
    assert min(before.values()) > 0
    model(batch(1, rows=0)).sum().backward()
    assert optimizer.tracker.scores() == before


def test_a_budget_measures_the_first_batch_with_rows():
    torch.manual_seed(0)
    model = Blocks()
    optimizer = wrapped(model, allocator=Budget(memory=0.8, compute=0.8), period=1)
    empty = batch(rows=0)
    model(empty).sum().backward()
    with pytest.raises(RuntimeError, match=r"measured nothing.*with a non-empty batch"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 2)
    model(empty).sum().backward()
    optimizer.step()
    assert len(optimizer.record) == 4
    report = optimizer.memory_report()
    assert report.current.peak <= 0.8 * report.all_active.peak


# A model that is moved


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", [0, 3])
def test_a_model_moved_to_another_dtype_does_what_it_does_with_plain_torch(kind, dtype, after):
    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        train(model, optimizer, after)
        model.to(dtype)
        for step in range(3):
            model(batch(step).to(dtype)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    end = assert_as_torch(kind, loop)
    assert isinstance(end, dict) or after  # moved before its first step, plain AdamW trains


@each_kind
def test_idle_modules_move_along_and_are_trained_later(kind):
    model, optimizer = made(kind, active=1, period=1, allocator="round_robin", rule=SGD)
    train(model, optimizer, 1)
    model.double()
    before = weights(model)
    for _ in optimizer.groups:
        model(batch().double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = weights(model)
    groups = [group for group in optimizer.module_groups if group["name"] in optimizer.groups]
    adapters = [name for group in groups for name in group["param_names"]]
    assert all(after[name].dtype == torch.float64 for name in after)
    assert not any(torch.equal(before[name], after[name]) for name in adapters)


def test_a_model_moved_to_meta_is_not_trained_in_silence():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1)
    model.to("meta")
    model(batch().to("meta")).sum().backward()
    with pytest.raises(RuntimeError, match=r"no longer holds|meta tensor"):
        optimizer.step()
    assert len(optimizer.record) == 1


# Loops of other shapes


def two_forwards(model: nn.Module, optimizer: Optimizer) -> None:
    (model(batch(0)).mean() + model(batch(1)).square().mean()).backward()


def forward_without_backward(model: nn.Module, optimizer: Optimizer) -> None:
    model(batch(0))
    backward(model, 1)
    model(batch(2))


def backward_twice(model: nn.Module, optimizer: Optimizer) -> None:
    loss = model(batch(0)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def two_losses(model: nn.Module, optimizer: Optimizer) -> None:
    """As in a GAN: the second loss goes through the graph of the first, after a step."""
    out = model(batch(0))
    out.square().mean().backward(retain_graph=True)
    (out.mean() + model(out.detach().repeat(1, 3)[:, :8]).mean()).backward()


def a_step_between_two_losses(model: nn.Module, optimizer: Optimizer) -> None:
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1)


def gradients_of_the_input(model: nn.Module, optimizer: Optimizer) -> None:
    x = batch(0).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    (model(batch(1)).square().mean() + gradient.sum()).backward()


LOOPS = [
    two_forwards,
    forward_without_backward,
    backward_twice,
    two_losses,
    a_step_between_two_losses,
    gradients_of_the_input,
]
OPTIONS = [
    {},
    {"importance": ImportanceTracker("gradient", probe=True)},
    {"importance": "sensitivity", "lr_time": "local"},
]


@each_kind
@pytest.mark.parametrize("passes", LOOPS)
@pytest.mark.parametrize("options", OPTIONS, ids=["forward", "probe", "sensitivity, local"])
def test_loops_of_other_shapes(kind, passes, options):
    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        for _ in range(3):
            passes(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()

    def idle_stand_still(model: nn.Module, optimizer: Any) -> None:
        for _ in range(6):
            before = weights(model)
            passes(model, optimizer)
            chosen = set(optimizer.active_groups)
            optimizer.step()
            optimizer.zero_grad()
            for group in optimizer.module_groups:
                if group["name"] in set(optimizer.groups) - chosen:
                    for name, parameter in zip(group["param_names"], group["params"], strict=True):
                        assert torch.equal(before[name], parameter)

    assert_as_torch(kind, loop, **copy.deepcopy(options))
    if passes is not a_step_between_two_losses:  # whose first step may reallocate
        idle_stand_still(*made(kind, active=2, **copy.deepcopy(options)))


def in_evaluation(model: nn.Module) -> None:
    model.eval()
    model(batch(50))
    model.train()


def without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        model(batch(51))


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model(batch(52))


@each_kind
@pytest.mark.parametrize("look", [in_evaluation, without_gradients, in_inference_mode])
@pytest.mark.parametrize("options", OPTIONS, ids=["forward", "probe", "sensitivity, local"])
def test_looking_at_the_model_between_passes_changes_nothing(kind, look, options):
    def run(look: Callable[[nn.Module], None]) -> Any:
        model, optimizer = made(kind, active=2, **copy.deepcopy(options))
        for step in range(6):
            look(model)
            loss = model(batch(step)).square().mean()
            look(model)
            loss.backward()
            look(model)
            optimizer.step()
            optimizer.zero_grad()
        return weights(model), optimizer.record.state_dict(), optimizer.tracker.scores()

    (plain, *decided), (looked, *decided_too) = run(lambda model: None), run(look)
    assert same(plain, looked)
    assert decided_too == decided
