"""Importance: equation 1 against its definition, and which forward passes count."""

from __future__ import annotations

import copy
import logging
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from toy import ToyModel, backward, batch, living_tensors, names, train, wrapped

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import (
    DynamicAllocationOptimizer,
    Ema,
    ForwardNorm,
    ForwardPass,
    ImportanceTracker,
    LiveBytes,
)
from dynalora_optim.groups._rules import find_groups


def tracked(model: nn.Module, **options) -> ImportanceTracker:
    tracker = ImportanceTracker(**options)
    tracker.attach(find_groups(model))
    return tracker


def passed(output: torch.Tensor, **options) -> ForwardPass:
    return ForwardPass(nn.Identity(), (output,), output, **options)


def outputs_of(model: ToyModel, x: torch.Tensor) -> list[np.ndarray]:
    """What each adapter layer puts out, computed without hooks."""
    outputs = []
    with torch.no_grad():
        for layer in model.layers:
            adapter = layer[0]
            h = x @ adapter.base.weight.T + adapter.base.bias + x @ adapter.A.T @ adapter.B.T
            outputs.append(h.double().numpy())
            x = h.tanh()
    return outputs


@given(st.sampled_from([1, 2]), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_forward_norm_is_equation_1(p, batch_sizes):
    model = ToyModel(layers=3)
    tracker = tracked(model, measure=ForwardNorm(p=p))
    expected = dict.fromkeys(names(3), 0.0)
    for step, rows in enumerate(batch_sizes):
        x = batch(step, rows=rows)
        model(x)
        for name, h in zip(expected, outputs_of(model, x), strict=True):
            expected[name] += np.linalg.norm(h, ord=p, axis=-1).sum()
    assert tracker.scores() == pytest.approx(expected, rel=1e-5)


def test_every_token_is_a_sample():
    tokens = torch.randn(2, 5, 7)
    flat = ForwardNorm().score(passed(tokens.reshape(10, 7)))
    assert ForwardNorm().score(passed(tokens)).item() == pytest.approx(flat.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_float32(dtype):
    # In float16 the sum of 4,096 ones stops growing at 2,048 and overflows at 65,504.
    rows = torch.ones(100_000, 4, dtype=dtype)
    assert ForwardNorm(p=1).score(passed(rows)).item() == 400_000


def test_a_model_in_double_precision_is_scored_in_single():
    model, twin = ToyModel(), ToyModel().double()
    tracker, double = tracked(model), tracked(twin)
    model(batch())
    twin(batch().double())
    assert double.scores() == pytest.approx(tracker.scores(), rel=1e-5)


def test_importance_is_normalised_and_uniform_before_any_score():
    model = ToyModel(layers=4)
    tracker = tracked(model)
    assert tracker.scores() == dict.fromkeys(names(4), 0.0)
    assert tracker.importance() == dict.fromkeys(names(4), 0.25)
    model(batch())
    scores, importance = tracker.scores(), tracker.importance()
    assert math.fsum(importance.values()) == pytest.approx(1.0)
    total = sum(scores.values())
    assert importance == pytest.approx({name: y / total for name, y in scores.items()})


def test_evaluation_and_no_grad_passes_never_count():
    model = ToyModel()
    tracker = tracked(model)
    model(batch(0))
    before = tracker.scores()
    model.eval()
    model(batch(1))
    model.train()
    with torch.no_grad():
        model(batch(2))
    with torch.inference_mode():
        model(batch(3))
    assert tracker.scores() == before
    assert all(before.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("together", [False, True], ids=["backward-each", "backward-once"])
def test_a_checkpointed_block_counts_once(use_reentrant, micro_batches, together):
    plain, checkpointed = ToyModel(), ToyModel()
    expected, found = tracked(plain), tracked(checkpointed)
    for step in range(2):
        losses = []
        for micro in range(micro_batches):
            h = x = batch(10 * step + micro).requires_grad_()
            for layer in checkpointed.layers:
                h = checkpoint(layer, h, use_reentrant=use_reentrant)
            plain(x)
            losses.append(h.sum())
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        expected.end_step(step + 1)
        found.end_step(step + 1)
    assert found.scores() == pytest.approx(expected.scores())


def per_sample(model: ToyModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean of the gradients of each row, as differentially private training takes them."""

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).square().mean()

    each = torch.vmap(torch.func.grad(loss), (None, 0))
    found = each({name: p.detach() for name, p in model.named_parameters()}, x[:, None])
    return {name: gradients.mean(0) for name, gradients in found.items()}


def of_a_batch(model: ToyModel, x: torch.Tensor) -> dict[str, torch.Tensor]:
    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    return torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("gradients_of", [per_sample, of_a_batch])
def test_passes_within_transforms_of_torch_func_count_as_others(gradients_of):
    scores = []
    for functional in (True, False):
        model = ToyModel(layers=3)
        optimizer = wrapped(model, active=2, period=2)
        for step in range(6):
            if functional:
                for name, gradient in gradients_of(model, batch(step)).items():
                    group = name.rpartition(".")[0]
                    if group == "head" or group in optimizer.active_groups:
                        parameter = model.get_parameter(name)
                        before = 0 if parameter.grad is None else parameter.grad
                        parameter.grad = before + gradient
            else:
                backward(model, step)
            if step % 3:  # else two forwards come before a step
                optimizer.step()
                optimizer.zero_grad()
        scores.append(optimizer.tracker.scores())
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_part_delta_is_the_adapters_own_output(p):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject(model, LoRAConfig(rank=2, alpha=4, targets=["0", "1"]))
    tracker = tracked(model, measure=ForwardNorm(p=p, part="delta"))
    x = torch.randn(3, 7, 6)
    model(x)
    assert tracker.scores() == {"0": 0.0, "1": 0.0}, "B = 0: the adapters add nothing"
    for layer in model:
        nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        first = x @ model[0].delta_weight().T
        second = model[0](x) @ model[1].delta_weight().T
    model(x)
    expected = [float(h.norm(p=p, dim=-1).sum()) for h in (first, second)]
    assert list(tracker.scores().values()) == pytest.approx(expected, rel=1e-4)


def test_part_delta_needs_a_base_layer():
    model = ToyModel()
    with pytest.raises(ValueError, match=r"base_layer, which layers.0.0 lacks"):
        wrapped(model, importance=ForwardNorm(part="delta"))
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_is_left_out_by_the_attention_mask():
    model = ToyModel(layers=2)
    masked, unpadded = tracked(model), tracked(model)
    tokens = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    unpadded.close()
    masked.attention_mask = mask
    model(tokens)
    reference = tracked(model)
    masked.close()
    for row, kept in zip(tokens, mask, strict=True):
        model(row[kept.bool()])
    assert masked.scores() == pytest.approx(reference.scores(), rel=1e-5)


def test_a_mask_does_not_touch_outputs_without_tokens():
    pooled = torch.randn(3, 4)
    mask = torch.zeros(3, 5)
    assert torch.equal(
        ForwardNorm().score(passed(pooled, mask=mask)), ForwardNorm().score(passed(pooled))
    )


def test_padding_that_overflows_does_not_spoil_the_score():
    tokens = torch.ones(1, 3, 4)
    tokens[0, 2] = math.nan
    mask = torch.tensor([[1, 1, 0]])
    assert ForwardNorm().score(passed(tokens, mask=mask)).item() == pytest.approx(4.0)


def test_a_mask_that_leaves_nothing_out_costs_no_operation_per_module():
    class Masked(ToyModel):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    model = Masked(layers=3)
    tokens, every = torch.randn(2, 5, 8), torch.ones(2, 5)
    tracker = ImportanceTracker()
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, importance=tracker, active=1.0
    )

    def ops(mask):
        with LiveBytes() as counted:
            model(tokens, attention_mask=mask)
        return counted.ops

    without = ops(None)
    assert ops(every) <= without + 3  # is it all ones?
    assert ops(every.tril()) >= without + 6  # two more for each of three modules
    optimizer.close()


class Masked(ToyModel):
    def forward(self, x, other=None, attention_mask=None):
        return super().forward(x)


def test_a_mask_that_is_passed_by_position_leaves_padding_out():
    tokens, mask = torch.randn(2, 5, 8), torch.ones(2, 5).tril()
    found = []
    for args, kwargs in (
        ((tokens,), {"attention_mask": mask}),
        ((tokens, None, mask), {}),
        ((tokens,), {}),
    ):
        model = Masked(layers=3)
        optimizer = wrapped(model, lr=0.0)
        model(*args, **kwargs)
        found.append(optimizer.tracker.scores())
    assert found[0] == found[1]
    assert all(found[0][name] < found[2][name] for name in found[0])


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (torch.ones(2, 1, 5, 5).tril(), r"a Tensor of shape \(2, 1, 5, 5\), not"),
        ({"full_attention": torch.ones(2, 5).tril()}, "a dict, not"),
    ],
    ids=["4-D", "dict"],
)
@pytest.mark.parametrize("importance", ["forward", "gradient"])
def test_a_mask_that_scores_cannot_use_is_told_once(mask, kind, importance, caplog):
    tokens, scores = torch.randn(2, 5, 8), []
    for passed_on in (mask, None):
        model = Masked(layers=3)
        optimizer = wrapped(model, lr=0.0, importance=importance)
        for _ in range(2):
            model(tokens, None, passed_on)
        model(tokens, attention_mask=passed_on)
        scores.append(optimizer.tracker.scores())
    assert scores[0] == scores[1]
    lines = [line for line in caplog.messages if "attention_mask" in line]
    assert len(lines) == (importance == "forward")  # gradients have no tokens to leave out
    assert all(re.search(kind, line) for line in lines)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1, 5, 5\)"):
        ImportanceTracker().attention_mask = torch.zeros(2, 1, 5, 5)


@given(st.integers(1, 5), st.integers(1, 12))
def test_every_measures_in_every_nth_step(every, steps):
    model, reference = ToyModel(layers=2), ToyModel(layers=2)
    optimizer = wrapped(
        model, importance=ImportanceTracker(every=every), active=1.0, period=100, lr=0.0
    )
    tracker = tracked(reference)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        if step % every == 0:
            backward(reference, step)
    assert optimizer.tracker.scores() == pytest.approx(tracker.scores(), rel=1e-6)


@given(st.floats(0, 0.99))
def test_ema_is_an_exponential_mean_over_passes(decay):
    model = ToyModel(layers=1)
    smooth, single = tracked(model, window=Ema(decay)), tracked(model, window="period")
    expected = None
    for step in range(4):
        model(batch(step))
        (value,) = single.roll().values()
        expected = value if expected is None else decay * expected + (1 - decay) * value
        smooth.roll()
    assert smooth.scores()["layers.0.0"] == pytest.approx(expected, rel=1e-5)


def test_a_module_called_twice_counts_twice():
    model = ToyModel(layers=1)
    tracker = tracked(model)
    model(batch())
    once = tracker.scores()["layers.0.0"]
    model(batch())
    assert tracker.scores()["layers.0.0"] == pytest.approx(2 * once)


def test_windows():
    model = ToyModel()
    run, period = tracked(model), tracked(model, window="period")
    model(batch(0))
    first = run.roll()
    assert period.roll() == first
    assert period.scores() == first, "an empty window shows the last one"
    model(batch(1))
    second = period.roll()
    assert run.roll() == pytest.approx({name: first[name] + second[name] for name in first})


def test_scores_that_are_not_finite_count_as_zero_and_are_logged(caplog):
    model = ToyModel(layers=3)
    tracker = tracked(model)
    model(batch())
    with torch.no_grad():
        model.layers[1][0].B.fill_(math.inf)
    model(batch())
    with caplog.at_level(logging.WARNING):
        importance = tracker.importance()
    assert importance["layers.0.0"] > 0
    assert importance["layers.1.0"] == importance["layers.2.0"] == 0
    assert "layers.1.0 = " in caplog.text
    assert "layers.0.0" not in caplog.text


def test_one_overflow_does_not_silence_a_module_for_ever():
    model = ToyModel(layers=2)
    tracker = tracked(model)
    model(batch(0))
    first = tracker.roll()
    healthy = model.layers[1][0].B.detach().clone()
    with torch.no_grad():
        model.layers[1][0].B.fill_(math.inf)
        model.train()
    model(batch(1))
    assert not math.isfinite(tracker.roll()["layers.1.0"])
    with torch.no_grad():
        model.layers[1][0].B.copy_(healthy)
    model(batch(2))
    assert math.isfinite(tracker.scores()["layers.1.0"])
    assert tracker.scores()["layers.1.0"] > first["layers.1.0"]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_training_goes_on_when_every_score_is_bad(bad):
    class Broken:
        def score(self, forward):
            return torch.tensor(bad)

    model = ToyModel()
    optimizer = wrapped(model, importance=Broken(), active=2, period=1)
    train(model, optimizer, 5)
    assert [len(entry.chosen) for entry in optimizer.record] == [2] * 6


def test_a_users_own_measure_is_a_class_with_one_method():
    class Spread:
        def score(self, forward):
            return forward.output.float().std()

    model = ToyModel(layers=2)
    optimizer = wrapped(model, importance=Spread())
    backward(model)
    expected = [float(torch.tensor(h).float().std()) for h in outputs_of(model, batch())]
    assert list(optimizer.tracker.scores().values()) == pytest.approx(expected, rel=1e-5)


def test_the_first_tensor_of_a_tuple_or_dict_is_scored():
    class Pair(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.kind = kind

        def forward(self, x):
            return (x * self.scale, None) if self.kind is tuple else {"h": x * self.scale}

    model = nn.ModuleList([Pair(tuple), Pair(dict)])
    tracker = ImportanceTracker()
    tracker.attach(find_groups(model, lambda name, module: name or None))
    for module in model:
        module(torch.full((3, 4), 2.0))
    assert list(tracker.scores().values()) == pytest.approx([12.0, 12.0])


class Count(TorchDispatchMode):
    """Counts the operations, or those of one kind."""

    def __init__(self, kind=None):
        super().__init__()
        self.kind, self.count = kind, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.kind in (None, func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"measure": "forward"},
        {"measure": ForwardNorm(p=1), "window": Ema(0.9)},
        {"measure": "gradient"},
        {"measure": "gradient", "probe": True},
        {"measure": "sensitivity"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_step_does_not_wait_for_the_device(options):
    def reads(optimizer, model):
        train(model, optimizer, 1)
        with Count(torch.ops.aten._local_scalar_dense.default) as mode:  # the host waits for it
            for step in range(3):
                optimizer_step(optimizer, model, step)
        return mode.count

    def optimizer_step(optimizer, model, step):
        if isinstance(optimizer, DynamicAllocationOptimizer):
            optimizer.tracker.attention_mask = torch.ones(2, 2)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()

    plain, model = ToyModel(), ToyModel()
    expected = reads(torch.optim.SGD(plain.parameters(), lr=0.1, foreach=True), plain)
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, foreach=True),
        model,
        active=3,
        period=100,
        importance=ImportanceTracker(**options),
    )
    assert expected == 0, "else the comparison would hide a read"
    assert reads(optimizer, model) == 0
    optimizer.tracker.scores()


@pytest.mark.parametrize(
    ("window", "together"), [("run", 1), (Ema(0.9), 2)], ids=["sum", "exponential mean"]
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_pass_costs_two_operations_a_module_and_a_few_for_all(window, together, micro_batches):
    def operations(every):
        model = ToyModel(layers=6)
        tracker = ImportanceTracker(window=window, every=every)
        optimizer = wrapped(model, importance=tracker, active=1.0, period=100)
        train(model, optimizer, 1)
        with Count() as mode:
            for step in range(micro_batches):
                backward(model, step)
            optimizer.step()
        return mode.count

    assert operations(1) - operations(10**9) == micro_batches * (2 * 6 + together)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.sampled_from(["run", Ema(0.3)]))
def test_reading_in_between_changes_no_bit(reads, window):
    model = ToyModel(layers=2)
    left_alone, read = tracked(model, window=window), tracked(model, window=window)
    for step, now in enumerate(reads):
        model(batch(step))
        if now:
            read.scores()
    assert read.state_dict() == left_alone.state_dict()


def test_modules_that_run_a_different_number_of_times_add_up():
    model = ToyModel(layers=3)
    tracker, expected = tracked(model), dict.fromkeys(names(3), 0.0)
    single = tracked(model, window="period")
    for step, runs in enumerate([(1, 0, 2), (0, 3, 1), (2, 2, 0)]):
        for name, layer, times in zip(expected, model.layers, runs, strict=True):
            for _ in range(times):
                layer(batch(step))
                expected[name] += single.roll()[name]
    assert tracker.scores() == pytest.approx(expected, rel=1e-5)


def test_nothing_is_held_of_many_passes_without_a_step():
    model = ToyModel(layers=2)
    tracker = tracked(model)

    def born():
        return len(living_tensors().keys() - others)

    others = living_tensors()  # held: those of tests before this one cannot go in between
    model(batch())
    model(batch())
    before = born()
    for _ in range(50):
        model(batch())
    assert born() == before
    assert tracker.scores()["layers.0.0"] > 0


def test_loaded_scores_are_not_joined_by_passes_of_before():
    model = ToyModel(layers=2)
    tracker = tracked(model)
    model(batch(0))
    saved = tracker.state_dict()
    model(batch(1))
    tracker.load_state_dict(saved, step=0)
    assert tracker.state_dict() == saved


def test_a_copy_of_the_model_carries_no_tracker_with_it():
    model = ToyModel()
    tracker = tracked(model)
    model(batch())
    before = tracker.scores()
    twin = copy.deepcopy(model)
    twin(batch())
    assert tracker.scores() == before


def test_close_removes_every_hook_and_keeps_the_scores():
    model = ToyModel()
    tracker = tracked(model)
    model(batch())
    before = tracker.scores()
    tracker.close()
    model(batch())
    assert tracker.scores() == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("p", [0, 3, math.inf])
def test_forward_norm_refuses_other_norms(p):
    with pytest.raises(ValueError, match=rf"ForwardNorm\(p={p}\)"):
        ForwardNorm(p=p)


def test_unknown_measures_windows_and_used_trackers_are_refused():
    with pytest.raises(ValueError, match=r"importance='backward'.*'forward'"):
        ImportanceTracker("backward")
    with pytest.raises(TypeError, match="neither a short name nor a measure"):
        ImportanceTracker(ForwardNorm)  # type: ignore[arg-type]  # a class, not an object
    with pytest.raises(ValueError, match=r"window='epoch'"):
        ImportanceTracker(window="epoch")  # type: ignore[arg-type]
    used = tracked(ToyModel())
    with pytest.raises(ValueError, match="another optimizer"):
        wrapped(ToyModel(), importance=used)


def test_nested_modules_of_an_idle_group_are_scored_as_those_of_an_active_one():
    def scores(active: float) -> dict[str, float]:
        torch.manual_seed(0)
        inner = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
        model = nn.Sequential(*inner, nn.Linear(8, 1))
        optimizer = DynamicAllocationOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            active=active,
            groups=lambda name, module: name[0] if name[:1] in ("0", "1") else None,
        )
        model(batch()).sum().backward()
        optimizer.step()
        return optimizer.tracker.scores()

    assert scores(1) == scores(1.0)
    assert all(scores(1).values())
