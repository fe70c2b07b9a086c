"""The wrapped optimizer, its groups and its loop stay what their user knows."""

from __future__ import annotations

import copy
import logging
import types
import warnings
from collections import defaultdict

import pytest
import torch
from kinds import hooks
from test_optimizer_contract import user_groups
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from toy import ToyModel, backward, batch, names, same, train, weights, wrapped

from dynalora_optim import (
    DynamicAllocationOptimizer,
    GradientNorm,
    ImportanceTracker,
    LocalLR,
    Pause,
    Sensitivity,
)


def both(**options):
    """A plain optimizer, and another of the same groups, wrapped with all modules active."""
    model, twin = ToyModel(), ToyModel()
    inner = AdamW(user_groups(twin), lr=0.02)
    options = {"active": 1.0, **options}
    return (model, AdamW(user_groups(model), lr=0.02)), (
        twin,
        inner,
        DynamicAllocationOptimizer(inner, twin, **options),
    )


# Groups and schedulers


def test_param_groups_are_the_users_own():
    (_, plain), (_, inner, optimizer) = both()
    assert optimizer.param_groups is inner.param_groups
    shown = [
        {k: v for k, v in group.items() if k not in ("params", "dynalora")}
        for group in optimizer.param_groups
    ]
    expected = [{k: v for k, v in g.items() if k != "params"} for g in plain.param_groups]
    assert shown == expected
    sizes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
    assert sizes == [[p.shape for p in group["params"]] for group in plain.param_groups]


SCHEDULERS = {
    "a function per group": lambda o: lr_scheduler.LambdaLR(
        o, [lambda s: 1 / (1 + s), lambda s: 0.5**s, lambda s: 1.0]
    ),
    "a rate per group": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2, 0.3], total_steps=12),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=[1e-3, 1e-4, 1e-5]),
    "a range per group": lambda o: lr_scheduler.CyclicLR(
        o, [0.01, 0.02, 0.03], 0.1, 2, cycle_momentum=False
    ),
    "a chain": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)],
        [3],
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}


def loop(model, optimizer, scheduler, steps=8):
    rates = []
    for step in range(steps):
        loss = backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(*([loss] if "Plateau" in type(scheduler).__name__ else []))
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("built", ["on the wrapper", "on the inner, after", "on the inner, before"])
@pytest.mark.parametrize("lr_time", ["global", "local"])
def test_a_scheduler_reaches_the_run_whatever_it_was_built_on(name, built, lr_time):
    make = SCHEDULERS[name]
    model, twin = ToyModel(), ToyModel()
    plain, inner = AdamW(user_groups(model), lr=0.02), AdamW(user_groups(twin), lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        warnings.filterwarnings("ignore", message="The epoch parameter")
        expected = loop(model, plain, make(plain))
        scheduler = make(inner) if built.endswith("before") else None
        optimizer = DynamicAllocationOptimizer(inner, twin, active=1.0, lr_time=lr_time)
        if scheduler is None:
            scheduler = make(inner if built.startswith("on the inner") else optimizer)
        assert loop(twin, optimizer, scheduler) == expected
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_on_the_inner_optimizer_drives_a_part_of_the_modules_as_it_drives_all(name):
    def options(optimizer):
        return [(group["lr"], group["betas"]) for group in optimizer.param_groups]

    def stepped(model, optimizer, scheduler, step):
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(*([1.0] if "Plateau" in type(scheduler).__name__ else []))
        return options(optimizer)

    model, twin = ToyModel(), ToyModel()
    plain, inner = AdamW(user_groups(model), lr=0.02), AdamW(user_groups(twin), lr=0.02)
    optimizer = DynamicAllocationOptimizer(inner, twin, active=2, period=2, allocator="random")
    schedulers, seen = [SCHEDULERS[name](o) for o in (plain, inner)], set()
    for step in range(8):
        expected, active = options(plain), set(optimizer.active_groups)
        backward(model, step)
        backward(twin, step)
        for group in set(names()) - active:
            model.get_submodule(group).zero_grad()
        ends = [
            stepped(*run, step)
            for run in zip((model, twin), (plain, optimizer), schedulers, strict=True)
        ]
        assert ends[0] == ends[1]
        used = zip(optimizer.module_groups, optimizer.learning_rates(), strict=True)
        assert all(rate == expected[piece["user_group"]][0] for piece, rate in used)
        assert same(weights(model), weights(twin))
        seen.add(tuple(expected))
    assert len(seen) > 2, "the options changed"


@pytest.mark.parametrize("then", ["trains", "loads", "loads into the inner", "adds a group"])
@pytest.mark.parametrize("closed", [False, True])
def test_a_scheduler_of_a_wrapper_reaches_the_one_that_replaces_it(then, closed):
    """The notebook cell that wraps is run again; the cell that builds the scheduler is not."""
    model, twin = ToyModel(), ToyModel()
    plain, inner = (SGD(user_groups(m)[:2], lr=0.02, momentum=0.9) for m in (model, twin))
    first = DynamicAllocationOptimizer(inner, twin, active=1.0)
    schedulers = [lr_scheduler.StepLR(o, 2, 0.5) for o in (plain, first)]
    if closed:
        first.close()
    second = DynamicAllocationOptimizer(inner, twin, active=1.0)
    for step in range(6):
        train(model, plain, 1, start=step)
        train(twin, second, 1, start=step)
        for scheduler in schedulers:
            scheduler.step()
        if step == 2 and then.startswith("loads"):
            target = inner if then.endswith("inner") else second
            target.load_state_dict(copy.deepcopy(target.state_dict()))
            plain.load_state_dict(copy.deepcopy(plain.state_dict()))
        elif step == 2 and then == "adds a group":
            for m, o in ((model, plain), (twin, second)):
                o.add_param_group({**user_groups(m)[2], "initial_lr": 0.02})
                schedulers[o is second].base_lrs.append(0.02)
        rates = [group["lr"] for group in second.param_groups]
        assert rates == [group["lr"] for group in plain.param_groups]
    assert rates[0] == pytest.approx(0.02 / 8)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("after", ["wrapping", "loading"])
def test_a_rate_set_on_the_inner_optimizer_counts(after):
    (model, plain), (twin, inner, optimizer) = both()
    if after == "loading":
        optimizer.load_state_dict(optimizer.state_dict())
    plain.param_groups[1]["lr"] = inner.param_groups[1]["lr"] = 0.3
    train(model, plain, 3)
    train(twin, optimizer, 3)
    assert optimizer.param_groups[1]["lr"] == 0.3
    assert same(weights(model), weights(twin))
    assert inner.state_dict()["state"].keys() == plain.state_dict()["state"].keys()


@pytest.mark.parametrize("closed", [True, False])
def test_a_state_that_the_inner_optimizer_loads_counts_for_all(closed):
    (model, plain), (twin, inner, optimizer) = both()
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (plain, optimizer)]
    saved = copy.deepcopy(plain.state_dict())
    train(model, plain, 2)
    train(twin, optimizer, 2)
    if closed:
        optimizer.close()
    plain.load_state_dict(saved)
    inner.load_state_dict(saved)
    for step in range(2, 5):
        train(model, plain, 1, start=step)
        train(twin, inner if closed else optimizer, 1, start=step)
        for scheduler in schedulers:
            scheduler.step()
    assert inner.param_groups is optimizer.param_groups
    assert inner.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("on", ["the inner one", "the wrapper"])
def test_a_state_that_is_set_anew_counts_for_both(on):
    (model, plain), (twin, inner, optimizer) = both()
    train(model, plain, 2)
    train(twin, optimizer, 2)
    for one in (plain, inner if on == "the inner one" else optimizer):
        one.state = defaultdict(dict)
    if on == "the inner one":
        assert not optimizer.plain_state_dict()["state"]
        assert not optimizer.state_dict()["state"]
    train(model, plain, 2, start=2)
    train(twin, optimizer, 2, start=2)
    assert inner.state is optimizer.state
    assert same(weights(model), weights(twin))


def test_local_time_keeps_the_rate_of_each_group():
    model = ToyModel(layers=4)
    modules = [layer[0] for layer in model.layers]
    groups = [{"params": [m.A, m.B], "lr": 0.1 * (i + 1)} for i, m in enumerate(modules)]
    groups.append({"params": list(model.head.parameters()), "lr": 0.5})
    optimizer = DynamicAllocationOptimizer(
        SGD(groups), model, active=2, period=1, lr_time="local", allocator="round_robin"
    )
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(model, optimizer, 4)
    assert optimizer.learning_rates() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_group_added_later_has_its_own_rate_under_local_time():
    model = ToyModel(layers=3)
    head = list(model.head.parameters())
    inner = SGD([m for n, m in model.named_parameters() if not n.startswith("head")], lr=0.1)
    optimizer = DynamicAllocationOptimizer(inner, model, active=1.0, lr_time="local")
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": head, "lr": 0.7})
    train(model, optimizer, 2, start=2)
    rates = dict(
        zip([g["name"] for g in optimizer.module_groups], optimizer.learning_rates(), strict=True)
    )
    assert len(inner.param_groups) == 2
    assert optimizer.module_groups[-1]["params"] == head
    assert optimizer.learning_rates()[-1] == 0.7
    assert rates["layers.0.0"] == 0.1


# Names and wrappers


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel of a compiled model": lambda m: nn.DataParallel(
        torch.compile(m, backend="eager")
    ),
    "DDP": DistributedDataParallel,
}


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_checkpoints_do_not_depend_on_a_wrapper_around_the_model(wrapper):
    model, twin = ToyModel(), ToyModel()
    around = WRAPPERS[wrapper](model)
    optimizer = DynamicAllocationOptimizer(AdamW(around.parameters()), around, active=2, period=1)
    assert optimizer.groups == names()
    around(batch()).square().mean().backward()
    optimizer.step()
    assert optimizer.tracker.scores()["layers.0.0"] > 0
    other = DynamicAllocationOptimizer(AdamW(twin.parameters()), twin, active=2, period=1)
    other.load_state_dict(optimizer.state_dict())
    assert other.active_groups == optimizer.active_groups


# Optimizers that compute their own rates, need a closure, or wrap others


def test_an_optimizer_without_a_rate_is_wrapped():
    transformers = pytest.importorskip("transformers")

    def run(wrap):
        model = ToyModel()
        optimizer = transformers.Adafactor(model.parameters(), lr=None)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0)
            assert all(rate != rate for rate in optimizer.learning_rates()), "nan: unknown"
        train(model, optimizer, 3)
        if wrap:
            optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 2, start=3)
        return weights(model)

    assert same(run(False), run(True))
    for option in (
        {"lr_time": "local"},
        {"lr_time": LocalLR(lambda step: 1.0)},
        {"pause": Pause(warmup=3)},
    ):
        model = ToyModel()
        inner = transformers.Adafactor(model.parameters(), lr=None)
        with pytest.raises(ValueError, match=r"group 0 of the optimizer has none \(lr=None\)"):
            DynamicAllocationOptimizer(inner, model, **option)


class Around(torch.optim.Optimizer):
    """As Lookahead and SAM are written: an optimizer that holds another."""

    def __init__(self, inner):
        self.base = inner
        super().__init__(inner.param_groups, inner.defaults)


class Delegating(torch.optim.Optimizer):
    """As AcceleratedOptimizer is written: its groups are those of another."""

    def __init__(self, inner):
        self.optimizer = inner

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Both(torch.optim.Optimizer):
    """As users write it for Muon and AdamW: its groups are those of several others."""

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})


class Evaluating(SGD):
    def step(self, closure):
        closure()
        return super().step()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda p: Around(SGD(p, lr=0.1)),
            "Around itself wraps an optimizer in its attribute 'base'",
        ),
        (lambda p: Delegating(SGD(p, lr=0.1)), "Delegating itself wraps an optimizer"),
        (
            lambda p: Both(SGD(list(p), lr=0.1)),
            "Both itself wraps an optimizer in its attribute 'parts'",
        ),
        (lambda p: Evaluating(p, lr=0.1), "evaluates the loss itself in step"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_and_leaves_nothing_behind(make, match):
    model = ToyModel()
    before = [set(vars(module)) for module in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ValueError, match=match):
        DynamicAllocationOptimizer(make(model.parameters()), model)
    assert [set(vars(module)) for module in model.modules()] == before
    assert hooks == 0 == sum(len(m._forward_hooks) for m in model.modules())
    assert all(layer[0].active for layer in model.layers)


THEIRS = {
    "pytorch_optimizer.SAM": lambda package, p: package.SAM(p, SGD, lr=0.1),
    "pytorch_optimizer.WSAM": lambda package, p: package.WSAM(nn.Linear(1, 1), p, SGD, lr=0.1),
    "pytorch_optimizer.LookSAM": lambda package, p: package.LookSAM(p, SGD, lr=0.1),
    "pytorch_optimizer.FriendlySAM": lambda package, p: package.FriendlySAM(p, SGD, lr=0.1),
    "pytorch_optimizer.Lookahead": lambda package, p: package.Lookahead(SGD(p, lr=0.1)),
    "pytorch_optimizer.OrthoGrad": lambda package, p: package.OrthoGrad(SGD(p, lr=0.1)),
    "pytorch_optimizer.TRAC": lambda package, p: package.TRAC(SGD(p, lr=0.1)),
    "pytorch_optimizer.PCGrad": lambda package, p: package.PCGrad(SGD(p, lr=0.1)),
    "pytorch_optimizer.ScheduleFreeWrapper": lambda package, p: package.ScheduleFreeWrapper(
        SGD(p, lr=0.1)
    ),
    "schedulefree.ScheduleFreeWrapper": lambda package, p: package.ScheduleFreeWrapper(
        SGD(p, lr=0.1), momentum=0.9
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_real_optimizer_around_another_is_refused_and_leaves_nothing_behind(name):
    package = pytest.importorskip(name.split(".")[0])
    if not hasattr(package, name.split(".")[1]):
        pytest.skip("this version of the package has none")
    model = ToyModel()
    before = [set(vars(module)) for module in model.modules()]
    made = THEIRS[name](package, list(model.parameters()))
    with pytest.raises((TypeError, ValueError), match=r"itself wraps an optimizer|is not a torch"):
        DynamicAllocationOptimizer(made, model)
    assert [set(vars(module)) for module in model.modules()] == before
    assert hooks(model) == 0
    assert all(layer[0].active for layer in model.layers)


def test_accelerates_own_wrapper_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = ToyModel()
    prepared = accelerate.Accelerator(cpu=True).prepare(AdamW(model.parameters()))
    with pytest.raises(ValueError, match="AcceleratedOptimizer itself wraps an optimizer"):
        DynamicAllocationOptimizer(prepared, model)


@pytest.mark.parametrize("scheduled", ["never", "before", "after", "on the wrapper"])
def test_a_step_that_a_user_puts_in_the_place_of_the_classs_is_the_one_that_runs(scheduled):
    def halving(optimizer):
        former = optimizer.step

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)
            return former(closure)

        optimizer.step = types.MethodType(step, optimizer)

    def run(wrap):
        model = ToyModel()
        optimizer = inner = SGD(model.parameters(), lr=0.05, momentum=0.9)
        for what in ("before", "patch", "after"):
            if what == "patch":
                halving(inner)
            elif what == scheduled:
                scheduler = lr_scheduler.ExponentialLR(inner, 0.5)
        if wrap:
            optimizer = DynamicAllocationOptimizer(inner, model, active=1.0)
        if scheduled == "on the wrapper":
            scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            train(model, optimizer, 1, start=step)
            if scheduled != "never":
                scheduler.step()
        return weights(model)

    assert same(run(True), run(False))


class PerGroup(SGD):
    """As AdaBound is written: it reads a list by the number of the group, and counts in groups."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        assert len(self.base_lrs) == len(self.param_groups)
        for group, rate in zip(self.param_groups, self.base_lrs, strict=True):
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad / group["step"])


def test_lists_of_a_value_per_group_fit_the_groups_of_an_update():
    def run(wrap, **options):
        model = ToyModel()
        optimizer = PerGroup(user_groups(model), lr=0.02)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, **options)
        train(model, optimizer, 6)
        return weights(model), optimizer

    assert same(run(False)[0], run(True, active=1.0)[0])
    _, optimizer = run(True, active=2, period=1, allocator="round_robin")
    assert optimizer._rule.optimizer.base_lrs == [0.02, 0.1, 0.02]
    steps = {g["name"]: g["step"] for g in optimizer.module_groups}
    assert steps == {**dict.fromkeys(names(), 2), "always_active": 6}


class WithLoss(SGD):
    """Uses the value of the loss, as AliG does."""

    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-float(loss))
        return loss

    step = torch.no_grad()(step)


class Twice(WithLoss):
    def step(self, closure=None):
        closure()
        return super().step(closure)


def test_a_rule_that_uses_the_loss_gets_it():
    def run(wrap, rule=WithLoss):
        model = ToyModel()
        optimizer = rule(model.parameters(), lr=0.1)
        if wrap:
            optimizer = DynamicAllocationOptimizer(optimizer, model, active=1.0)

        def closure():
            with torch.enable_grad():
                optimizer.zero_grad()
                return backward(model)

        for _ in range(3):
            optimizer.step(closure)
        return weights(model)

    assert same(run(False), run(True))
    with pytest.raises(RuntimeError, match="calls its closure more than once"):
        run(True, Twice)


class TensorRate(Adam):
    """As torchao's optimizers are written: the rate must be a tensor."""

    def step(self, closure=None):
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups)
        return super().step(closure)


def test_a_tensor_rate_stays_a_tensor_under_local_time():
    for lr_time in ("local", LocalLR(lambda step: 1.0)):
        model, twin = ToyModel(), ToyModel()
        plain = Adam(model.parameters(), lr=torch.tensor(0.05))
        optimizer = wrapped(twin, TensorRate, lr=torch.tensor(0.05), active=1.0, lr_time=lr_time)
        train(model, plain, 3)
        train(twin, optimizer, 3)
        assert same(weights(model), weights(twin))


# Gradients, masks, modes


class Sparse(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(9, 4, sparse=sparse) for _ in range(3))

    def forward(self, x):
        return sum(table(x) for table in self.tables)


@pytest.mark.parametrize("measure", [GradientNorm(1), GradientNorm(2), Sensitivity()], ids=repr)
def test_sparse_gradients_score_as_dense_ones(measure):
    def scores(sparse):
        model = Sparse(sparse)
        optimizer = DynamicAllocationOptimizer(
            SGD(model.parameters(), lr=0.1),
            model,
            groups=lambda name, module: name if isinstance(module, nn.Embedding) else None,
            importance=measure,
            active=1.0,
        )
        for _ in range(2):
            model(torch.tensor([1, 1, 3])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.tracker.scores()

    assert scores(True) == pytest.approx(scores(False))
    assert all(scores(True).values())


class Masked(ToyModel):
    def forward(self, x, attention_mask=None):
        return super().forward(x)


def padded(step=0):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(step))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    return x, mask


def scored(*passes):
    """The scores after forward passes, each with a mask given by hand and one in the call."""
    model = Masked()
    optimizer = wrapped(model, active=1.0)
    for by_hand, in_call in passes:
        if by_hand is not None:
            optimizer.tracker.attention_mask = by_hand
        model(
            padded()[0], **({} if in_call is None else {"attention_mask": in_call})
        ).sum().backward()
    assert optimizer.tracker.attention_mask is None, "it was for that pass"
    return optimizer.tracker.scores()


def test_a_mask_is_that_of_its_own_pass():
    mask = padded()[1]
    none = torch.ones_like(mask)
    masked, whole = scored((mask, None)), scored((None, None))
    assert all(masked[name] < whole[name] for name in names())
    assert scored((None, mask)) == masked, "taken from the call"
    assert scored((none, mask)) == whole, "what the user sets wins"
    twice = scored((mask, None), (None, None))
    assert twice == pytest.approx({n: masked[n] + whole[n] for n in names()}), "not stale"


def test_an_evaluation_in_between_does_not_use_up_a_mask():
    model = Masked()
    optimizer = wrapped(model, active=1.0)
    x, mask = padded()
    optimizer.tracker.attention_mask = mask
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert optimizer.tracker.scores() == scored((mask, None))


@pytest.mark.parametrize("left", ["all", "one"])
def test_modules_left_in_evaluation_mode_are_named_once(left, caplog):
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1)
    (model if left == "all" else model.layers[0]).eval()
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, 4)
    (line,) = caplog.messages
    assert ("6 of 6" if left == "all" else "1 of 6") in line
    assert "layers.0.0" in line
    assert "model.train()" in line


def test_evaluation_beside_training_is_not_told(caplog):
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1)
    for step in range(3):
        model.eval()
        model(batch(step))
        model.train()
        train(model, optimizer, 1, start=step)
    assert not caplog.messages


def test_a_tracker_of_another_run_is_not_changed_by_a_copy():
    model = Masked()
    tracker = ImportanceTracker()
    wrapped(model, importance=tracker)
    x, mask = padded()
    tracker.attention_mask = mask
    copy.deepcopy(model)(x)
    assert tracker.attention_mask is mask
