"""A plain twin of the whole allocation loop: numpy, double precision, one sample path.

It is written from the paper (sections 3.1 to 3.4) and what the docstrings promise, and imports
nothing of what it checks. Forward and backward are done by hand. It is slow and short on purpose:
where the two disagree, this is the text to hold against the paper.

The network: h_m = tanh(z_m) with z_m = (W_m + B_m A_m) h_{m-1} + b_m, and out = U h_M + c. W and b
are frozen, A_m and B_m are module m, U and c are in no module and always active. The loss of a
batch is half the squared error, summed over its rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
Part: TypeAlias = "int | str"  # a module, by its number, or HEAD
Gradients: TypeAlias = "dict[Part, dict[str, Array]]"
HEAD = "head"


@dataclass(frozen=True)
class Settings:
    """What a run is told. ``share`` is Threshold's p, ``p`` the norm's."""

    active: float = 1  # a count (int) or a share (float)
    allocator: str = "topk"
    share: float = 0.5
    period: int = 1  # with once=True, the one step after which to choose again
    once: bool = False
    warmup: int = 0
    seed: int = 0
    measure: str = "forward"  # or "gradient"
    p: int = 2
    window: str = "run"  # or "period"
    every: int = 1  # measure in every so many steps
    rule: str = "sgd"  # or "adamw"
    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9  # SGD's
    dampening: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    eps: float = 1e-8
    horizon: int | None = None  # rates fall linearly, to 0 at this step
    lr_time: str = "global"  # "local"; "unscaled" and "scaled" are local without a scheduler
    activation_warmup: int = 0
    on_activate: str = "keep"  # "reset_momentum", "reset"

    def factor(self, step: int) -> float:
        """The learning rate's share of ``lr`` at a step of the schedule."""
        return max(0.0, 1 - step / self.horizon) if self.horizon else 1.0


# The network by hand


@dataclass
class Network:
    """Frozen ``W``, ``b`` per module, and the trained ``weights`` of the modules and the head."""

    W: list[Array]  # (d, d)
    b: list[Array]  # (d,)
    weights: dict[Part, dict[str, Array]]  # m: A (r, d), B (d, r); HEAD: U (o, d), c (o,)

    def forward(self, x: Array, present: Sequence[int]) -> tuple[dict[int, Array], list[Array]]:
        """Run the modules in ``present``; return their outputs z and the inputs h of every part."""
        outputs: dict[int, Array] = {}
        inputs = [x]
        for m in present:
            A, B = self.weights[m]["A"], self.weights[m]["B"]
            outputs[m] = inputs[-1] @ (self.W[m] + B @ A).T + self.b[m]
            inputs.append(np.tanh(outputs[m]))
        return outputs, inputs

    def backward(self, inputs: list[Array], target: Array, present: Sequence[int]) -> Gradients:
        """The gradients of every part that took part, active or not."""
        U, c = self.weights[HEAD]["U"], self.weights[HEAD]["c"]
        error = inputs[-1] @ U.T + c - target  # d loss / d out
        gradients: Gradients = {HEAD: {"U": error.T @ inputs[-1], "c": error.sum(axis=0)}}
        dh = error @ U
        for m, x, h in reversed(list(zip(present, inputs[:-1], inputs[1:], strict=True))):
            A, B = self.weights[m]["A"], self.weights[m]["B"]
            dz = dh * (1 - h**2)
            dW = dz.T @ x  # of the sum W + B A
            gradients[m] = {"A": B.T @ dW, "B": dW @ A.T}
            dh = dz @ (self.W[m] + B @ A)
        return gradients


# Who is active next


@dataclass
class Problem:
    """What a selection is made from, and how clearly it was made."""

    y: list[float]  # scores (equation 1)
    C: list[int]  # updates received
    k: int  # how many to choose
    turn: int  # the module at which a cyclic order goes on
    random: random.Random
    gaps: list[float] = field(default_factory=lambda: [math.inf])

    @property
    def y_hat(self) -> list[float]:
        """Equation 2; uniform before any score."""
        total = sum(self.y)
        return [y / total if total else 1 / len(self.y) for y in self.y]

    def decide(self, left: float, right: float, scale: float = 1.0) -> None:
        """Note how far apart two numbers are whose order decides. Equal ones are a tie by rule."""
        if left != right and math.isfinite(left) and math.isfinite(right):
            self.gaps.append(abs(left - right) / scale)

    def ranking(self) -> list[int]:
        """From the most to the least important; ties in forward order, no scores in any order."""
        modules = range(len(self.y))
        if not any(self.y):
            return self.random.sample(modules, len(modules))
        return sorted(modules, key=lambda m: (-self.y[m], m))

    def race(self, weights: Sequence[float]) -> list[int]:
        """The first k of exponential clocks of rate w: k draws in proportion, none twice."""
        clocks = [-math.log1p(-self.random.random()) for _ in weights]

        def key(m: int) -> tuple[float, float]:  # weight 0 comes last, then uniformly
            log = math.log(clocks[m] / weights[m]) if weights[m] else math.inf
            return log, clocks[m]

        order = sorted(range(len(weights)), key=key)
        if self.k < len(order):
            self.decide(key(order[self.k - 1])[0], key(order[self.k])[0])
        return order[: self.k]


def topk(problem: Problem) -> list[int]:
    """The k most important."""
    order, k = problem.ranking(), problem.k
    if k < len(order):
        last, next_ = problem.y[order[k - 1]], problem.y[order[k]]
        problem.decide(last, next_, scale=max(last, next_) or 1.0)
    return order[:k]


def threshold(problem: Problem, share: float) -> list[int]:
    """The fewest of the most important whose y^ sum to ``share``, read as the decimal it says."""
    y = [Fraction(value) for value in problem.y]
    if not any(y):
        y = [Fraction(1)] * len(y)
    order, total = problem.ranking(), sum(y)
    for n in range(1, len(y) + 1):
        held, needed = sum(y[m] for m in order[:n]) / total, Fraction(str(share))
        if held != needed:
            problem.decide(float(held - needed), 0.0)
        if held >= needed:
            break
    if n < len(y) and any(problem.y):
        last, next_ = problem.y[order[n - 1]], problem.y[order[n]]
        problem.decide(last, next_, scale=max(last, next_) or 1.0)
    return order[:n]


def stochastic(problem: Problem) -> list[int]:
    """K draws in proportion to y^."""
    return problem.race(problem.y_hat)


def bernoulli(problem: Problem) -> list[int]:
    """Each with probability y^; if none comes up, one in proportion."""
    y_hat = problem.y_hat
    draws = [problem.random.random() for _ in y_hat]
    for draw, y in zip(draws, y_hat, strict=True):
        problem.decide(draw, y)
    drawn = [m for m, y in enumerate(y_hat) if draws[m] < y]
    if drawn:
        return drawn
    draw, edges = problem.random.random(), np.cumsum(y_hat)
    for edge in edges[:-1]:
        problem.decide(draw, float(edge))
    return [next((m for m, edge in enumerate(edges[:-1]) if draw < edge), len(edges) - 1)]


def discounted(problem: Problem) -> list[int]:
    """K draws in proportion to y^ / C (equation 3); C = 0 counts as 1."""
    pairs = zip(problem.y_hat, problem.C, strict=True)
    return problem.race([y / max(c, 1) for y, c in pairs])


def uniform(problem: Problem) -> list[int]:
    """Any k."""
    return problem.random.sample(range(len(problem.y)), problem.k)


def round_robin(problem: Problem) -> list[int]:
    """The next k in turn, from where the last selection ended."""
    return [(problem.turn + j) % len(problem.y) for j in range(problem.k)]


ALLOCATORS: dict[str, Callable[[Problem], list[int]]] = {
    "topk": topk,
    "stochastic": stochastic,
    "bernoulli": bernoulli,
    "discounted": discounted,
    "random": uniform,
    "round_robin": round_robin,
}


# The loop


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs (n, d), targets (n, o), and the modules that take part in it."""

    x: Array
    target: Array
    present: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One selection: the steps done before it, the scores behind it, and who was chosen."""

    step: int
    scores: list[float]
    chosen: set[int]


class Twin:
    """One run. ``gap`` is the least distance of two numbers whose order decided a selection."""

    def __init__(self, network: Network, settings: Settings) -> None:
        self.network, self.settings = network, settings
        self.modules = range(len(network.W))
        self.active: set[int] = set()
        self.steps = 0
        self.C = [0 for _ in self.modules]
        self.turn = 0
        self.record: list[Entry] = []
        self.gap = math.inf
        # Per module, every number seen, with the period that it was seen in.
        self.seen: list[list[tuple[int, float]]] = [[] for _ in self.modules]
        self.state: dict[Part, dict[str, dict[str, Array]]] = {}  # moments, by part and weight
        self.updates_since_reset: dict[Part, int] = {}
        self.reached = [0 for _ in self.modules]  # the scaled time after the last update
        self.returned: dict[Part, int] = {}  # the step at which a module came back from a pause
        self.reallocate()

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over the sum of the micro-batches' losses."""
        gradients: Gradients = {}
        measure = self.settings.measure if self.steps % self.settings.every == 0 else None
        for batch in batches:
            outputs, inputs = self.network.forward(batch.x, batch.present)
            if measure == "forward":
                for m, z in outputs.items():
                    self.see(m, sum(norm(row, self.settings.p) for row in z))  # equation 1
            for part, new in self.network.backward(inputs, batch.target, batch.present).items():
                if part == HEAD or part in self.active:
                    old = gradients.get(part, dict.fromkeys(new, 0.0))
                    gradients[part] = {name: old[name] + new[name] for name in new}
        if measure == "gradient":
            for m in self.active & gradients.keys():
                whole = np.concatenate([g.ravel() for g in gradients[m].values()])
                self.see(m, norm(whole, self.settings.p))
        for part in gradients:
            self.update(part, gradients[part])
        for m in self.active & gradients.keys():
            self.C[m] += 1
        self.steps += 1
        for m in self.active & gradients.keys():
            self.reached[m] = self.scaled_time(m)
        if self.is_due():
            self.reallocate()

    # Section 3.1: scores

    def see(self, m: int, value: float) -> None:
        """Collect one number that speaks for module m."""
        self.seen[m].append((len(self.record), value))

    def scores(self) -> list[float]:
        """The sum of what was seen (outputs) or its mean (gradients), over the window."""
        by_gradient = self.settings.measure == "gradient"
        y: dict[int, float] = {}
        for m in self.modules:
            if self.seen[m]:
                # A module not seen in this period keeps what the last one says of it.
                latest = self.seen[m][-1][0]
                values = [
                    v for n, v in self.seen[m] if self.settings.window == "run" or n == latest
                ]
                y[m] = math.fsum(values) / (len(values) if by_gradient else 1)
        unseen = math.fsum(y.values()) / len(y) if by_gradient and y else 0.0
        return [y.get(m, unseen) for m in self.modules]

    # Sections 3.2 and 3.3: selection and schedule

    def is_due(self) -> bool:
        """Whether to choose now; all modules are active until the warmup is over."""
        since, period = self.steps - self.settings.warmup, self.settings.period
        if since <= 0:
            return since == 0
        return since == period if self.settings.once else since % period == 0

    def reallocate(self) -> None:
        """Choose the active modules. Those that return may have to forget."""
        y, before, number = self.scores(), self.active, len(self.record)
        self.active = set(self.modules) if self.steps < self.settings.warmup else self.choose(y)
        self.record.append(Entry(self.steps, y, self.active))
        if number == 0:
            return
        for m in self.active - before:
            self.returned[m] = self.steps
            if self.settings.on_activate == "reset":
                self.state.pop(m, None)
                self.updates_since_reset.pop(m, None)
            if self.settings.on_activate == "reset_momentum":
                for moments in self.state.get(m, {}).values():
                    moments["first"] = 0 * moments["first"]

    def choose(self, y: list[float]) -> set[int]:
        """Let the allocator choose by ``y``, with random numbers of (seed, selection)."""
        number, settings = len(self.record), self.settings
        drawer = random.Random(f"{settings.seed}:{number}")
        problem = Problem(y, list(self.C), self.count(), self.turn, drawer)
        self.turn = (self.turn + self.count()) % len(self.modules)
        if settings.allocator == "threshold":
            chosen = threshold(problem, settings.share)
        else:
            chosen = ALLOCATORS[settings.allocator](problem)
        self.gap = min([self.gap, *problem.gaps])
        return set(chosen)

    def count(self) -> int:
        """How many modules ``active`` means."""
        active = self.settings.active
        return active if isinstance(active, int) else max(1, round(active * len(self.modules)))

    def scaled_time(self, m: int) -> int:
        """Updates by the mean share of active modules; at most the steps done, and never less."""
        if not self.C[m]:
            return 0
        time = Fraction(self.C[m] * self.steps * len(self.modules), sum(self.C))
        return max(self.reached[m], round(min(time, self.steps)))

    # Section 3.4: the update, with moments and clocks that stand still while a module pauses

    def rate(self, part: Part) -> float:
        """The learning rate of a part at this step."""
        settings, time = self.settings, self.steps
        if isinstance(part, int) and settings.lr_time in ("local", "unscaled"):
            time = self.C[part]
        if isinstance(part, int) and settings.lr_time == "scaled":
            time = self.scaled_time(part)
        rate = settings.lr * settings.factor(time)
        if part in self.returned and settings.activation_warmup:
            rate *= min(1.0, (self.steps - self.returned[part] + 1) / settings.activation_warmup)
        return rate

    def update(self, part: Part, gradients: dict[str, Array]) -> None:
        """Move the weights of one part."""
        rate, weights = self.rate(part), self.network.weights[part]
        state = self.state.setdefault(part, {})
        self.updates_since_reset[part] = self.updates_since_reset.get(part, 0) + 1
        for name, g in gradients.items():
            moments = state.setdefault(name, {})
            if self.settings.rule == "sgd":
                weights[name] = self.sgd(weights[name], g, moments, rate)
            else:
                t = self.updates_since_reset[part]
                weights[name] = self.adamw(weights[name], g, moments, rate, t)

    def sgd(self, w: Array, g: Array, moments: dict[str, Array], rate: float) -> Array:
        """Momentum begins as the first gradient itself, undampened."""
        settings = self.settings
        g = g + settings.weight_decay * w
        if "first" in moments:
            moments["first"] = settings.momentum * moments["first"] + (1 - settings.dampening) * g
        else:
            moments["first"] = g
        return w - rate * moments["first"]

    def adamw(self, w: Array, g: Array, moments: dict[str, Array], rate: float, t: int) -> Array:
        """Loshchilov & Hutter (2019), algorithm 2; t counts this part's updates."""
        beta1, beta2 = self.settings.betas
        w = w - rate * self.settings.weight_decay * w
        moments["first"] = beta1 * moments.get("first", 0 * g) + (1 - beta1) * g
        moments["second"] = beta2 * moments.get("second", 0 * g) + (1 - beta2) * g**2
        m_hat = moments["first"] / (1 - beta1**t)
        v_hat = moments["second"] / (1 - beta2**t)
        return w - rate * m_hat / (np.sqrt(v_hat) + self.settings.eps)


def norm(values: Array, p: int) -> float:
    """The p-norm of a vector, p in {1, 2}."""
    return float(np.abs(values).sum() if p == 1 else np.sqrt((values**2).sum()))
