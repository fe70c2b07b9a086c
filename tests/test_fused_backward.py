"""Updates within the backward pass: the same weights, one gradient at a time, refused elsewhere."""

from __future__ import annotations

import copy
import gc
import io
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import hooks
from language_model import LanguageModel, backward, tokens, train
from processes import on_ranks
from tiny_models import Sizes, build
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR
from toy import ToyModel, same, weights, wrapped
from toy import train as train_toy

from dynalora_optim import Backward, Blocks, DynamicAllocationOptimizer, LiveBytes, LocalLR, Pause

OPTIONS: dict[str, dict[str, Any]] = {
    "in turn": {"allocator": "round_robin"},
    "scored": {"active": 2},
    "all active": {"active": 1.0},
    "frozen": {"groups": Blocks(2, "frozen")},
    "groups outside": {"groups": Blocks(outside="allocated"), "active": 2},
    "always active head": {"groups": Blocks(outside="frozen"), "always_active": ["lm_head"]},
    "recomputed": {"checkpoint_idle": True, "allocator": "random"},
    "warmed up": {"pause": Pause(warmup=3), "allocator": "random", "period": 4},
    "local": {"lr_time": "local", "allocator": "random"},
    "local function": {"lr_time": LocalLR(lambda step: 1 / (1 + step)), "active": 2},
    "dropped": {"pause": "drop", "allocator": "random"},
    "reset": {"pause": Pause(moments="reset_momentum"), "allocator": "random"},
}
RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (AdamW, {"weight_decay": 0.1}),
    "AdamW foreach": (AdamW, {"foreach": True}),
    "AdamW fused": (AdamW, {"fused": True}),
    "SGD momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD foreach": (SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "SGD fused": (SGD, {"momentum": 0.9, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


def by_blocks(
    model: nn.Module, rule: Any = AdamW, inner: dict[str, Any] | None = None, **options: Any
) -> DynamicAllocationOptimizer:
    backward = Backward(
        fused=options.pop("fused", True), checkpoint_idle=options.pop("checkpoint_idle", False)
    )
    settings = {"groups": "blocks", "active": 1, "period": 2, "backward": backward, **options}
    optimizer = rule(model.parameters(), lr=0.01, **(inner or {}))
    return DynamicAllocationOptimizer(optimizer, model, **settings)


def run(steps: int = 9, tied: bool = True, **options: Any) -> tuple[nn.Module, Any]:
    """A run with a schedule, dropout, and checkpoints where asked for."""
    model = LanguageModel(dropout=0.2, tied=tied)
    optimizer = by_blocks(model, **options)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        train(model, optimizer, 1, start=step)
        scheduler.step()
    return model, optimizer


def assert_same_run(**options: Any) -> None:
    fused, its = run(**options)
    plain, other = run(fused=False, **options)
    assert same(weights(fused), weights(plain))
    assert its.record.state_dict() == other.record.state_dict()
    assert its._allocation.updates == other._allocation.updates
    assert its.learning_rates() == other.learning_rates()


# The same weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_fused_run_is_the_other_to_the_last_bit(options, tied):
    assert_same_run(tied=tied, **options)


@pytest.mark.parametrize(("rule", "inner"), RULES.values(), ids=RULES)
def test_for_every_rule(rule, inner):
    assert_same_run(rule=rule, inner=inner, allocator="random")


@given(
    size=st.integers(1, 4),
    outside=st.sampled_from(["allocated", "always_active", "frozen"]),
    period=st.integers(1, 3),
    seed=st.integers(0, 99),
    checkpoint_idle=st.booleans(),
)
def test_for_any_blocks(size, outside, **options):
    assert_same_run(steps=5, groups=Blocks(size, outside), allocator="random", **options)


def test_in_low_precision_on_copies():
    ends = []
    for fused in (True, False):
        model = LanguageModel().bfloat16()
        optimizer = by_blocks(model, master_weights="stochastic", fused=fused)
        train(model, optimizer, 7)
        ends.append(weights(model))
    assert same(*ends)


def test_over_adapters():
    ends = []
    for fused in (True, False):
        model = ToyModel()
        optimizer = wrapped(model, active=2, period=2, backward=Backward(fused=fused))
        train_toy(model, optimizer, 8)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder"])
def test_in_models_of_others(name):
    ends = []
    for fused in (True, False):
        tiny = build(name)
        optimizer = by_blocks(tiny.model, fused=fused, checkpoint_idle=True)
        for _ in range(4):
            tiny.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(tiny.model))
    assert same(*ends)


def test_a_closure_does_it_too():
    ends = []
    for fused in (True, False):
        model = LanguageModel()
        optimizer = by_blocks(model, fused=fused)
        for step in range(5):
            optimizer.zero_grad()
            optimizer.step(partial(backward, model, step))
        ends.append(weights(model))
    assert same(*ends)


def steps_without_gradients(model: nn.Module, optimizer: Any, step: int) -> None:
    if step % 2 == 0:
        backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


def changes_of_the_state(model: nn.Module, optimizer: Any, step: int) -> None:
    train(model, optimizer, 1, start=step)
    for state in optimizer.state.values() if step == 2 else ():
        state["exp_avg"].mul_(0.5)
    if step == 3:
        optimizer.state.clear()


def a_state_that_is_loaded(model: nn.Module, optimizer: Any, step: int) -> None:
    train(model, optimizer, 1, start=step)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def zeros_instead_of_none(model: nn.Module, optimizer: Any, step: int) -> None:
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("active", [2, 1.0])
@pytest.mark.parametrize(
    "loop",
    [steps_without_gradients, changes_of_the_state, a_state_that_is_loaded, zeros_instead_of_none],
)
def test_in_other_loops(loop, active):
    ends = []
    for fused in (True, False):
        model = LanguageModel()
        optimizer = by_blocks(model, fused=fused, active=active, inner={"weight_decay": 0.1})
        for step in range(6):
            loop(model, optimizer, step)
        ends.append(weights(model))
    assert same(*ends)
    if active == 1.0:
        plain = LanguageModel()
        inner = AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
        for step in range(6):
            loop(plain, inner, step)
        assert same(weights(plain), ends[0])


def test_what_has_no_hook_is_updated_by_the_step():
    ends = []
    for fused in (True, False):
        model = LanguageModel()
        model.norm.requires_grad_(False)
        optimizer = by_blocks(model, fused=fused)
        train(model, optimizer, 2)
        model.norm.requires_grad_(True)
        before = model.norm.weight.detach().clone()
        train(model, optimizer, 2, start=2)
        assert not torch.equal(model.norm.weight, before)
        ends.append(weights(model))
    assert same(*ends)


def test_a_weight_used_behind_its_modules_back_stays_and_is_not_counted():
    model = LanguageModel()
    optimizer = by_blocks(model, groups=Blocks(outside="frozen"), allocator="round_robin", period=9)
    train(model, optimizer, 2)
    idle = model.layers[3].up.weight
    before = idle.detach().clone()
    (backward(model, 2) + idle.square().sum()).backward()
    assert idle.grad is None
    optimizer.step()
    assert torch.equal(idle, before)
    assert optimizer._allocation.updates["layers.3"] == 0


def test_a_gradient_that_a_hook_deletes_is_no_update():
    runs = []
    for fused in (True, False):
        model = LanguageModel()
        for parameter in model.layers[1].parameters():  # before the optimizer's own hooks
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        optimizer = by_blocks(model, fused=fused, active=1.0, lr_time="local")
        LambdaLR(optimizer, lambda step: 1 / (1 + step))
        train(model, optimizer, 4)
        runs.append((optimizer._allocation.updates, optimizer.learning_rates(), weights(model)))
    assert runs[0][:2] == runs[1][:2]
    assert runs[0][0]["layers.1"] == 0
    assert same(runs[0][2], runs[1][2])


# One gradient at a time


def gradients(model: nn.Module) -> int:
    """The number of gradients that take memory."""
    held = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(g.untyped_storage().nbytes() >= g.numel() * g.element_size() > 4 for g in held)


def test_at_most_one_gradient_is_alive():
    model = LanguageModel()
    optimizer = by_blocks(model)
    alive: list[int] = []
    for parameter in model.parameters():  # after the optimizer's own hooks, and before the next
        parameter.register_post_accumulate_grad_hook(lambda _: alive.append(gradients(model)))
        parameter.register_hook(lambda _: alive.append(gradients(model)))
    backward(model)
    assert max(alive) > 1, "the first step is an ordinary one"
    optimizer.step()
    optimizer.zero_grad()
    for step in range(1, 4):
        alive.clear()
        backward(model, step)
        assert set(alive) == {0}
        optimizer.step()
        optimizer.zero_grad()


def test_the_memory_of_gradients_is_that_of_the_largest():
    def peak_of_second_step(fused: bool) -> tuple[int, int, int]:
        tiny = build("llama", sizes=Sizes(length=2, rows=3, width=64, blocks=4))
        optimizer = by_blocks(tiny.model, SGD, active=1.0, backward=Backward(fused=fused))
        tiny.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        with LiveBytes() as memory:
            loss = tiny.loss()
            memory.restart()
            loss.backward()
        sizes = [p.nbytes for p in optimizer.active_parameters()]
        return memory.peak, memory.live, max(sizes)

    plain, left, largest = peak_of_second_step(False)
    fused, nothing, _ = peak_of_second_step(True)
    assert left > 10 * largest > 0
    assert nothing < left / 100, "a number for each gradient"
    assert fused < plain - left / 2


# What it cannot be with


def clipped(model: nn.Module, optimizer: Any) -> None:
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def clipped_by_value(model: nn.Module, optimizer: Any) -> None:
    backward(model)
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    optimizer.step()


def accumulated(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    backward(model, 1)
    optimizer.step()


def scaled(model: nn.Module, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.zeros(1, 5, dtype=torch.long)).square().mean()).backward()
    scaler.step(optimizer)


LOOPS = {
    "clipping": (clipped, "gradients were changed between backward"),
    "clipping by value": (clipped_by_value, "gradients were changed between backward"),
    "accumulation": (accumulated, "accumulated over several backward passes"),
    "GradScaler": (scaled, "gradients were changed between backward"),
}


@pytest.mark.parametrize(("loop", "reason"), LOOPS.values(), ids=LOOPS)
def test_loops_that_need_all_gradients_are_refused_before_anything_moves(loop, reason):
    model = LanguageModel()
    optimizer = by_blocks(model)
    before = weights(model)
    with pytest.raises(
        RuntimeError, match=rf"Backward\(fused=True\) .*{reason}.*or leave out fused=True"
    ):
        loop(model, optimizer)
    assert same(weights(model), before)
    assert not optimizer.state


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(("loop", "reason"), LOOPS.values(), ids=LOOPS)
def test_loops_that_need_all_gradients_from_a_later_step_on_are_refused_in_that_step(
    loop, reason, at
):
    model = LanguageModel()
    optimizer = by_blocks(model)
    train(model, optimizer, at)
    if loop is accumulated:
        reason = "a second backward pass came before step"
    with pytest.raises(RuntimeError, match=rf"Backward\(fused=True\) .*{reason}.*leave out fused"):
        loop(model, optimizer)
    optimizer.close()
    assert all(p.grad is None for p in model.parameters())
    train(model, SGD(model.parameters(), lr=0.1), 1)


def read(model: nn.Module) -> None:
    for gradient in (p.grad for p in model.parameters() if p.grad is not None):
        gradient.abs().max()


def test_reading_a_gradient_that_is_used_is_refused_too():
    model = LanguageModel()
    optimizer = by_blocks(model)
    train(model, optimizer, 2)
    backward(model, 2)
    weight = next(p for p in model.parameters() if p.grad is not None)
    assert weight.grad.shape == weight.shape
    assert "SpentGradient(norm=" in repr(weight.grad)
    with pytest.raises(RuntimeError, match="gradients were read between backward"):
        read(model)
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 1, start=3)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("first", [0, 2])
def test_clipping_that_changes_nothing_returns_the_norm_in_every_step(first, foreach):
    norms: list[list[float]] = []
    for fused in (True, False):
        model = LanguageModel()
        optimizer = by_blocks(model, fused=fused)
        norms.append([])
        for step in range(5):
            backward(model, step)
            if step >= first:
                norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf, foreach=foreach)
                norms[-1].append(norm.item())
            optimizer.step()
            optimizer.zero_grad()
    assert norms[0] == norms[1]


@pytest.mark.parametrize(
    "clip",
    [
        lambda p: nn.utils.clip_grad_norm_(p, float("inf")),  # what the Trainer always does
        lambda p: nn.utils.clip_grad_norm_(p, 1e9),
    ],
)
def test_clipping_that_changes_nothing_is_no_clipping(clip):
    models = LanguageModel(), LanguageModel()
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = by_blocks(model, fused=fused)
        for step in range(4):
            backward(model, step)
            clip(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert same(*map(weights, models))


OPTION_CHANGES: dict[str, tuple[Any, str]] = {
    "a rate": (lambda group: group.update(lr=0.02), "'lr' of param group 0 was .* 0.01 to 0.02"),
    "a rate in place": (
        lambda group: group["lr"].fill_(0.02),
        "'lr' of param group 0 was .* 0.00999.* to 0.01999",
    ),
    "betas": (
        lambda group: group.update(betas=(0.5, 0.9)),
        r"'betas' of param group 0 was .*\(0.9, 0.999\) to \(0.5, 0.9\)",
    ),
    "weight decay": (lambda group: group.update(weight_decay=0.3), "'weight_decay' of param group"),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("name", OPTION_CHANGES)
def test_an_option_set_between_backward_and_step_is_refused_before_anything_more_moves(name, at):
    change, message = OPTION_CHANGES[name]
    ends = []
    for fused in (True, False):
        model = LanguageModel()
        optimizer = by_blocks(model, fused=fused, inner={"weight_decay": 0.1})
        (group,) = optimizer.param_groups
        group["lr"] = torch.tensor(0.01) if "in place" in name else 0.01
        train(model, optimizer, at)
        backward(model, at)
        if fused:
            used = {key: copy.deepcopy(group[key]) for key in ("lr", "betas", "weight_decay")}
            before, saved = weights(model), copy.deepcopy(optimizer.state_dict())
            change(group)
            with pytest.raises(
                RuntimeError, match=f"{message}.* between .*; set it before backward"
            ):
                optimizer.step()
            assert same(weights(model), before)
            group.update(used)
            assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
        optimizer.step()  # the loop may set the option back
        optimizer.zero_grad()
        change(group)
        train(model, optimizer, 2, start=at + 1)
        ends.append(weights(model))
    assert same(*ends)


SCHEDULERS: dict[str, Any] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


@pytest.mark.parametrize("when", ["before backward", "after step"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_that_step_outside_of_backward_and_step_work(make, when):
    ends = []
    for fused in (True, False):
        model = LanguageModel()
        optimizer = by_blocks(model, fused=fused)
        scheduler = make(optimizer)
        metrics = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
        for step in range(6):
            if when == "before backward" and step:
                scheduler.step(*metrics)
            train(model, optimizer, 1, start=step)
            if when == "after step":
                scheduler.step(*metrics)
        ends.append((weights(model), optimizer.learning_rates()))
    assert ends[0][1] == ends[1][1]
    assert ends[0][1][0] != 0.01
    assert same(ends[0][0], ends[1][0])


def deleted(model: nn.Module) -> None:
    model.norm.weight.grad = None


def replaced(model: nn.Module) -> None:
    model.norm.weight.grad = torch.zeros_like(model.norm.weight)


def emptied(model: nn.Module) -> None:
    model.norm.weight.grad.set_(torch.zeros_like(model.norm.weight))


def zeroed_by_hand(model: nn.Module) -> None:
    model.norm.weight.grad.data.zero_()


LOSSES: dict[str, Any] = {
    "deleted": (deleted, r"1 parameter\(s\), such as norm.weight, were deleted or replaced"),
    "zero_grad": (nn.Module.zero_grad, r"\d+ parameter\(s\), .*, were deleted or replaced"),
    "zeros": (partial(nn.Module.zero_grad, set_to_none=False), "deleted|changed"),
    "replaced": (replaced, "1 parameter.*, such as norm.weight, were deleted|changed"),
    "emptied": (emptied, "1 parameter.*, such as norm.weight, were deleted|changed"),
    "zeroed by hand": (zeroed_by_hand, "1 parameter.*, such as norm.weight, were deleted|changed"),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(("loss", "message"), LOSSES.values(), ids=LOSSES)
def test_a_gradient_that_is_lost_before_step_is_refused_in_each_step(loss, message, at):
    model = LanguageModel()
    optimizer = by_blocks(model)
    train(model, optimizer, at)
    backward(model, at)
    loss(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"Backward\(fused=True\) .*({message}).*leave out"):
        optimizer.step()
    assert same(weights(model), before)


@pytest.mark.parametrize("used_by", ["a second step", "the next backward pass"])
def test_gradients_that_are_used_twice_are_refused_before_anything_moves(used_by):
    model = LanguageModel()
    optimizer = by_blocks(model)
    train(model, optimizer, 2)
    backward(model, 2)
    optimizer.step()
    before = weights(model)
    match = r"gradients of the step before.* were not set to zero; call zero_grad\(\) after each"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step() if used_by == "a second step" else backward(model, 3)
    assert same(weights(model), before)
    optimizer.zero_grad()
    train(model, optimizer, 1, start=3)
    twin = LanguageModel()
    train(twin, by_blocks(twin, fused=False), 4)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("active", [1, 1.0])
@pytest.mark.parametrize("rule", [AdamW, partial(SGD, momentum=0.9)])
def test_gradients_of_zeros_that_stay_move_weights_as_without(rule, active):
    ends = []
    for fused in (True, False):
        model = LanguageModel()
        optimizer = by_blocks(model, rule, fused=fused, active=active, allocator="round_robin")
        for step in range(6):
            x = model.embed_tokens(tokens(step)) + model.position
            for place, layer in enumerate(model.layers):
                x = layer(x) if (place + step) % 3 else x  # as experts that get no token
            model.lm_head(model.norm(x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        ends.append(weights(model))
    assert same(*ends)


def test_a_state_that_is_loaded_between_backward_and_step_is_refused():
    model = LanguageModel()
    optimizer = by_blocks(model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    backward(model, 2)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"param groups were replaced .*do this before backward"):
        optimizer.step()


def test_accumulation_that_begins_later_is_refused_before_the_second_pass_moves_anything():
    model = LanguageModel()
    optimizer = by_blocks(model)
    train(model, optimizer, 2)
    backward(model, 2)
    before = weights(model)
    with pytest.raises(RuntimeError, match="a second backward pass came before step"):
        backward(model, 3)
    assert same(weights(model), before)


class Counting(SGD):
    """Keeps the sum of all gradients' norms in its groups, as Prodigy keeps its distance."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norms = [p.grad.norm().item() for p in group["params"] if p.grad is not None]
            group["total"] = group.get("total", 0.0) + sum(norms)
        super().step()


def test_rules_that_add_up_over_all_parameters_are_refused_before_anything_moves():
    model = LanguageModel()
    optimizer = by_blocks(model, Counting)
    before = weights(model)
    backward(model)
    with pytest.raises(RuntimeError, match="the wrapped optimizer sums over all parameters"):
        optimizer.step()
    assert same(weights(model), before)
    assert not any("total" in group for group in optimizer.param_groups)


@pytest.mark.parametrize("importance", ["gradient", "sensitivity"])
def test_measures_of_the_gradient_are_refused(importance):
    with pytest.raises(ValueError, match="importance= measures gradients at step"):
        by_blocks(LanguageModel(), importance=importance)


def refused_on_rank(rank: int) -> tuple[str, bool]:
    model = LanguageModel()
    before = weights(model)
    module = DistributedDataParallel(model)
    optimizer = by_blocks(model)
    backward(module, rank)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), same(weights(model), before)
    return "", False


@pytest.mark.distributed
def test_several_ranks_are_refused_before_anything_moves():
    for message, unmoved in on_ranks(refused_on_rank):
        assert "ranks average their gradients after the backward pass" in message
        assert unmoved


# The life of it


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_run_resumes(at):
    model = LanguageModel()
    optimizer = by_blocks(model, pause=Pause(warmup=2), allocator="random", period=3)
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    twin, its = copy.deepcopy((model, optimizer))
    train(model, optimizer, 6, start=at)
    again = LanguageModel(seed=2)
    resumed = by_blocks(again, pause=Pause(warmup=2), allocator="random", period=3)
    file.seek(0)
    for thing, saved in zip((again, resumed), torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(saved)
    train(again, resumed, 6, start=at)
    train(twin, its, 6, start=at)
    assert same(weights(again), weights(model))
    assert same(weights(twin), weights(model))


def test_groups_added_later_are_fused_too():
    model = LanguageModel(tied=False)
    inner = AdamW([p for n, p in model.named_parameters() if "head" not in n], lr=0.01)
    optimizer = DynamicAllocationOptimizer(
        inner, model, groups="blocks", active=1, backward=Backward(fused=True)
    )
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model.lm_head.parameters()})
    before = model.lm_head.weight.detach().clone()
    optimizer.zero_grad()
    backward(model, 2)
    assert gradients(model) == 0
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_at_the_end_gradients_stay(how):
    model = LanguageModel()
    optimizer = by_blocks(model)
    train(model, optimizer, 3)
    if how == "close":
        optimizer.close()
    else:
        del optimizer
        gc.collect()
    assert hooks(model) == 0
    before = weights(model)
    backward(model, 3)
    assert same(weights(model), before)
    assert all(p.grad is not None for p in model.parameters())
