"""The contract with torch: a real Optimizer which, all groups active, is the wrapped one."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from toy import ToyModel, backward, batch, names, same, train, weights, wrapped

from dynalora_optim import Bounded, DynamicAllocationOptimizer, Once

RULES = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW loop": (torch.optim.AdamW, {"foreach": False}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW maximize": (torch.optim.AdamW, {"maximize": True}),
    "AdamW tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.02), "foreach": False}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "ASGD": (torch.optim.ASGD, {"t0": 3.0}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def user_groups(model: nn.Module) -> list[dict]:
    """What users write: no weight decay on biases, a larger rate for B (LoRA+), and the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if n.endswith("A") or n == "head.weight"]},
        {"params": [p for n, p in named if n.endswith("B")], "lr": 0.1},
        {"params": [p for n, p in named if n == "head.bias"], "weight_decay": 0.0},
    ]


def run(make, steps: int = 8) -> dict[str, torch.Tensor]:
    model = ToyModel()
    optimizer = make(model)
    train(model, optimizer, steps)
    return weights(model)


def without_unused_options(cls, model, options):
    return cls(user_groups(model), **{"lr": 0.02, **options})


@every_rule
def test_all_active_is_the_wrapped_optimizer_bit_for_bit(rule):
    cls, options = rule

    def plain(model):
        return without_unused_options(cls, model, options)

    def ours(model):
        return DynamicAllocationOptimizer(plain(model), model, active=1.0, period=2)

    assert same(run(plain), run(ours))


def steps_in_a_row(model, optimizer, step):
    backward(model, step)
    optimizer.step()
    optimizer.step()
    optimizer.zero_grad()


def gradients_that_add_up(model, optimizer, step):
    backward(model, step)
    optimizer.step()


def options_set_before_the_step(model, optimizer, step):
    backward(model, step)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(0.02 / (1 + step))
        else:
            group["lr"] = 0.02 / (1 + step)
        if "betas" in group and step == 2:
            group["betas"] = (0.5, 0.9)
        if "weight_decay" in group and step == 3:
            group["weight_decay"] = 0.3
    optimizer.step()
    optimizer.zero_grad()


def steps_without_gradients(model, optimizer, step):
    if step % 2 == 0:
        backward(model, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=step % 4 == 0)


@pytest.mark.parametrize(
    "loop",
    [
        steps_in_a_row,
        gradients_that_add_up,
        options_set_before_the_step,
        steps_without_gradients,
    ],
)
@every_rule
def test_in_other_loops_too(rule, loop):
    cls, options = rule
    ends = []
    for wrap in (False, True):
        model = ToyModel()
        optimizer = without_unused_options(cls, model, copy.deepcopy(options))
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0, period=2)
        for step in range(5):
            loop(model, optimizer, step)
        ends.append(weights(model))
    assert same(*ends)


def test_all_of_torchs_optimizers_are_covered():
    # Those left out cannot serve: one state for all (LBFGS), sparse gradients only, matrices only.
    covered = {cls for cls, _ in RULES.values()}
    every = {
        getattr(torch.optim, name)
        for name in torch.optim.__all__
        if isinstance(getattr(torch.optim, name, None), type)
        and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    }
    assert {cls.__name__ for cls in every - covered} <= {"Optimizer", "LBFGS", "SparseAdam", "Muon"}


def test_muon_takes_matrices_and_is_wrapped_bit_for_bit():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")

    def plain(model):
        matrices = [p for n, p in model.named_parameters() if n.endswith(("A", "B"))]
        return torch.optim.Muon(matrices, lr=0.02)

    def ours(model):
        return DynamicAllocationOptimizer(plain(model), model, active=1.0)

    assert same(run(plain), run(ours))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("rate", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_lr_schedulers_drive_the_update(make, rate):
    def trained(wrap: bool):
        model = ToyModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=copy.deepcopy(rate), foreach=False)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0, period=2)
        scheduler = make(optimizer)
        for step in range(8):
            backward(model, step)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return weights(model), {float(group["lr"]) for group in optimizer.param_groups}

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Detected call of")  # "scheduler before optimizer"
        (plain, plain_rates), (ours, our_rates) = trained(False), trained(True)
    assert our_rates == plain_rates
    assert same(plain, ours)


def test_reduce_lr_on_plateau_drives_the_update():
    def trained(wrap: bool):
        model = ToyModel()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for step in range(5):
            backward(model, step)
            optimizer.step()
            scheduler.step(1.0)
            optimizer.zero_grad()
        return weights(model)

    assert same(trained(False), trained(True))


def test_a_closure_is_called_once_with_gradients_enabled():
    def trained(wrap: bool):
        model = ToyModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0)
        calls, losses = [], []
        for step in range(4):

            def closure(step=step):
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                return backward(model, step)

            losses.append(optimizer.step(closure).item())
        return weights(model), losses, calls

    (plain, plain_losses, _), (ours, losses, calls) = trained(False), trained(True)
    assert same(plain, ours)
    assert losses == plain_losses
    assert calls == [True] * 4


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_unscales_and_skips_as_for_the_wrapped_optimizer(fused):
    def trained(wrap: bool):
        model = ToyModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        for step in range(6):
            loss = model(batch(step)).square().mean() * (math.inf if step == 2 else 1.0)
            scaler.scale(loss).backward()
            if not fused:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return weights(model), scaler.get_scale()

    (plain, plain_scale), (ours, scale) = trained(False), trained(True)
    assert scale == plain_scale
    for name, weight in plain.items():
        # The fused kernel divides by the scale itself, after which rounding differs by an ulp.
        torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-7 if fused else 0)
        assert weight.isfinite().all()


def test_it_is_an_optimizer_that_owns_groups_and_state():
    model = ToyModel()
    inner = torch.optim.AdamW(user_groups(model), lr=0.02)
    optimizer = DynamicAllocationOptimizer(inner, model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults == inner.defaults
    assert not optimizer._step_supports_amp_scaling
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == 6 * 2 + 2


def test_user_groups_are_split_per_module_and_inherit_every_option():
    model = ToyModel(layers=3)
    optimizer = DynamicAllocationOptimizer(torch.optim.AdamW(user_groups(model), lr=0.02), model)
    rows = [
        (g["name"], g["param_names"], float(g["lr"]), g["weight_decay"])
        for g in optimizer.module_groups
    ]
    assert rows == [
        *((name, [f"{name}.A"], 0.02, 0.01) for name in names(3)),
        ("always_active", ["head.weight"], 0.02, 0.01),
        *((name, [f"{name}.B"], 0.1, 0.01) for name in names(3)),
        ("always_active", ["head.bias"], 0.02, 0.0),
    ]
    for group in optimizer.module_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is parameter


def test_a_name_that_the_user_gave_a_group_is_kept():
    model = ToyModel(layers=1)
    inner = torch.optim.SGD([{"params": list(model.parameters()), "name": "decay"}], lr=0.1)
    optimizer = DynamicAllocationOptimizer(inner, model)
    assert optimizer.param_groups[0]["name"] == "decay"
    assert {group["user_name"] for group in optimizer.module_groups} == {"decay"}


def test_named_parameters_are_accepted():
    model = ToyModel(layers=1)
    optimizer = DynamicAllocationOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=0.1), model
    )
    assert optimizer.module_groups[0]["param_names"] == ["layers.0.0.A", "layers.0.0.B"]


@given(st.integers(1, 6), st.integers(1, 4))
def test_active_groups_are_stepped_in_one_torch_call(active, layers):
    model = ToyModel(layers=6)
    optimizer = wrapped(model, active=active)
    calls = []
    optimizer._rule.optimizer.step = lambda: calls.append(
        [group["params"] for group in optimizer._rule.optimizer.param_groups]
    )
    backward(model)
    optimizer.step()
    assert len(calls) == 1
    (merged,) = calls[0]
    assert sum(p.grad is not None for p in merged) == 2 * active + 2


def test_group_values_that_the_rule_changes_are_written_back():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return super().step(closure)

    model = ToyModel()
    optimizer = wrapped(model, Counting, active=2, period=1, allocator="round_robin")
    train(model, optimizer, 3)
    assert [group["k"] for group in optimizer.module_groups] == [1] * 6 + [3]


def test_state_of_the_wrapped_optimizer_is_taken_over():
    def trained(wrap: bool):
        model = ToyModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        train(model, optimizer, 3)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0)
        train(model, optimizer, 3, start=3)
        return weights(model)

    assert same(trained(False), trained(True))


def test_step_hooks_fire_once_whoever_they_were_registered_on():
    model = ToyModel()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[tuple[str, object]] = []

    def hook(label):
        return lambda optimizer, args, kwargs: seen.append((label, optimizer))

    inner.register_step_pre_hook(hook("inner pre"))
    optimizer = DynamicAllocationOptimizer(inner, model)
    optimizer.register_step_post_hook(hook("post"))
    everywhere = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        train(model, optimizer, 1)
    finally:
        for handle in everywhere:
            handle.remove()
    assert seen == [
        (label, optimizer) for label in ("global pre", "inner pre", "post", "global post")
    ]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_deepcopy_and_pickle_continue_alike(duplicate):
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    train(model, optimizer, 3)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert twin_optimizer.active_groups == optimizer.active_groups
    for one, of in ((model, optimizer), (twin, twin_optimizer)):
        train(one, of, 6, start=3)
    assert same(weights(model), weights(twin))
    assert twin_optimizer.record.counts() == optimizer.record.counts()


def test_a_copy_is_independent():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = weights(model)
    train(twin, twin_optimizer, 4)
    assert same(weights(model), before)
    assert len(optimizer.record) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = ToyModel()
    optimizer = wrapped(model)
    backward(model)
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in model.parameters()]
    assert all(grad is None or (not set_to_none and not grad.any()) for grad in grads)


def test_modes_are_handed_to_a_rule_that_has_them():
    class WithModes(torch.optim.SGD):
        def train(self):
            for group in self.param_groups:
                group["mode"] = "train"

        def eval(self):
            for group in self.param_groups:
                group["mode"] = "eval"

    optimizer = wrapped(ToyModel(), WithModes)
    for mode in ("eval", "train"):
        getattr(optimizer, mode)()
        assert {group["mode"] for group in optimizer.param_groups} == {mode}
    wrapped(ToyModel()).eval()  # AdamW has no modes: nothing to do


def test_repr_says_what_is_wrapped_and_how_much_is_active():
    optimizer = wrapped(ToyModel(), active=4)
    assert "AdamW" in repr(optimizer)
    assert "4 of 6 groups active" in repr(optimizer)


def grow(model: ToyModel, optimizer: DynamicAllocationOptimizer) -> str:
    """Append an adapted layer and add its parameters; return its name."""
    layer = ToyModel(layers=1, seed=1).layers[0]
    model.layers.append(layer)
    optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.3})
    return f"layers.{len(model.layers) - 1}.0"


def test_add_param_group_joins_what_was_adapted_since():
    model = ToyModel(layers=3)
    optimizer = wrapped(model, active=1.0, period=100)
    train(model, optimizer, 1)
    name = grow(model, optimizer)
    assert optimizer.groups == optimizer.active_groups == names(4), "all active means all"
    assert {g["name"]: g["lr"] for g in optimizer.module_groups}[name] == 0.3
    before = weights(model)
    train(model, optimizer, 1, start=1)
    assert not torch.equal(model.layers[3][0].A, before[f"{name}.A"])


@pytest.mark.parametrize("period", [100, Once(at=1)])
def test_added_modules_are_considered_after_the_coming_step(period):
    model = ToyModel(layers=3)
    optimizer = wrapped(model, active=1, period=period, allocator="round_robin")
    train(model, optimizer, 2)
    selections = len(optimizer.record)
    name = grow(model, optimizer)
    backward(model, 2)  # a window of accumulation is not cut in two
    assert name not in optimizer.active_groups
    assert model.get_submodule(name).A.grad is None
    optimizer.step()
    assert len(optimizer.record) == selections + 1
    assert set(optimizer.record[-1].scores) == set(names(4))


def test_added_modules_must_not_break_the_starvation_bound():
    model = ToyModel(layers=6)
    optimizer = wrapped(model, active=2, allocator=Bounded("discounted", 2))
    with pytest.raises(ValueError, match="max_idle_periods=2 cannot be kept with 2 of 7"):
        grow(model, optimizer)
    assert optimizer.groups == names(6)
    assert len(optimizer.param_groups) == 1


def test_add_param_group_takes_parameters_outside_the_modules():
    model = ToyModel()
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if all(p is not h for h in head)]
    optimizer = DynamicAllocationOptimizer(torch.optim.SGD(rest, lr=0.1), model, active=1)
    optimizer.add_param_group({"params": head})
    before = weights(model)
    train(model, optimizer, 1)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_add_param_group_refuses_strangers_and_duplicates_before_any_change():
    model = ToyModel()
    optimizer = wrapped(model)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="not in the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="another param group holds"):
        optimizer.add_param_group({"params": model.head.weight})
    assert len(optimizer.param_groups) == groups


def test_close_activates_all_and_leaves_nothing_behind():
    model = ToyModel()
    inner = torch.optim.AdamW(model.parameters(), lr=0.02)
    optimizer = DynamicAllocationOptimizer(inner, model, active=1)
    optimizer.close()
    assert all(layer[0].active for layer in model.layers)
    hooks = itertools.chain.from_iterable(
        (module._forward_hooks, module._forward_pre_hooks) for module in model.modules()
    )
    assert not any(hooks)
    assert len(optimizer.record) == 1
    DynamicAllocationOptimizer(inner, model)  # free to be wrapped again
