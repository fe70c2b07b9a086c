"""The optimizer against its plain twin (reference.py), step by step, and both against known values.

The twin computes in double precision throughout; the optimizer sums its scores in float32. A score
decides by its order only, so where two deciding numbers are closer than float32 can tell, the
example is set aside, and counted: no test may set aside more than a few.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from reference import HEAD, Batch, Network, Settings, Twin
from torch import Tensor, nn
from toy import ToyAdapter

from dynalora_optim import (
    DiscountedStochastic,
    DynamicAllocationOptimizer,
    ForwardNorm,
    GradientNorm,
    ImportanceTracker,
    LocalLR,
    Once,
    Pause,
    Periodic,
    RoundRobin,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)
from dynalora_optim.allocation._context import uses_active

OUTPUTS = 2
TOO_CLOSE = 1e-5  # float32 sums of some dozens of numbers are good to about 1e-6
ALLOCATORS = {
    "topk": lambda _: TopK(),
    "threshold": Threshold,
    "stochastic": lambda _: Stochastic(),
    "bernoulli": lambda _: Stochastic(sampling="bernoulli"),
    "discounted": lambda _: DiscountedStochastic(),
    "random": lambda _: UniformRandom(),
    "round_robin": lambda _: RoundRobin(),
}


class Stack(nn.Module):
    """The twin's network in torch, float64: adapters of any rank, tanh, a trained head."""

    def __init__(self, modules: int, features: int, rank: int = 2, *, zero_B: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ToyAdapter(features) for _ in range(modules))
        for layer in self.layers:
            B = torch.zeros if zero_B else torch.randn
            layer.A = nn.Parameter(torch.randn(rank, features) * 0.5)
            layer.B = nn.Parameter(B(features, rank) * 0.5)
        self.head = nn.Linear(features, OUTPUTS)
        self.double()

    def forward(self, x: Tensor, present: tuple[int, ...]) -> Tensor:
        for m in present:
            x = torch.tanh(self.layers[m](x))
        return self.head(x)

    def twin(self) -> Network:
        """The same numbers for the twin."""

        def copied(parameter: Tensor) -> Any:
            return parameter.detach().numpy().copy()

        parts = {m: {"A": layer.A, "B": layer.B} for m, layer in enumerate(self.layers)}
        parts[HEAD] = {"U": self.head.weight, "c": self.head.bias}
        return Network(
            W=[copied(layer.base.weight) for layer in self.layers],
            b=[copied(layer.base.bias) for layer in self.layers],
            weights={
                part: {name: copied(p) for name, p in weights.items()}
                for part, weights in parts.items()
            },
        )


class Subject:
    """The real thing, told the same settings."""

    def __init__(self, model: Stack, settings: Settings) -> None:
        self.model = model
        measure = {"forward": ForwardNorm, "gradient": GradientNorm}[settings.measure]
        allocator = ALLOCATORS[settings.allocator](settings.share)
        by_own_clock = settings.lr_time in ("unscaled", "scaled")
        self.optimizer = DynamicAllocationOptimizer(
            self._rule(settings),
            model,
            **({"active": settings.active} if uses_active(allocator) else {}),
            period=(Once if settings.once else Periodic)(settings.period, settings.warmup),
            importance=ImportanceTracker(
                measure(p=settings.p), window=settings.window, every=settings.every
            ),
            allocator=allocator,
            seed=settings.seed,
            lr_time=(
                LocalLR(settings.factor, settings.lr_time) if by_own_clock else settings.lr_time
            ),
            pause=Pause(moments=settings.on_activate, warmup=settings.activation_warmup),
        )
        self._has_scheduler = settings.horizon is not None and not by_own_clock
        if self._has_scheduler:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.factor)

    def _rule(self, settings: Settings) -> torch.optim.Optimizer:
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if settings.rule == "sgd":
            momentum = {"momentum": settings.momentum, "dampening": settings.dampening}
            return torch.optim.SGD(self.model.parameters(), **options, **momentum)
        moments = {"betas": settings.betas, "eps": settings.eps}
        return torch.optim.AdamW(self.model.parameters(), **options, **moments)

    def step(self, batches: list[Batch]) -> None:
        for batch in batches:
            output = self.model(torch.from_numpy(batch.x), batch.present)
            error = output - torch.from_numpy(batch.target)
            (error.square().sum() / 2).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._has_scheduler:
            self.scheduler.step()

    def evaluate(self, batch: Batch) -> None:
        """What must leave no trace."""
        self.model.eval()
        self.model(torch.from_numpy(batch.x), batch.present)
        self.model.train()
        with torch.no_grad():
            self.model(torch.from_numpy(batch.x), batch.present)

    @property
    def active(self) -> set[int]:
        return {self.optimizer.groups.index(name) for name in self.optimizer.active_groups}

    @property
    def scores(self) -> list[float]:
        return list(self.optimizer.tracker.scores().values())

    @property
    def updates(self) -> list[int]:
        groups = self.optimizer.state_dict()["param_groups"]
        packed = [json.loads(group["dynalora"])["modules"] for group in groups]
        saved = {name: module for modules in packed for name, module in modules.items()}
        return [saved[name]["updates"] for name in self.optimizer.groups]


def assert_equal(subject: Subject, twin: Twin) -> None:
    assert subject.active == twin.active
    assert subject.scores == pytest.approx(twin.scores(), rel=2e-6)
    assert subject.updates == twin.C
    network = subject.model.twin()
    for part, weights in twin.network.weights.items():
        for name, weight in weights.items():
            found = network.weights[part][name]
            np.testing.assert_allclose(found, weight, rtol=1e-9, atol=1e-10, err_msg=str(part))


def assert_same_record(subject: Subject, twin: Twin) -> None:
    names = subject.optimizer.groups
    assert [entry.step for entry in subject.optimizer.record] == [e.step for e in twin.record]
    for entry, expected in zip(subject.optimizer.record, twin.record, strict=True):
        assert set(entry.chosen) == {names[m] for m in expected.chosen}
        assert list(entry.scores.values()) == pytest.approx(expected.scores, rel=2e-6)


@st.composite
def settings_for(draw: Any, modules: int, allocator: str) -> Settings:
    """Any run of these modules with this allocator."""
    count = st.integers(1, modules)
    share = st.sampled_from([0.05, 0.25, 1 / 3, 0.5, 2 / 3, 1.0])
    return Settings(
        active=draw(count | share),
        allocator=allocator,
        share=draw(st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])),
        period=draw(st.integers(1, 4)),
        once=draw(st.sampled_from([False, False, False, True])),
        warmup=draw(st.sampled_from([0, 0, 1, 3])),
        seed=draw(st.integers(0, 2**32)),
        measure=draw(st.sampled_from(["forward", "gradient"])),
        p=draw(st.sampled_from([1, 2])),
        window=draw(st.sampled_from(["run", "period"])),
        every=draw(st.sampled_from([1, 1, 2])),
        rule=draw(st.sampled_from(["sgd", "adamw"])),
        lr=draw(st.sampled_from([0.01, 0.05])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        momentum=draw(st.sampled_from([0.5, 0.9])),
        dampening=draw(st.sampled_from([0.0, 0.3])),
        betas=draw(st.sampled_from([(0.9, 0.999), (0.5, 0.8)])),
        horizon=draw(st.none() | st.integers(4, 20)),
        lr_time=draw(st.sampled_from(["global", "local", "unscaled", "scaled"])),
        activation_warmup=draw(st.sampled_from([0, 0, 2, 3])),
        on_activate=draw(st.sampled_from(["keep", "reset_momentum", "reset"])),
    )


def draw_batches(random: np.random.Generator, modules: int, features: int, dropped: float) -> Any:
    """The micro-batches of one step; each module sits out ``dropped`` of them."""
    return [
        Batch(
            x=random.normal(size=(random.integers(1, 4), features)),
            target=random.normal(size=(1, OUTPUTS)),
            present=tuple(m for m in range(modules) if random.random() >= dropped),
        )
        for _ in range(random.integers(1, 3))
    ]


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_run_is_its_twins(allocator):
    drawn = {"all": 0, "too close": 0}

    @given(st.data(), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32))
    def check(data, modules, features, seed):
        drawn["all"] += 1
        settings = data.draw(settings_for(modules, allocator), label="settings")
        dropped = data.draw(st.sampled_from([0.0, 0.3]), label="dropped")
        torch.manual_seed(seed)
        rank, zero_B = data.draw(st.integers(1, 2)), data.draw(st.booleans())
        model = Stack(modules, features, rank, zero_B=zero_B)
        subject, twin = Subject(model, settings), Twin(model.twin(), settings)
        random = np.random.default_rng(seed)
        assert_equal(subject, twin)
        for _ in range(12):
            batches = draw_batches(random, modules, features, dropped)
            subject.evaluate(batches[0])
            subject.step(batches)
            twin.step(batches)
            if twin.gap < TOO_CLOSE:
                drawn["too close"] += 1
                reject()
            assert_equal(subject, twin)
        assert_same_record(subject, twin)

    check()
    assert drawn["too close"] <= 0.1 * drawn["all"], drawn


# Known values, worked out with pencil and paper


def both(model: Stack, settings: Settings, steps: int, batch: Batch) -> tuple[Subject, Twin]:
    subject, twin = Subject(model, settings), Twin(model.twin(), settings)
    for _ in range(steps):
        subject.step([batch])
        twin.step([batch])
        assert_equal(subject, twin)
    return subject, twin


def filled(parameter: Tensor, values: Any) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values, dtype=torch.float64).reshape(parameter.shape))


def constant_stack(*biases: Any) -> Stack:
    """Modules whose every output row is their bias: W = A = B = 0."""
    model = Stack(len(biases), features=2, rank=1)
    for layer, bias in zip(model.layers, biases, strict=True):
        for parameter in (layer.base.weight, layer.A, layer.B):
            filled(parameter, np.zeros(parameter.shape))
        filled(layer.base.bias, bias)
    return model


@pytest.mark.parametrize(
    ("p", "scores", "importance"),
    [
        (1, [15.0, 2.8], [0.8426966292, 0.1573033708]),
        (2, [12.6157731059, 2.0], [0.8631615236, 0.1368384764]),
    ],
)
def test_known_scores(p, scores, importance):
    """Equations 1 and 2.

    Module 0 has W = I and B A = [[0, 0], [1, 0]]; its input rows (3, 4) and (0, 5) come out as
    (3, 3 + 4) = (3, 7) and (0, 5). Module 1 puts out (0.6, -0.8) twice.

    p = 1: y = (10 + 5, 1.4 + 1.4); 15 / 17.8 = 0.8426966292.
    p = 2: y = (sqrt(58) + 5, 1 + 1); 12.6157731059 / 14.6157731059 = 0.8631615236.
    """
    model = constant_stack([0, 0], [0.6, -0.8])
    filled(model.layers[0].base.weight, [[1, 0], [0, 1]])
    filled(model.layers[0].A, [[1, 0]])
    filled(model.layers[0].B, [[0], [1]])
    rows = np.array([[3.0, 4.0], [0.0, 5.0]])
    batch = Batch(rows, np.zeros((1, OUTPUTS)), (0, 1))
    subject, twin = both(model, Settings(p=p, lr=0.0, period=9), 1, batch)
    assert subject.scores == pytest.approx(scores, rel=1e-6)
    assert twin.scores() == pytest.approx(scores, rel=1e-9)
    found = list(subject.optimizer.tracker.importance().values())
    assert found == pytest.approx(importance, rel=1e-6)


@pytest.mark.parametrize(
    ("allocator", "chosen"),
    [
        ("topk", [{2}, {0}, {0}, {0}]),
        ("threshold", [{0, 2}, {0}, {0}, {0}]),
        ("stochastic", [{2}, {0}, {2}, {2}]),
        ("bernoulli", [{0}, {0}, {2}, {2}]),
        ("discounted", [{2}, {0}, {2}, {0}]),
        ("random", [{2}, {1}, {1}, {2}]),
        ("round_robin", [{0}, {1}, {2}, {0}]),
    ],
)
def test_known_selections(allocator, chosen):
    """Section 3.2: one of three modules, chosen after 0, 2, 4 and 6 steps.

    Every output row of module 0, 1, 2 is (3, 4), (0, 1), (0, 4), so y^ = (0.5, 0.1, 0.4), and
    (1/3, 1/3, 1/3) before any score. The draws of ``random.Random("3:i")``, and the exponential
    clocks E = -log(1 - draw):

    ======== ====================== ====== ======================= =======================
    i        draws                  fourth E                       E / y^
    ======== ====================== ====== ======================= =======================
    0        0.5789 0.6921 0.3725   0.2574 0.8648 1.1779 0.4659    2.594  3.534 **1.398**
    1        0.2737 0.1637 0.6509   0.1869 0.3199 0.1788 1.0525    **0.640**  1.788 2.631
    2        0.8095 0.8983 0.4985   0.6903 1.6582 2.2862 0.6901    3.316 22.862 **1.725**
    3        0.5869 0.5429 0.3492   0.7159 0.8840 0.7828 0.4296    1.768  7.828 **1.074**
    ======== ====================== ====== ======================= =======================

    - stochastic: the first clock, in bold.
    - discounted: the clocks times C. i = 1, C = (0, 0, 2): 0.640 < 1.788 < 5.262. i = 2, C =
      (2, 0, 2): 3.450 < 6.633 < 22.862. i = 3, C = (2, 0, 4): 3.536 < 4.296 < 7.828.
    - bernoulli: draws below y^: none, {0}, none, {2}. The fourth draw decides the others: 0.2574
      lies in [0, 1/3), module 0; 0.6903 in [0.6, 1), module 2.
    - topk, threshold: the order of i = 0 is drawn, (2, 0, 1). Threshold's p = 0.5 takes two of
      three equal thirds, then module 0 alone: 0.5 >= 0.5.
    """
    model = constant_stack([3, 4], [0, 1], [0, 4])
    settings = Settings(active=1, allocator=allocator, share=0.5, period=2, seed=3, lr=0.0)
    batch = Batch(np.ones((2, 2)), np.zeros((1, OUTPUTS)), (0, 1, 2))
    subject, twin = both(model, settings, 7, batch)
    assert [entry.chosen for entry in twin.record] == chosen
    assert_same_record(subject, twin)


def test_known_weights():
    """SGD with momentum 0.9 at rate 0.1, one module with d = r = 1; the second output is silent.

    W = b = B = 0, A = u = 1, c = 0; input 1, target -1.

    Step 1: z = h = 0, error 1, dz = 1. dA = B dz = 0, dB = A dz = 1, du = error h = 0, dc = 1.
        A = 1, B = -0.1, u = 1, c = -0.1.
    Step 2: z = -0.1, h = tanh(-0.1) = -0.0996679946, error = h - 0.1 + 1 = 0.8003320054,
        dz = error (1 - h^2) = 0.7923817400; dA = -0.0792381740, dB = dz, du = error h =
        -0.0797674861, dc = error.
        A = 1 + 0.00792381740, B = -0.1 - 0.1 (0.9 + dz), u = 1 + 0.00797674861,
        c = -0.1 - 0.1 (0.9 + error).
    """
    model = Stack(1, features=1, rank=1)
    layer, head = model.layers[0], model.head
    for parameter, values in (
        *((p, 0) for p in (layer.base.weight, layer.base.bias, layer.B)),
        (layer.A, 1),
        (head.weight, [1, 0]),
        (head.bias, [0, 0]),
    ):
        filled(parameter, np.broadcast_to(values, parameter.numel()).tolist())
    batch = Batch(np.ones((1, 1)), np.array([[-1.0, 0.0]]), (0,))
    _, twin = both(model, Settings(lr=0.1, momentum=0.9), 2, batch)
    found = [twin.network.weights[0][name].item() for name in ("A", "B")]
    found += [twin.network.weights[HEAD][name].flat[0] for name in ("U", "c")]
    expected = [1.0079238174, -0.2692381740, 1.0079767486, -0.2700332005]
    assert found == pytest.approx(expected, abs=1e-10)
