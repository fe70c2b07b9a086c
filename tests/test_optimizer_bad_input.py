"""Bad input raises before anything changes, and says which parameter, rule, value and remedy."""

from __future__ import annotations

import copy
import gc
import math
import re

import pytest
import torch
from kinds import Blocks, foreign, foreign_groups
from torch import nn
from toy import ToyModel, backward, names, same, train, weights, wrapped

from dynalora_optim import Backward, Budget, DynamicAllocationOptimizer, Stochastic


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def assert_refused(make, model, error, match):
    """``make`` raises, and neither the model nor a second try shows that it was called."""
    before = weights(model)
    flags = [layer[0].active for layer in model.layers]
    with pytest.raises(error, match=match):
        make()
    assert same(weights(model), before)
    assert [layer[0].active for layer in model.layers] == flags
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"active": 0}, ValueError, r"active=0 leaves no module to train.*1 to 6"),
        ({"active": -3}, ValueError, r"active=-3 leaves no module"),
        ({"active": 7}, ValueError, r"active=7 exceeds the 6 adapter groups.*at most 6"),
        ({"active": math.nan}, ValueError, r"active=nan is not a share in \(0, 1\]"),
        ({"active": 1.5}, ValueError, r"active=1.5 is not a share"),
        ({"active": "all"}, TypeError, r"active='all' is not a number"),
        ({"period": 0}, ValueError, r"period=0 must be a whole number of optimizer steps"),
        ({"period": "often"}, TypeError, r"period='often' is neither"),
        ({"allocator": "best"}, ValueError, r"allocator='best' is not a known allocator"),
        ({"importance": "magic"}, ValueError, r"importance='magic' is not a known measure"),
        ({"groups": "some"}, TypeError, r"groups='some' is not a rule"),
        (
            {"always_active": ["layers.9.*"]},
            ValueError,
            r"always_active='layers.9.\*' matches none",
        ),
        ({"always_active": ["*"]}, ValueError, r"matches all 6 module groups"),
        ({"always_active": "layers.0.0"}, TypeError, r"one string; pass a sequence"),
    ],
)
def test_options(options, error, match):
    model = ToyModel()
    inner = adamw(model)
    assert_refused(lambda: DynamicAllocationOptimizer(inner, model, **options), model, error, match)
    DynamicAllocationOptimizer(inner, model)  # the failed try has not claimed it


@pytest.mark.parametrize("seed", ["x", -1, 1.5, True, None])
def test_a_seed_is_a_whole_number(seed):
    model = ToyModel()
    assert_refused(
        lambda: wrapped(model, seed=seed),
        model,
        ValueError,
        rf"seed={seed!r} must be a whole number, at least 0; pass an int",
    )


@pytest.mark.parametrize("name", [3, ("a",), True])
def test_a_group_has_a_name(name):
    model = ToyModel()
    assert_refused(
        lambda: wrapped(model, groups=lambda _, module: name),
        model,
        TypeError,
        rf"groups=callable returned {re.escape(repr(name))} for the module ''; it must return the",
    )


def test_setting_active_is_checked_at_once():
    optimizer = wrapped(ToyModel(), active=3)
    with pytest.raises(ValueError, match="active=9 exceeds the 6"):
        optimizer.active = 9
    assert optimizer.active == 3


@pytest.mark.parametrize("thing", [torch.optim.AdamW, None, "AdamW"])
def test_something_that_is_no_optimizer(thing):
    model = ToyModel()
    assert_refused(
        lambda: DynamicAllocationOptimizer(thing, model),
        model,
        TypeError,
        r"is not a torch.optim.Optimizer; pass an instance",
    )


def test_parameters_of_another_model():
    model = ToyModel()
    assert_refused(
        lambda: DynamicAllocationOptimizer(adamw(ToyModel()), model),
        model,
        ValueError,
        r"parameter\(s\) that are not in the model: #0 of shape \(2, 8\)",
    )


def test_groups_that_the_optimizer_does_not_hold_are_named():
    # Built from what was unfrozen at the time: the other layers would never be trained.
    model = ToyModel()
    held = [p for name, p in model.named_parameters() if name[:8] not in ("layers.2", "layers.4")]
    assert_refused(
        lambda: DynamicAllocationOptimizer(torch.optim.AdamW(held), model),
        model,
        ValueError,
        r"holds no parameter of 2 module group\(s\): layers.2.0, layers.4.0",
    )


def test_groups_that_are_frozen_at_construction_are_named():
    model = ToyModel().requires_grad_(False)  # a head that trains would be enough
    assert_refused(
        lambda: DynamicAllocationOptimizer(adamw(model), model),
        model,
        ValueError,
        r"requires_grad is False for every parameter of all 6 module groups: layers.0.0.* holds "
        r"nothing else that trains. Set requires_grad to True for one of them.*set_adapter",
    )
    model.layers[0].requires_grad_(True)
    assert_refused(
        lambda: DynamicAllocationOptimizer(adamw(model), model, always_active=["layers.1.0"]),
        model,
        ValueError,
        r"always_active= names 1 module group.*requires_grad is False.*layers.1.0.*Set it to True",
    )


def test_a_wrapper_cannot_be_wrapped():
    model = ToyModel()
    first = DynamicAllocationOptimizer(adamw(model), model)
    with pytest.raises(ValueError, match="already wraps another optimizer"):
        DynamicAllocationOptimizer(first, model)
    assert not first._driver.is_closed


def test_lbfgs_cannot_be_allocated():
    model = ToyModel()
    assert_refused(
        lambda: DynamicAllocationOptimizer(torch.optim.LBFGS(model.parameters()), model),
        model,
        ValueError,
        r"LBFGS keeps one state over all parameters",
    )


@pytest.mark.parametrize("selection", [[], [6], [-1], [0, 0]])
def test_an_allocator_that_selects_nonsense(selection):
    class Nonsense:
        def select(self, context):
            return selection

    model = ToyModel()
    with pytest.raises(ValueError, match=r"must return at least one position in 0\.\.5, each once"):
        wrapped(model, allocator=Nonsense())


@pytest.mark.parametrize("again", ["the same inner optimizer", "a new one"])
def test_a_second_optimizer_takes_over_from_the_first_and_says_so(again, caplog):
    """The notebook cell that builds the optimizer is run again."""
    model, reference = ToyModel(), ToyModel()
    inner, plain = adamw(model), adamw(reference)
    first = DynamicAllocationOptimizer(inner, model, active=1.0)
    train(model, first, 3)
    train(reference, plain, 3)
    if again == "a new one":
        inner, plain = adamw(model), adamw(reference)
    with caplog.at_level("WARNING"):
        second = DynamicAllocationOptimizer(inner, model, active=1.0, period=1)
    (line,) = caplog.messages
    assert "takes over the 6 module groups of an earlier one" in line
    train(model, second, 3, start=3)
    train(reference, plain, 3, start=3)
    assert same(weights(model), weights(reference))
    with pytest.raises(RuntimeError, match=r"step\(\) after close\(\)"):
        first.step()


def linear_groups(name: str, module: nn.Module) -> str | None:
    """The rule that makes the one part of each `Foreign` a group."""
    return name if name.endswith("inner") else None


REGROUPED = {  # a model, and two rules that find other modules, with the same parameters
    "full": (foreign, foreign_groups, linear_groups),
    "adapters": (Blocks, "auto", "blocks"),
}


def trainable(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("kind", REGROUPED)
@pytest.mark.parametrize("turned", [False, True])
def test_a_second_optimizer_takes_over_also_if_its_groups_are_of_other_modules(
    kind, turned, caplog
):
    make, *rules = REGROUPED[kind]
    torch.manual_seed(0)
    model = make()
    reference = copy.deepcopy(model)
    before, after = reversed(rules) if turned else rules
    first = DynamicAllocationOptimizer(trainable(model), model, active=1, groups=before)
    with caplog.at_level("WARNING"):
        second = DynamicAllocationOptimizer(trainable(model), model, active=1.0, groups=after)
    (line,) = caplog.messages
    assert f"takes over the {len(first.driven_groups())} module groups of an earlier one" in line
    train(model, second, 3)
    train(reference, trainable(reference), 3)
    assert same(weights(model), weights(reference))
    with pytest.raises(RuntimeError, match=r"step\(\) after close\(\)"):
        first.step()


def test_taking_over_a_part_of_groups_of_other_modules_is_refused():
    model = foreign()
    first = DynamicAllocationOptimizer(adamw(model), model, active=1, groups=foreign_groups)
    with pytest.raises(ValueError, match=r"drives 4 module groups.*take over 1 of them, but not 0"):
        DynamicAllocationOptimizer(
            adamw(model), model, groups=lambda name, _: name if name == "3.inner" else None
        )
    assert not first._driver.is_closed


def test_an_optimizer_that_is_refused_takes_nothing_over():
    model = ToyModel()
    first = wrapped(model, active=1)
    with pytest.raises(ValueError, match="active=9 exceeds"):
        wrapped(model, active=9)
    assert not first._driver.is_closed
    assert len(first.active_groups) == 1


def test_taking_over_a_part_is_refused():
    model = ToyModel()
    first = wrapped(model)
    half = names()[:3]
    with pytest.raises(
        ValueError, match=r"drives 6 module groups.*take over 3 of them, but not layers\.3\.0"
    ):
        wrapped(model, active=1, groups=lambda name, _: name if name in half else None)
    assert not first._driver.is_closed


def test_closing_leaves_the_wrapped_optimizer_whole():
    model, reference = ToyModel(), ToyModel()
    inner, plain = adamw(model), adamw(reference)
    optimizer = DynamicAllocationOptimizer(inner, model, active=1.0)
    train(model, optimizer, 3)
    train(reference, plain, 3)
    optimizer.close()
    assert [len(group["params"]) for group in inner.param_groups] == [
        len(group["params"]) for group in plain.param_groups
    ]
    train(model, inner, 3, start=3)
    train(reference, plain, 3, start=3)
    assert same(weights(model), weights(reference))


@pytest.mark.parametrize(
    "allocator", ["threshold", Stochastic("bernoulli"), Budget(memory=1.0)], ids=repr
)
def test_active_is_refused_where_the_allocator_makes_no_use_of_it(allocator):
    model = Blocks()
    inner = adamw(model)
    with pytest.raises(ValueError, match=r"active=2 has no effect with (Thr|Sto|Bud)"):
        DynamicAllocationOptimizer(inner, model, active=2, allocator=allocator)
    optimizer = DynamicAllocationOptimizer(inner, model, allocator=allocator)
    with pytest.raises(ValueError, match="active=1 has no effect"):
        optimizer.active = 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"pause": 3}, TypeError, "pause=3 is neither a Pause nor one of keep"),
        ({"pause": "disk"}, ValueError, "state='disk'"),
        ({"backward": True}, TypeError, "backward=True is not a Backward"),
    ],
)
def test_options_of_another_kind(options, error, match):
    model = ToyModel()
    assert_refused(lambda: wrapped(model, **options), model, error, match)


def test_switches_of_the_backward_pass_are_bools():
    with pytest.raises(TypeError, match=r"Backward\(fused='yes'\): pass True or False"):
        Backward(fused="yes")


def test_two_optimizers_over_disjoint_parts():
    model = ToyModel()
    halves = [
        wrapped(model, active=1, groups=lambda name, m, half=half: name if name in half else None)
        for half in (names()[:3], names()[3:])
    ]
    train_both = weights(model)
    backward(model)
    for optimizer in halves:
        optimizer.step()
    moved = [n for n in names() if not torch.equal(model.get_submodule(n).A, train_both[f"{n}.A"])]
    assert moved == [name for optimizer in halves for name in optimizer.active_groups]


def test_an_optimizer_that_is_gone_leaves_the_model_free():
    model = ToyModel()
    optimizer = wrapped(model, active=1)
    del optimizer
    gc.collect()
    assert all(layer[0].active for layer in model.layers)
    assert not any(module._forward_hooks for module in model.modules())
    wrapped(model)


def test_a_closed_optimizer_that_is_gone_does_not_disturb_its_successor():
    model = ToyModel()
    first = wrapped(model, active=1)
    first.close()
    second = wrapped(model, active=1)
    flags = [layer[0].active for layer in model.layers]
    del first
    gc.collect()
    assert [layer[0].active for layer in model.layers] == flags
    assert flags.count(True) == len(second.active_groups) == 1


def test_a_closed_optimizer_does_not_step():
    model = ToyModel()
    optimizer = wrapped(model)
    optimizer.close()
    before = weights(model)
    backward(model)
    with pytest.raises(RuntimeError, match="after close"):
        optimizer.step()
    assert same(weights(model), before)
    assert optimizer.record.counts()


def test_a_closed_optimizer_can_be_followed_by_another():
    model = ToyModel()
    wrapped(model).close()
    optimizer = wrapped(model)
    backward(model)
    optimizer.step()
