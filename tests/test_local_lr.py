"""Local optimization (section 3.4): rates by a module's own steps, and Adam after a pause."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from every_optimizer import network
from every_optimizer import rule as every_rule
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_allocator
from test_optimizer_contract import user_groups
from torch.optim import lr_scheduler
from toy import ToyModel, backward, names, same, train, weights, wrapped

from dynalora_optim import Bounded, DynamicAllocationOptimizer, LocalLR, Pause, Periodic
from dynalora_optim.allocation._counters import GroupCounters

RATE = 0.05


def linear(warmup: int, total: int):
    """transformers' linear schedule, written anew."""

    def factor(step: float) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return max(0.0, (total - step) / max(1, total - warmup))

    return factor


def rates_by_name(optimizer) -> dict[str, float]:
    pairs = zip(optimizer.module_groups, optimizer.learning_rates(), strict=True)
    return {group["name"]: rate for group, rate in pairs}


def steps_with(optimizer, model, steps, scheduler=None, start=0):
    """Train and yield, per step, the rates used and the updates each group had before."""
    for step in range(start, start + steps):
        updates = dict(optimizer._allocation.updates)
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        yield step, rates_by_name(optimizer), updates


# lr_time


@given(any_allocator, st.integers(1, 4), st.integers(0, 6), st.integers(0, 20))
def test_local_time_replays_any_scheduler_at_each_modules_own_pace(allocator, period, warmup, seed):
    model = ToyModel()
    optimizer = wrapped(
        model, active=2, period=period, allocator=allocator, seed=seed, lr_time="local", lr=RATE
    )
    factor = linear(warmup, 12)
    scheduler = lr_scheduler.LambdaLR(optimizer, factor)
    for step, rates, updates in steps_with(optimizer, model, 12, scheduler):
        for name in names():
            assert rates[name] == pytest.approx(RATE * factor(updates[name]))
        assert rates["always_active"] == pytest.approx(RATE * factor(step))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: lr_scheduler.ExponentialLR(o, 0.8),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: lr_scheduler.MultiStepLR(o, [3, 5]),
    ],
    ids=["OneCycle", "Exponential", "Cosine", "MultiStep"],
)
def test_chained_schedulers_are_not_disturbed_by_local_rates(make):
    alone = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    reference = make(alone)
    expected = []
    for _ in range(10):
        expected.append(alone.param_groups[0]["lr"])
        alone.step()
        reference.step()
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1, lr_time="local", lr=RATE)
    for _, rates, updates in steps_with(optimizer, model, 10, make(optimizer)):
        for name in names():
            assert rates[name] == pytest.approx(expected[updates[name]])


FACTORS = {
    "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * step / 10),
    "exponential": lambda step: 0.8**step,
    "one cycle": lambda step: min(1 + 2 * step / 3, 3 - (step - 3) / 4),
}
PER_GROUP = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.001),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.3, 0.2], total_steps=14),
    **{
        f"{name}, a function": partial(lr_scheduler.LambdaLR, lr_lambda=factor)
        for name, factor in FACTORS.items()
    },
}


@pytest.mark.parametrize(
    ("name", "by"),
    [(name, "local") for name in PER_GROUP]
    + [(f"{name}, a function", "LocalLR") for name in FACTORS],
)
def test_local_time_keeps_the_own_rate_of_each_param_group(name, by):
    make = PER_GROUP[name]
    alone = torch.optim.AdamW(user_groups(ToyModel()), lr=RATE)
    reference, expected = make(alone), []
    for _ in range(12):
        expected.append([group["lr"] for group in alone.param_groups])
        alone.step()
        reference.step()
    model = ToyModel()
    inner = torch.optim.AdamW(user_groups(model), lr=RATE)
    lr_time = "local" if by == "local" else LocalLR(make(inner))
    optimizer = DynamicAllocationOptimizer(
        inner, model, active=2, period=1, allocator="random", lr_time=lr_time
    )
    scheduler = make(optimizer) if by == "local" else None
    for step, _, updates in steps_with(optimizer, model, 12, scheduler):
        used = zip(optimizer.module_groups, optimizer.learning_rates(), strict=True)
        for piece, rate in used:
            time = updates.get(piece["name"], step)
            assert rate == pytest.approx(expected[time][piece["user_group"]])
    assert len(set(updates.values())) > 1
    assert len({tuple(rates) for rates in expected}) > 9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_torchaos_optimizers_follow_local_time(name):
    rule = getattr(pytest.importorskip("torchao.optim"), name)
    factor, model, twin = linear(2, 9), network(), network()
    optimizer = DynamicAllocationOptimizer(
        rule(model.parameters(), lr=0.01),
        model,
        groups=every_rule,
        active=2,
        period=1,
        allocator="round_robin",
        lr_time="local",
    )
    scheduler = lr_scheduler.LambdaLR(optimizer, factor)
    plain = rule([{"params": list(layer.parameters())} for layer in twin], lr=0.01)
    for step in range(7):
        updates, active = dict(optimizer._allocation.updates), set(optimizer.active_groups)
        for line, group in enumerate(plain.param_groups):
            time = updates.get(str(line), step)
            group["lr"].fill_(0.01 * factor(time))
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        for one in (model, twin):
            one(x).square().mean().backward()
        for line, layer in enumerate(twin):
            if str(line) in updates and str(line) not in active:
                layer.zero_grad()
        with torch.compiler.set_stance("force_eager"):
            for one in (optimizer, plain):
                torch.manual_seed(step)  # of stochastic rounding
                one.step()
                one.zero_grad()
        scheduler.step()
        assert same(weights(model), weights(twin))
    assert sorted(set(optimizer._allocation.updates.values())) == [2, 3]


@given(any_allocator, st.sampled_from(["unscaled", "scaled"]), st.integers(1, 6), st.integers(0, 4))
def test_local_lr_is_a_function_of_a_modules_own_steps(allocator, horizon, active, warmup):
    model = ToyModel()
    factor = linear(3, 15)
    optimizer = wrapped(
        model,
        active=active,
        period=Periodic(2, warmup=warmup),
        allocator=allocator,
        lr_time=LocalLR(factor, horizon),
        lr=RATE,
    )
    reached = dict.fromkeys(names(), 0)  # the scaled time after the last update
    former = dict.fromkeys(names(), 0)
    for step, rates, updates in steps_with(optimizer, model, 10):
        for name in names():
            time = updates[name]
            if horizon == "scaled":
                if updates[name] > former[name]:
                    reached[name] = scaled(updates, name, step)
                time = max(reached[name], scaled(updates, name, step))
            assert rates[name] == pytest.approx(RATE * factor(time))
        former = updates
        assert rates["always_active"] == pytest.approx(RATE * factor(step))


def scaled(updates: dict[str, int], name: str, step: int) -> int:
    """The updates divided by the share of modules that were really active, at most the step."""
    share = Fraction(sum(updates.values()), len(updates) * step) if step else 1
    return round(min(updates[name] / share, step)) if updates[name] else 0


# By steps done, with 6 modules: what was active before, and what the schedule then is at. The
# configured share is 1/3 in all of them.
RUNS = {
    "one third in turn": ({}, 24, [24] * 6),
    "warm-up": ({"period": Periodic(1, warmup=12)}, 24, [24] * 6),
    "hold": ({"held": ["layers.0.0", "layers.5.0"]}, 24, [24, 0, 0, 0, 0, 24]),
    "fewer": ({"active": 6, "then": (11, 2)}, 24, [24] * 6),
    "more": ({"then": (11, 6)}, 24, [24] * 6),
    "one of three turns": ({"period": 8}, 16, [16] * 4 + [0] * 2),
}


@pytest.mark.parametrize("case", RUNS)
def test_the_scaled_schedule_ends_with_the_run(case):
    options, steps, expected = RUNS[case]
    options = {"active": 2, "period": 1, "allocator": "round_robin", **options}
    held, (at, then) = options.pop("held", []), options.pop("then", (-1, 0))
    model, seen = ToyModel(), []
    factor = seen_by(seen)
    optimizer = wrapped(model, lr_time=LocalLR(factor, horizon="scaled"), **options)
    if held:
        optimizer.hold(held)
    for step in range(steps):
        if step == at:
            optimizer.active = then
        train(model, optimizer, 1, start=step)
    assert max(seen) == steps - 1  # no update has used a later step of the schedule
    assert [optimizer._allocation.scaled_time(name) for name in names()] == expected


def seen_by(seen: list[int]):
    """A schedule that notes the steps at which it is read."""

    def factor(step: int) -> float:
        seen.append(step)
        return 1.0

    return factor


@given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=60))
def test_scaled_time_never_falls_nor_leads_and_its_mean_is_the_steps_done(updated):
    counters = GroupCounters("abcde")
    before = dict.fromkeys("abcde", 0)
    for step, positions in enumerate(updated, 1):
        counters.count_updates(["abcde"[p] for p in positions], step)
        mean = Fraction(sum(counters.updates.values()), 5)
        for name, updates in counters.updates.items():
            time = counters.scaled_time(name, step)
            if "abcde".index(name) in positions:
                assert before[name] <= time
                before[name] = time
            assert before[name] <= time <= step
            assert time == step if updates >= mean > 0 else time <= step
            if updates <= mean and mean:
                assert time >= round(updates / mean * step)


@given(any_allocator, st.integers(1, 11), st.integers(0, 5))
def test_a_scaled_run_resumes_bit_for_bit(allocator, stop, warmup):
    def begun(seed):
        model = ToyModel(seed=seed)
        options = {"lr_time": LocalLR(linear(2, 14), "scaled"), "active": 2}
        period = Periodic(2, warmup=warmup)
        return model, wrapped(model, period=period, allocator=allocator, **options)

    (model, optimizer), (twin, other) = begun(0), begun(3)
    train(model, optimizer, stop)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, of in ((model, optimizer), (twin, other)):
        train(one, of, 12 - stop, start=stop)
    assert same(weights(model), weights(twin))
    assert optimizer.learning_rates() == other.learning_rates() or stop == 12


def test_the_rate_of_an_active_module_moves():
    # The published local optimizer zeroes the gradient before its hook looks: 20 backward passes
    # leave the rate where it was.
    model = ToyModel()
    factor = linear(4, 20)
    optimizer = wrapped(
        model, active=3, period=5, allocator="round_robin", lr_time=LocalLR(factor), lr=RATE
    )
    seen = [rates for _, rates, _ in steps_with(optimizer, model, 20)]
    chosen = active_by_step(optimizer)
    for name in names():
        used = [rates[name] for rates, active in zip(seen, chosen, strict=True) if name in active]
        assert used == pytest.approx([RATE * factor(u) for u in range(10)])
        assert used[4] == RATE > used[3]


def active_by_step(optimizer) -> list[tuple[str, ...]]:
    entries = optimizer.record.state_dict()
    return [tuple(entry["chosen"]) for entry in entries for _ in range(entry["steps"])]


SCHEDULES = [
    ("get_linear_schedule_with_warmup", (2, 12)),
    ("get_cosine_schedule_with_warmup", (2, 12)),
    ("get_cosine_with_hard_restarts_schedule_with_warmup", (2, 12, 2)),
    ("get_polynomial_decay_schedule_with_warmup", (2, 12)),
    ("get_constant_schedule_with_warmup", (4,)),
    ("get_constant_schedule", ()),
    ("get_cosine_with_min_lr_schedule_with_warmup", (2, 12, 0.5, -1, None, 0.1)),
    ("get_cosine_with_min_lr_schedule_with_warmup_lr_rate", (2, 12, 0.5, -1, None, 0.1, 0.2)),
    ("get_inverse_sqrt_schedule", (2,)),
    ("get_wsd_schedule", (2, 4, 12)),
]
# Those that are no functions of the step: lr_time="local" serves them.
NOT_LAMBDAS = {"get_adafactor_schedule", "get_greedy_schedule", "get_reduce_on_plateau_schedule"}


def test_no_schedule_of_transformers_is_left_out():
    optimization = pytest.importorskip("transformers.optimization")
    every = {n for n in dir(optimization) if n.startswith("get_") and "schedule" in n}
    assert every - NOT_LAMBDAS - {"get_scheduler"} <= {name for name, _ in SCHEDULES}


@pytest.mark.parametrize(("name", "arguments"), SCHEDULES)
@pytest.mark.parametrize("built_on", ["wrapped", "wrapper"])
def test_every_schedule_of_transformers_becomes_local(name, arguments, built_on):
    optimization = pytest.importorskip("transformers.optimization")

    def schedule(optimizer):
        if name == "get_wsd_schedule":
            return optimization.get_wsd_schedule(optimizer, 2, 4, num_training_steps=12)
        return getattr(optimization, name)(optimizer, *arguments)

    lone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    (factor,) = schedule(lone).lr_lambdas
    model = ToyModel()
    inner = torch.optim.AdamW(model.parameters(), lr=RATE)
    if built_on == "wrapped":
        local = LocalLR(schedule(inner))
        optimizer = DynamicAllocationOptimizer(inner, model, active=2, period=2, lr_time=local)
    else:
        optimizer = DynamicAllocationOptimizer(inner, model, active=2, period=2)
        optimizer.lr_time = LocalLR(schedule(optimizer))
    for _, rates, updates in steps_with(optimizer, model, 10):
        for group in names():
            assert rates[group] == pytest.approx(RATE * factor(updates[group]), abs=1e-12)


def test_a_scheduler_with_one_function_per_user_group():
    model = ToyModel(layers=2)
    named = list(model.named_parameters())
    inner = torch.optim.SGD(
        [
            {"params": [p for n, p in named if n.endswith("A")], "lr": 0.1},
            {"params": [p for n, p in named if not n.endswith("A")], "lr": 0.2},
        ],
        lr=1.0,
    )
    scheduler = lr_scheduler.LambdaLR(inner, [lambda step: 1 / (1 + step), lambda step: 2.0**-step])
    optimizer = DynamicAllocationOptimizer(inner, model, active=1.0, lr_time=LocalLR(scheduler))
    train(model, optimizer, 3)
    expected = {
        ("A",): 0.1 / 3,
        ("B",): 0.2 / 4,
        ("base.weight", "base.bias"): 0.2 / 4,
    }
    for group, rate in zip(optimizer.module_groups, optimizer.learning_rates(), strict=True):
        if group["name"] != "always_active":
            kind = tuple(n.removeprefix(group["name"] + ".") for n in group["param_names"])
            assert rate == pytest.approx(expected[kind])


@pytest.mark.parametrize("lr_time", ["local", LocalLR(linear(0, 50))])
def test_all_active_local_is_global(lr_time):
    def run(lr_time):
        model = ToyModel()
        optimizer = wrapped(model, active=1.0, lr_time=lr_time, lr=RATE)
        scheduler = lr_scheduler.LambdaLR(optimizer, linear(0, 50))
        for _ in steps_with(optimizer, model, 10, scheduler):
            pass
        return weights(model)

    assert same(run("global"), run(lr_time))


@given(st.integers(0, 9), st.sampled_from(["local", "LocalLR", "global"]), st.integers(0, 3))
def test_local_runs_resume_bit_for_bit(stop, lr_time, warmup):
    def make(model):
        optimizer = wrapped(
            model,
            active=2,
            period=2,
            lr_time=LocalLR(linear(2, 9)) if lr_time == "LocalLR" else lr_time,
            pause=Pause(warmup=warmup, moments="reset_momentum"),
        )
        return optimizer, lr_scheduler.LambdaLR(optimizer, linear(2, 9))

    def run(model, pair, steps, start=0):
        optimizer, scheduler = pair
        for _ in steps_with(optimizer, model, steps, scheduler, start):
            pass

    straight, first, second = ToyModel(), ToyModel(), ToyModel(seed=3)
    reference, stopped = make(straight), make(first)
    run(straight, reference, 9)
    run(first, stopped, stop)
    resumed = make(second)
    second.load_state_dict(first.state_dict())
    for new, old in zip(resumed, stopped, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    run(second, resumed, 9 - stop, stop)
    assert same(weights(second), weights(straight))
    assert resumed[0].learning_rates() == reference[0].learning_rates() or stop == 9


# After a pause


@given(st.integers(1, 8), st.integers(1, 4))
def test_activation_warmup_ramps_after_each_return(ramp, period):
    model = ToyModel()
    optimizer = wrapped(
        model, active=2, period=period, allocator="round_robin", pause=Pause(warmup=ramp), lr=RATE
    )
    since = dict.fromkeys(names())
    first = set(optimizer.active_groups)
    active_before = set(first)
    for step, rates, _ in steps_with(optimizer, model, 14):
        active = set(active_by_step(optimizer)[step])
        for name in active:
            if name not in active_before:
                since[name] = 0
            expected = 1.0 if since[name] is None else min(1.0, (since[name] + 1) / ramp)
            assert rates[name] == pytest.approx(RATE * expected)
            if since[name] is not None:
                since[name] += 1
        assert rates["always_active"] == RATE
        active_before = active


def returning_step(moments: str, rule=torch.optim.Adam, **options) -> tuple[float, float]:
    """The first move of a weight after 100 unit gradients and a pause, when its gradient turns.

    Returns the move in rates, in the direction of before the pause, and the second-moment sum.
    """
    model = ToyModel(layers=2, features=1)
    optimizer = DynamicAllocationOptimizer(
        rule(model.parameters(), lr=1e-3, **options),
        model,
        active=1,
        period=100,
        allocator="round_robin",
        pause=Pause(moments=moments),
    )
    weight = model.layers[0][0].A
    for step in range(200):
        if step < 100:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.active_groups == ["layers.0.0"]
    before = weight.detach().clone()
    weight.grad = -torch.ones_like(weight)
    optimizer.step()
    return float((before - weight.detach()).mean() / 1e-3), len(optimizer.state[weight])


def test_adam_after_a_pause():
    # Kept: momentum carries on the old way. Without its momentum, or anew, it turns.
    keep, _ = returning_step("keep")
    assert keep == pytest.approx(0.80, abs=0.01)
    momentum, _ = returning_step("reset_momentum")
    assert momentum == pytest.approx(-0.1, abs=0.06)
    anew, _ = returning_step("reset")
    assert anew == pytest.approx(-1.0, abs=0.01)


def test_sgd_momentum_is_reset_too():
    keep, _ = returning_step("keep", torch.optim.SGD, momentum=0.9)
    turned, _ = returning_step("reset_momentum", torch.optim.SGD, momentum=0.9)
    assert keep > 0
    assert turned == pytest.approx(-1.0, rel=1e-3)


def test_a_module_that_stays_active_is_not_reset():
    model = ToyModel()
    optimizer = wrapped(model, active=6, period=1, pause=Pause(moments="reset", warmup=5))
    reference = ToyModel()
    plain = torch.optim.AdamW(reference.parameters(), lr=0.05)
    train(model, optimizer, 4)
    train(reference, plain, 4)
    assert same(weights(model), weights(reference))


def test_local_time_cannot_begin_in_mid_run():
    model = ToyModel()
    optimizer = wrapped(model)
    optimizer.lr_time = "local"
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="1 steps are done"):
        optimizer.lr_time = "local"


# Errors


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr_time": "mine"}, ValueError, "lr_time='mine': pass 'global', 'local' or a LocalLR"),
        (lambda: Pause(warmup=-1), ValueError, r"Pause\(warmup\)=-1 must be a whole number"),
        (lambda: Pause(warmup=1.5), ValueError, r"Pause\(warmup\)=1.5 must be"),
        (lambda: Pause(moments="forget"), ValueError, "moments='forget'.*one of keep"),
        (lambda: Pause("drop", "reset"), ValueError, "a dropped state has no moments"),
        (lambda: Periodic(3, warmup=-1), ValueError, "warmup=-1 must be a whole number"),
        (lambda: Bounded("topk", 0), ValueError, "max_idle_periods=0 must be a whole number"),
        (
            {"allocator": Bounded("discounted", 1), "active": 2},
            ValueError,
            "at least 2, or raise active to 3",
        ),
    ],
)
def test_bad_options(options, error, match):
    model = ToyModel()
    with pytest.raises(error, match=match):
        wrapped(model, **options) if isinstance(options, dict) else options()
    assert all(layer[0].active for layer in model.layers)


RULES = {  # with the options that give it a first moment, or None if it has none
    torch.optim.Adadelta: None,
    torch.optim.Adafactor: None,
    torch.optim.Adagrad: None,
    torch.optim.Adam: {},
    torch.optim.AdamW: {},
    torch.optim.Adamax: {},
    torch.optim.ASGD: None,
    torch.optim.NAdam: {},
    torch.optim.RAdam: {},
    torch.optim.RMSprop: {"momentum": 0.9},
    torch.optim.Rprop: None,
    torch.optim.SGD: {"momentum": 0.9},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_first_moment_is_set_to_zero_or_refused(rule):
    options = {"active": 2, "period": 1, "allocator": "round_robin"}
    pause = Pause(moments="reset_momentum")
    if RULES[rule] != {}:  # also SGD, say, without momentum
        model = ToyModel()
        with pytest.raises(ValueError, match=rf"zero, but that of {rule.__name__} is not known"):
            wrapped(model, rule, pause=pause, **options)
        assert all(layer[0].active for layer in model.layers)
    if RULES[rule] is None:
        return
    model, random = ToyModel(), torch.get_rng_state()
    inner = rule(model.parameters(), lr=0.01, **RULES[rule])
    optimizer = DynamicAllocationOptimizer(inner, model, pause=pause, **options)
    assert torch.equal(torch.get_rng_state(), random)
    assert not inner.state
    train(model, optimizer, 3)
    moments = [
        optimizer.state[getattr(model.layers[0][0], name)][key]
        for name in "AB"
        for key in ("exp_avg", "momentum_buffer")
        if key in optimizer.state[model.layers[0][0].A]
    ]
    assert optimizer.active_groups == names()[:2]
    assert moments
    assert not any(moment.any() for moment in moments)


def test_what_is_no_function_of_the_step_is_refused():
    scheduler = lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), 2)
    with pytest.raises(TypeError, match="Use lr_time='local' with these"):
        LocalLR(scheduler)
    with pytest.raises(ValueError, match="horizon='long'"):
        LocalLR(linear(1, 2), horizon="long")


def test_a_scheduler_of_another_optimizer_is_refused():
    other = torch.optim.SGD(
        [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(5)], lr=0.1
    )
    scheduler = lr_scheduler.LambdaLR(other, [linear(1, 2)] * 5)
    with pytest.raises(ValueError, match="scheduler of 5 functions"):
        wrapped(ToyModel(), lr_time=LocalLR(scheduler))
