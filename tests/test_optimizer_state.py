"""A run resumes bit for bit: state dicts at any step, and what they refuse."""

from __future__ import annotations

import copy
import io
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_allocator
from test_optimizer_contract import RULES, user_groups
from torch.optim import lr_scheduler
from toy import ToyAdapter, ToyModel, backward, batch, names, same, train, weights, wrapped

from dynalora_optim import (
    Backward,
    DynamicAllocationOptimizer,
    ForwardNorm,
    GradientNorm,
    ImportanceTracker,
    LocalLR,
    Once,
    Pause,
    Periodic,
    Sensitivity,
    Threshold,
)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(make, stop: int, steps: int = 9):
    """Train straight through, and again with a file and new objects after ``stop`` steps."""
    straight = ToyModel()
    reference = make(straight)
    train(straight, reference, steps)

    first = ToyModel()
    stopped = make(first)
    train(first, stopped, stop)
    state, model_state = through_a_file(stopped.state_dict()), first.state_dict()

    torch.manual_seed(99)  # what the private generator must not depend on
    second = ToyModel(seed=5)
    second.load_state_dict(model_state)
    optimizer = make(second)
    optimizer.load_state_dict(state)
    assert optimizer.active_groups == stopped.active_groups
    train(second, optimizer, steps - stop, start=stop)
    return (straight, reference), (second, optimizer)


def assert_same_run(left, right) -> None:
    (model, optimizer), (other_model, other) = left, right
    assert same(weights(model), weights(other_model))
    assert optimizer.active_groups == other.active_groups
    assert optimizer.tracker.scores() == other.tracker.scores()
    assert optimizer.record.state_dict() == other.record.state_dict()


@given(
    st.integers(0, 9),
    any_allocator,
    st.sampled_from([1, 3, 4, Once(4)]),
    st.sampled_from(["run", "period"]),
    st.integers(1, 6),
    st.integers(0, 10),
)
def test_resume_anywhere_is_bit_for_bit(stop, allocator, period, window, active, seed):
    def make(model):
        return wrapped(
            model,
            active=active,
            period=period,
            allocator=allocator,
            importance=ImportanceTracker(ForwardNorm(), window=window),
            seed=seed,
        )

    assert_same_run(*resumed(make, stop))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_resume_with_every_rule_also_before_all_states_exist(rule):
    # Momentum's first step, Rprop's step size, NAdam's product: none of them begins with zeros.
    cls, options = rule

    def make(model):
        inner = cls(user_groups(model), **{"lr": 0.02, **options})
        return DynamicAllocationOptimizer(inner, model, active=2, period=2, allocator="round_robin")

    assert_same_run(*resumed(make, stop=3))


class Normed(torch.optim.SGD):
    """Keeps a tensor in its groups, as ASGD of pytorch_optimizer does, and divides by a norm."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in moved]).norm() if moved else 1.0
            group["seen"] = group.get("seen", torch.zeros(())) + 1
            for parameter in moved:
                parameter.sub_(group["lr"] * parameter.grad / norm)


def test_modules_that_are_updated_together_still_are_after_loading():
    def make(model):
        inner = Normed(model.parameters(), lr=0.1)
        return DynamicAllocationOptimizer(inner, model, active=2, period=1, allocator="round_robin")

    for stop in (3, 4):
        assert_same_run(*resumed(make, stop))


def test_what_was_changed_during_the_run_goes_on(caplog):
    model = ToyModel()
    optimizer = wrapped(model, active=4, period=1, seed=3)
    optimizer.active = 2
    other = wrapped(ToyModel(), active=4, period=1, seed=3)
    other.load_state_dict(optimizer.state_dict())
    assert other.active == 2
    assert not caplog.messages


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "active": ({"active": 3}, "active=2, but this optimizer was built with active=3"),
    "seed": ({"seed": 8}, "seed=0, but this optimizer was built with seed=8"),
    "period": ({"period": 5}, r"period=Periodic\(n=2, warmup=0\), but .* period=Periodic\(n=5, w"),
    "warmup": ({"period": Periodic(2, warmup=9)}, r"period=Periodic\(n=2, warmup=0\), but .*=9\)"),
    "allocator": ({"allocator": "topk"}, r"allocator=Discounted.*, but .* allocator=TopK"),
    "importance": ({"importance": "gradient"}, "importance=.*Forward.*Gradient.*scores start anew"),
    "measure": (
        {"importance": ForwardNorm(p=1)},
        r"importance=ForwardNorm\(p=2, .*=ForwardNorm\(p=1, part='output'\), .*scores start anew",
    ),
    "window": (
        {"importance": ImportanceTracker(window="period")},
        "importance=.*window=None.*window='period'.*scores start anew",
    ),
    "every": ({"importance": ImportanceTracker(every=2)}, "every=1, but .* every=2"),
    "lr_time": ({"lr_time": LocalLR(float)}, r"lr_time='global', but .* lr_time=LocalLR\(float"),
    "pause": ({"pause": Pause(warmup=2)}, r"pause=Pause\(.*warmup=0\), but .*warmup=2\)"),
    "backward": (
        {"backward": Backward(checkpoint_idle=True)},
        r"backward=Backward\(.*checkpoint_idle=False\), but .*checkpoint_idle=True\)",
    ),
    "master_weights": ({"master_weights": "nearest"}, "master_weights=None, but .*='nearest'"),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_a_changed_setting_counts_and_is_logged(setting, caplog):
    options, line = copy.deepcopy(CHANGES[setting])
    model, other = ToyModel(), ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    train(model, optimizer, 3)
    resumed = wrapped(other, **{"active": 2, "period": 2, **options})
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    (message,) = caplog.messages
    assert re.search(line, message), message
    assert resumed._allocation.steps == 3
    assert resumed.record.state_dict() == optimizer.record.state_dict()
    assert resumed.active == options.get("active", 2)
    anew = "scores start anew" in message
    assert any(resumed.tracker.scores().values()) is not anew
    train(other, resumed, 4, start=3)
    if setting == "period":
        assert [entry.step for entry in resumed.record] == [0, 2, 5]
    caplog.clear()
    again = wrapped(ToyModel(), **{"active": 2, "period": 2, **copy.deepcopy(CHANGES[setting][0])})
    again.load_state_dict(resumed.state_dict())
    assert not caplog.messages, "the settings of the last run count"


class Own:
    """A measure without a repr: the default one has an address."""

    def score(self, forward):
        return forward.output.detach().float().abs().sum()


class Shown(Own):
    def __repr__(self):
        return f"Shown({object.__repr__(self)})"


@pytest.mark.parametrize(
    ("before", "after", "starts_anew"),
    [
        (GradientNorm(p=2), GradientNorm(p=1), True),
        (Sensitivity(), Sensitivity(0.5, 0.5), True),
        (Sensitivity(), Sensitivity(0.85, 0.85), False),
        (Own(), Own(), False),
        (Shown(), Shown(), False),
        (Own(), Shown(), True),
    ],
)
def test_scores_of_other_options_of_a_measure_start_anew(before, after, starts_anew, caplog):
    model = ToyModel()
    optimizer = wrapped(model, active=2, importance=before)
    train(model, optimizer, 3)
    other = wrapped(ToyModel(), active=2, importance=after)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert ("scores start anew" in caplog.text) is starts_anew
    assert (other.tracker.scores() == optimizer.tracker.scores()) is not starts_anew


def test_a_file_that_names_only_the_class_of_the_measure_keeps_its_scores(caplog):
    model = ToyModel()
    optimizer = wrapped(model, active=2, importance=ForwardNorm(p=1))
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        packed = json.loads(group["dynalora"])
        packed["settings"]["importance"] = "'ForwardNorm, window=None'"
        for module in packed["modules"].values():
            del module["reached"]
        group["dynalora"] = json.dumps(packed)
    other = wrapped(ToyModel(), active=2, importance=ForwardNorm(p=1))
    other.load_state_dict(state)
    assert other.tracker.scores() == optimizer.tracker.scores()
    assert not caplog.messages


def test_another_always_active_is_named():
    optimizer = wrapped(ToyModel(), active=2)
    other = wrapped(ToyModel(), active=2, always_active=["layers.0.0"])
    with pytest.raises(ValueError, match=r"unexpected: layers.0.0\. .*same always_active="):
        other.load_state_dict(optimizer.state_dict())


def test_a_round_trip_changes_nothing():
    # accelerator.prepare does load_state_dict(state_dict()), also before the first step.
    for steps in (0, 3):
        model, reference = ToyModel(), ToyModel()
        optimizer, untouched = (wrapped(m, active=2, period=2) for m in (model, reference))
        train(model, optimizer, steps)
        train(reference, untouched, steps)
        states = len(optimizer.state)
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(optimizer.state) == states
        train(model, optimizer, 6, start=steps)
        train(reference, untouched, 6, start=steps)
        assert_same_run((model, optimizer), (reference, untouched))


def test_it_keeps_working_with_a_scheduler_after_loading():
    model = ToyModel()
    optimizer = wrapped(model, lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.load_state_dict(optimizer.state_dict())
    before = weights(model)
    for step in range(60):
        backward(model, step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == 40:
            before = weights(model)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 * 0.5**60}
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-9)


def test_state_dict_holds_plain_values_only():
    model = ToyModel()
    optimizer = wrapped(model, active=2)
    train(model, optimizer, 2)

    def check(value):
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            for item in value.values():
                check(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item)
        else:
            assert type(value) in (torch.Tensor, int, float, str, bool, type(None)), value

    check(optimizer.state_dict())


def test_states_not_yet_materialised_are_saved_as_zeros_and_not_loaded():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=100)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(state["state"]) == len(trainable), "frozen base weights have no state"
    (group,) = state["param_groups"]
    packed = json.loads(group["dynalora"])
    absent = [
        state["state"][key]
        for name, key in zip(packed["param_names"], group["params"], strict=True)
        if name in packed["unmaterialized"]
    ]
    assert len(absent) == 2 * 4
    for values in absent:
        assert all(not value.any() for value in values.values())
        assert values["exp_avg"].shape in ((2, 8), (8, 2))
    optimizer.load_state_dict(state)
    assert len(optimizer.state) == 2 * 2 + 2


def test_what_a_resume_needs_survives_without_the_record():
    # torch.distributed.checkpoint keeps "state" and "param_groups" only.
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    train(model, optimizer, 3)
    state = through_a_file(optimizer.state_dict())
    del state["record"]
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    twin_optimizer.load_state_dict(state_dict=state)
    for one, of in ((model, optimizer), (twin, twin_optimizer)):
        train(one, of, 5, start=3)
    assert same(weights(model), weights(twin))
    assert twin_optimizer.active_groups == optimizer.active_groups


def test_groups_are_matched_by_name_not_by_place():
    model = ToyModel()
    inner = torch.optim.AdamW(user_groups(model), lr=0.02)
    optimizer = DynamicAllocationOptimizer(inner, model, active=2, period=2)
    train(model, optimizer, 3)
    state = through_a_file(optimizer.state_dict())
    assert len(state["param_groups"]) == 3
    state["param_groups"] = state["param_groups"][::-1]
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    twin_optimizer.load_state_dict(state)
    for one, of in ((model, optimizer), (twin, twin_optimizer)):
        train(one, of, 5, start=3)
    assert_same_run((model, optimizer), (twin, twin_optimizer))


def test_parameters_are_matched_by_name_too():
    # The order within a group is that in which the user listed the parameters.
    def make(model, order):
        parameters = list(model.parameters())[::order]
        return DynamicAllocationOptimizer(
            torch.optim.AdamW(parameters, lr=0.05), model, active=2, period=2
        )

    model, twin = ToyModel(), ToyModel()
    optimizer, other = make(model, 1), make(twin, -1)
    train(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for one, of in ((model, optimizer), (twin, other)):
        train(one, of, 5, start=3)
    assert_same_run((model, optimizer), (twin, other))


def saved_bytes(state: dict[str, Any]) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def test_a_file_does_not_grow_with_modules_that_were_never_active():
    model = ToyModel(layers=12, features=1024)
    optimizer = wrapped(model, active=1, period=100)
    model(batch(features=1024)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    moments = [values["exp_avg"] for values in state["state"].values()]
    of_all = 2 * sum(moment.nbytes for moment in moments)
    of_the_active = 2 * sum(optimizer.state[p]["exp_avg"].nbytes for p in optimizer.state)
    assert of_all > 5 * of_the_active
    assert saved_bytes(state["state"]) < of_the_active + 1000 * len(state["state"])
    assert saved_bytes(state) < of_all / 2
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in moments}
    assert sum(held.values()) < of_the_active / 2 + 8 * len(moments), "nor does it need memory"


def test_loading_does_not_change_what_is_loaded():
    model = ToyModel()
    optimizer = wrapped(model, active=2)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    keys = [sorted(group) for group in state["param_groups"]]
    optimizer.load_state_dict(state)
    assert [sorted(group) for group in state["param_groups"]] == keys


# What is refused, before anything changes


def assert_unchanged_by(optimizer, model, state, match):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["record"] == before["record"]
    assert after["state"].keys() == before["state"].keys()


def test_other_groups_are_named():
    model, other = ToyModel(layers=4), ToyModel(layers=3)
    assert_unchanged_by(
        wrapped(other),
        other,
        wrapped(model).state_dict(),
        r"missing: none; unexpected: layers.3.0.A, layers.3.0.B",
    )
    assert_unchanged_by(
        wrapped(model),
        model,
        wrapped(other).state_dict(),
        r"missing: layers.3.0.A, layers.3.0.B.*; unexpected: none",
    )


def test_other_module_groups_of_the_same_parameters_are_named():
    def pairs(name, module):
        place = name.split(".")
        return f"pair {int(place[1]) // 2}" if hasattr(module, "adapter_params") else None

    model, other = ToyModel(layers=4), ToyModel(layers=4)
    assert_unchanged_by(
        wrapped(other),
        other,
        wrapped(model, groups=pairs).state_dict(),
        r"other module groups.*missing: layers.0.0, .*; unexpected: pair 0, pair 1",
    )


def test_the_parameters_in_other_param_groups_are_refused():
    model, other = ToyModel(), ToyModel()
    several = DynamicAllocationOptimizer(torch.optim.AdamW(user_groups(model)), model)
    named = [p for p in other.parameters() if p.requires_grad]
    one = DynamicAllocationOptimizer(torch.optim.AdamW(named), other)
    match = "these parameters in other param groups: 3, here 1. Build the optimizer with the groups"
    assert_unchanged_by(one, other, several.state_dict(), match)


def test_a_group_of_another_size_is_refused():
    model = ToyModel()
    optimizer = wrapped(model)
    state = optimizer.state_dict()
    state["param_groups"][0]["params"] = [0]
    assert_unchanged_by(
        optimizer, model, state, r"in a param group; missing: head.bias, head.*; unexpected: none"
    )


@pytest.mark.parametrize(
    ("saved", "loading", "match"),
    [
        ({}, {"lr_time": "local"}, r"lacks rates of its 2 steps.*saved with another lr_time"),
    ],
)
def test_settings_that_cannot_go_on_are_refused(saved, loading, match):
    model, other = ToyModel(), ToyModel()
    optimizer = wrapped(model, **saved)
    train(model, optimizer, 2)
    assert_unchanged_by(wrapped(other, **loading), other, optimizer.state_dict(), match)


def test_threshold_and_names_come_back():
    model = ToyModel()
    optimizer = wrapped(model, allocator=Threshold(0.4), period=1)
    train(model, optimizer, 2)
    other = wrapped(ToyModel(), allocator=Threshold(0.4), period=1)
    other.load_state_dict(optimizer.state_dict())
    assert [group["name"] for group in other.module_groups] == [*names(), "always_active"]
    assert other.active_groups == optimizer.active_groups


@pytest.mark.parametrize("life", ["same", "resumed", "with a new group"])
def test_groups_that_are_held_stay_alone(life):
    model = ToyModel()
    optimizer = wrapped(model, active=3, period=1)
    train(model, optimizer, 2)
    before, held = optimizer.state_dict(), optimizer.groups[1:3]
    optimizer.hold(held)
    train(model, optimizer, 2, start=2)
    if life == "resumed":
        saved = optimizer.state_dict()
        model = ToyModel()
        optimizer = wrapped(model, active=3, period=1)
        optimizer.load_state_dict(saved)
    if life == "with a new group":
        model.layers.append(torch.nn.Sequential(ToyAdapter(8)))
        optimizer.add_param_group({"params": [model.layers[-1][0].A, model.layers[-1][0].B]})
    train(model, optimizer, 3, start=4)
    assert optimizer.active_groups == held
    assert optimizer.record[-1].chosen == tuple(held)
    assert optimizer.record.counts()["layers.1.0"] >= 5
    if life == "same":  # as it was before
        optimizer.load_state_dict(before)
        train(model, optimizer, 2)
        assert len(optimizer.active_groups) == 3


def test_a_group_that_waits_can_be_held():
    model = ToyModel()
    optimizer = wrapped(model, active=1, period=9)
    model.layers.append(torch.nn.Sequential(ToyAdapter(8)))
    optimizer.add_param_group({"params": [model.layers[-1][0].A, model.layers[-1][0].B]})
    optimizer.hold(["layers.6.0"])
    train(model, optimizer, 2)
    assert optimizer.record.counts()["layers.6.0"] == 2
    optimizer.load_state_dict(optimizer.state_dict())
