"""Gradient measures: over the whole adapter, of active modules, and by a probe for the rest."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from budgets import adapted
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import ToyModel, backward, batch, names, same, train, weights, wrapped

from dynalora_optim import (
    DynamicAllocationOptimizer,
    Ema,
    GradientNorm,
    ImportanceTracker,
    Sensitivity,
)


def gradients(model: ToyModel, name: str) -> list[np.ndarray]:
    adapter = model.get_submodule(name)
    return [p.grad.double().numpy() for p in (adapter.A, adapter.B)]


def norm(arrays: list[np.ndarray], p: int) -> float:
    return float(np.linalg.norm(np.concatenate([a.ravel() for a in arrays]), ord=p))


def tracker_of(optimizer) -> ImportanceTracker:
    return optimizer.tracker


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_norm_is_of_a_and_b_together_and_averaged_over_steps(p):
    model = ToyModel()
    optimizer = wrapped(model, importance=GradientNorm(p=p), active=1.0)
    expected = dict.fromkeys(names(), 0.0)
    for step in range(3):
        backward(model, step)
        for name in expected:
            expected[name] += norm(gradients(model, name), p) / 3
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.tracker.scores() == pytest.approx(expected, rel=1e-5)


class Bags(nn.Module):
    """Groups of an embedding each, whose gradients are sparse, added up for a head."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(9, 4, sparse=sparse) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(torch.stack([table(tokens) for table in self.tables]).sum((0, 1)))


@pytest.mark.parametrize("importance", [GradientNorm(1), GradientNorm(2), Sensitivity()])
def test_sparse_gradients_score_as_dense_ones(importance):
    def run(sparse: bool):
        model = Bags(sparse)
        optimizer = wrapped(
            model,
            torch.optim.SGD,
            importance=importance,
            groups=lambda name, module: name if isinstance(module, nn.Embedding) else None,
            active=2,
            period=2,
            allocator="topk",
        )
        norms = []
        for step in range(6):
            tokens = torch.tensor([step % 3, step % 3, 8, step % 3])  # a token in several places
            model(tokens).square().sum().backward()
            grads = [table.weight.grad for table in model.tables]
            assert {g.is_sparse for g in grads if g is not None} == {sparse}
            dense = [torch.zeros(9, 4) if g is None else g.to_dense() for g in grads]
            norms.append(
                [float(torch.linalg.vector_norm(g, getattr(importance, "p", 2))) for g in dense]
            )
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.tracker.scores(), optimizer.record.state_dict(), weights(model), norms

    scores, record, ends, norms = run(True)
    expected, their_record, their_ends, _ = run(False)
    assert scores == pytest.approx(expected, rel=1e-5)
    assert [e["chosen"] for e in record] == [e["chosen"] for e in their_record]
    for name, weight in their_ends.items():
        torch.testing.assert_close(ends[name], weight)
    if isinstance(importance, GradientNorm):
        first = [sum(step[i] for step in norms[:2]) / 2 for i in range(3)]
        for i, name in enumerate(scores):
            if name in record[0]["chosen"]:
                assert record[1]["scores"][name] == pytest.approx(first[i], rel=1e-5)


def test_the_gradient_of_b_counts_while_that_of_a_is_zero():
    # With B = 0 the gradient of A is exactly 0: the published score, of A alone, sees nothing.
    model = ToyModel()
    with torch.no_grad():
        for layer in model.layers:
            layer[0].B.zero_()
    optimizer = wrapped(model, importance="gradient", active=1.0)
    backward(model)
    assert not any(layer[0].A.grad.any() for layer in model.layers)
    optimizer.step()
    assert all(score > 0 for score in optimizer.tracker.scores().values())


def test_gradients_are_read_after_unscaling():
    def scores(scale):
        model = ToyModel()
        optimizer = wrapped(model, importance="gradient", active=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        scaler.scale(model(batch()).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        return optimizer.tracker.scores()

    assert scores(2.0**10) == pytest.approx(scores(1.0), rel=1e-5)


def test_the_last_score_of_an_inactive_module_stands():
    # The published code adds the stale value again at every step.
    model = ToyModel()
    optimizer = wrapped(model, importance="gradient", active=3, period=2, allocator="round_robin")
    train(model, optimizer, 2)
    first = optimizer.record[0].chosen
    scores = tracker_of(optimizer).scores()
    train(model, optimizer, 2, start=2)
    later = tracker_of(optimizer).scores()
    assert {name: later[name] for name in first} == {name: scores[name] for name in first}


@pytest.mark.parametrize("window", ["run", "period", Ema(0.5)])
def test_a_module_never_seen_gets_the_usual_score(window):
    model = ToyModel()
    tracker = ImportanceTracker("gradient", window=window)
    optimizer = wrapped(model, importance=tracker, active=2, period=10)
    train(model, optimizer, 2)
    scores = tracker.scores()
    seen = [scores[name] for name in optimizer.active_groups]
    for name in set(names()) - set(optimizer.active_groups):
        assert scores[name] == pytest.approx(sum(seen) / 2)


def test_no_module_is_left_out_for_ever_for_want_of_a_score():
    model = ToyModel()
    optimizer = wrapped(model, importance="gradient", active=1, period=1)
    train(model, optimizer, 60)
    assert min(optimizer.record.counts().values()) > 0


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_sensitivity_is_smoothed_as_adalora_does(beta1, beta2, steps):
    model = ToyModel(layers=1)
    optimizer = wrapped(model, importance=Sensitivity(beta1, beta2), active=1.0)
    mean = uncertainty = 0.0
    for step in steps:
        backward(model, step)
        adapter = model.layers[0][0]
        s = sum(
            float(np.abs(p.detach().double().numpy() * p.grad.double().numpy()).sum())
            for p in (adapter.A, adapter.B)
        )
        mean = beta1 * mean + (1 - beta1) * s
        uncertainty = beta2 * uncertainty + (1 - beta2) * abs(s - mean)
        optimizer.step()
        optimizer.zero_grad()
    (score,) = optimizer.tracker.scores().values()
    # |s - I| cancels in float32 where beta1 is small: the error is relative to s, not to U.
    assert score == pytest.approx(mean * uncertainty, rel=1e-4, abs=1e-6 * mean * mean)


def test_a_users_own_gradient_measure():
    class FirstParameterOnly:
        def score_gradients(self, parameters):
            return parameters[0].grad.abs().max()

    model = ToyModel()
    optimizer = wrapped(model, importance=FirstParameterOnly(), active=1.0)
    backward(model)
    expected = {name: float(np.abs(gradients(model, name)[0]).max()) for name in names()}
    optimizer.step()
    assert optimizer.tracker.scores() == pytest.approx(expected)


# The probe


def probing(model, **options):
    tracker = ImportanceTracker("gradient", probe=True, window=options.pop("window", None))
    return wrapped(model, importance=tracker, **options)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_probe_scores_all_modules_once_a_period_without_training_them(set_to_none):
    model, free = ToyModel(), ToyModel()
    optimizer = probing(model, active=2, period=2, window="period")
    backward(free)
    expected = {name: norm(gradients(free, name), 2) for name in names()}
    before, chosen = weights(model), optimizer.active_groups
    optimizer.zero_grad(set_to_none=set_to_none)
    backward(model)
    optimizer.step()
    assert optimizer.tracker.scores() == pytest.approx(expected, rel=1e-5)
    moved = {n for n in names() if not torch.equal(model.get_submodule(n).A, before[f"{n}.A"])}
    assert moved == set(chosen)
    optimizer.zero_grad(set_to_none=set_to_none)
    backward(model, 1)  # the second step of the period is not probed
    idle = set(names()) - set(chosen)
    assert all(model.get_submodule(name).A.grad is None for name in idle)
    optimizer.step()
    assert optimizer.tracker.scores() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 7])
def test_a_probe_does_not_change_training(steps):
    plain, probed = ToyModel(), ToyModel()
    options = {"active": 2, "period": 3, "allocator": "round_robin"}
    train(plain, wrapped(plain, **options), steps)
    train(probed, probing(probed, **options), steps)
    assert same(weights(plain), weights(probed))


def test_only_the_first_micro_batch_is_probed():
    model = ToyModel()
    optimizer = probing(model, active=1, period=2)
    idle = set(names()) - set(optimizer.active_groups)
    backward(model, 0)
    scores = optimizer.tracker.scores()
    backward(model, 1)
    assert all(not model.get_submodule(name).active for name in idle)
    assert all(model.get_submodule(name).A.grad is None for name in idle)
    assert optimizer.tracker.scores() == scores


def test_a_copy_goes_on_probing():
    model = ToyModel()
    optimizer = probing(model, active=1)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for one, of in ((model, optimizer), (twin, twin_optimizer)):
        backward(one)
        idle = set(names()) - set(of.active_groups)
        assert all(one.get_submodule(name).A.grad is None for name in idle)
        of.step()
    assert twin_optimizer.tracker.scores() == optimizer.tracker.scores()


def test_a_round_trip_after_the_probe_does_not_probe_again():
    model, reference = ToyModel(), ToyModel()
    optimizer, untouched = probing(model, active=1), probing(reference, active=1)
    for step in range(2):
        backward(model, step)
        backward(reference, step)
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    untouched.step()
    assert optimizer.tracker.scores() == untouched.tracker.scores()
    assert same(weights(model), weights(reference))


def test_an_inactive_gradient_is_dropped_as_soon_as_it_is_scored():
    # The peak must not grow by the gradients of all modules together.
    model = ToyModel()
    optimizer = probing(model, active=1)
    idle = [name for name in names() if name not in optimizer.active_groups]
    held = []
    handles = [
        p.register_post_accumulate_grad_hook(
            lambda p: held.append(
                sum(q.grad is not None for n in idle for q in model.get_submodule(n).parameters())
            )
        )
        for p in model.parameters()
        if p.requires_grad
    ]
    backward(model)
    for handle in handles:
        handle.remove()
    assert max(held) <= 2, "at most one module's A and B"
    assert all(model.get_submodule(name).A.grad is None for name in idle)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_probe_under_checkpointing(use_reentrant):
    class Checkpointed(ToyModel):
        def forward(self, x):
            x = x.requires_grad_()
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            return self.head(x)

    free, model = ToyModel(), Checkpointed()
    optimizer = probing(model, active=1)
    backward(free)
    backward(model)
    expected = {name: norm(gradients(free, name), 2) for name in names()}
    assert optimizer.tracker.scores() == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 6), st.sampled_from([None, "run", "period", Ema(0.7)]), st.booleans())
def test_a_gradient_driven_run_resumes_bit_for_bit(stop, window, probe):
    def make(model):
        tracker = ImportanceTracker("gradient", window=window, probe=probe)
        return wrapped(model, importance=tracker, active=2, period=2)

    straight, first, second = ToyModel(), ToyModel(), ToyModel(seed=4)
    reference, stopped = make(straight), make(first)
    train(straight, reference, 7)
    train(first, stopped, stop)
    second.load_state_dict(first.state_dict())
    resumed = make(second)
    resumed.load_state_dict(stopped.state_dict())
    train(second, resumed, 7 - stop, start=stop)
    assert same(weights(second), weights(straight))
    assert resumed.tracker.scores() == reference.tracker.scores()
    assert resumed.record.state_dict() == reference.record.state_dict()


def test_a_sensitivity_driven_run_resumes_bit_for_bit():
    def make(model):
        return wrapped(model, importance="sensitivity", active=2, period=2)

    straight, first, second = ToyModel(), ToyModel(), ToyModel(seed=4)
    reference, stopped = make(straight), make(first)
    train(straight, reference, 7)
    train(first, stopped, 3)
    second.load_state_dict(first.state_dict())
    resumed = make(second)
    resumed.load_state_dict(stopped.state_dict())
    train(second, resumed, 4, start=3)
    assert same(weights(second), weights(straight))
    assert resumed.tracker.scores() == reference.tracker.scores()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("window", ["run", "period", Ema(0.5)])
def test_a_bad_score_is_forgotten(bad, window):
    class BadOnce(GradientNorm):
        seen = 0

        def score_gradients(self, parameters):
            type(self).seen += 1
            return super().score_gradients(parameters) if self.seen != 9 else torch.tensor(bad)

    model = ToyModel()
    tracker = ImportanceTracker(BadOnce(), window=window)
    optimizer = wrapped(model, importance=tracker, active=1.0, period=1)
    train(model, optimizer, 3)
    assert optimizer.record[2].scores["layers.2.0"] == 0.0
    assert optimizer.record[2].scores["layers.1.0"] > 0.0
    assert all(math.isfinite(score) and score > 0 for score in tracker.scores().values())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GradientNorm(p=3), r"GradientNorm\(p=3\)"),
        (lambda: Sensitivity(beta1=1.0), r"Sensitivity\(beta1=1.0\)"),
        (lambda: Ema(-0.1), r"Ema\(decay=-0.1\)"),
        (lambda: ImportanceTracker("forward", probe=True), "probe=True is for gradient"),
        (lambda: ImportanceTracker("forward", every=0), "every=0 must be a whole number"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_foreign_modules_are_probed_too():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    optimizer = probing(model, groups=lambda name, module: name or None, active=1)
    backward(model)
    assert sum(p.grad is not None for p in model.parameters()) == 2
    assert all(score > 0 for score in optimizer.tracker.scores().values())
    optimizer.step()


@pytest.mark.parametrize("checkpoints", [False, True])
def test_several_forwards_before_the_backward_that_scores_have_all_modules_active(checkpoints):
    """What is inactive gets no gradient, from no forward, and a checkpoint recomputes what ran."""

    def trained(active: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        tiny = adapted("llama", sizes=TINY)
        tiny.model.double()
        if checkpoints:
            tiny.model.gradient_checkpointing_enable({"use_reentrant": False})
        inner = torch.optim.SGD([p for p in tiny.model.parameters() if p.requires_grad], lr=0.1)
        importance = ImportanceTracker("gradient", probe=True)
        options = {"active": active, "period": 1, "importance": importance}
        optimizer = DynamicAllocationOptimizer(inner, tiny.model, **options)
        first, second = tiny.loss(), 2 * tiny.loss()
        first.backward()
        third = tiny.loss()
        second.backward()
        third.backward()
        named = tiny.model.named_parameters()
        found = {name: p.grad for name, p in named if p.grad is not None}
        optimizer.step()
        scores = optimizer.tracker.scores()
        assert all(score > 0 for score in scores.values())
        return found

    everything, some = trained(1.0), trained(0.3)
    assert 0 < len(some) < len(everything)
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, everything[name], rtol=0, atol=1e-12)
