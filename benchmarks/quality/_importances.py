"""Importances and draws that might be better than a random choice when few modules are active.

They are also examples of how to write a measure and an allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dynalora_optim import AllocationContext, RoundRobin


@dataclass(frozen=True)
class ExpectedDecrease:
    """The decrease of the loss in a step of Adam, to first order, divided by the learning rate.

    Adam changes a weight by lr g / sqrt(v), where v is the running mean of g^2. So the loss
    decreases by lr times the sum of g^2 / sqrt(v). This is a norm of the gradient, normalised by
    the module's own second moment. In the first step of a module it is the 1-norm of its gradient.

    Attributes:
        beta: Decay of v.
    """

    beta: float = 0.99
    _moments: WeakTensorKeyDictionary = field(  # parameter -> (v, its sum of weights)
        default_factory=WeakTensorKeyDictionary, repr=False, compare=False
    )

    def score_gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the sum over the adapter's weights of g^2 / sqrt(v)."""
        terms = [self._decrease(p, p.grad) for p in parameters if p.grad is not None]
        return torch.stack(terms).sum()

    def _decrease(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        square: Tensor = gradient.detach().float() ** 2
        moment, weight = torch.zeros_like(square), 0.0
        if parameter in self._moments:
            moment, weight = self._moments[parameter]
        moment = self.beta * moment + (1 - self.beta) * square
        weight = self.beta * weight + (1 - self.beta)  # Adam's bias correction
        self._moments[parameter] = (moment, weight)
        decrease: Tensor = (square / (moment / weight).sqrt().clamp_min(1e-12)).sum()
        return decrease


@dataclass(frozen=True)
class UpperConfidence:
    """Modules with the largest upper confidence bound: a bandit with an exploration bonus.

    The index of a module is y^ / max y^ + c sqrt(2 ln t / n), where t is the number of updates of
    all modules so far and n that of this module. A module without updates comes first.

    Attributes:
        exploration: c.

    Source: UCB1 (Auer, Cesa-Bianchi and Fischer, 2002), with scores in place of rewards.
    """

    exploration: float = 0.5

    def select(self, context: AllocationContext) -> list[int]:
        """Return the modules with the largest index; equal ones in the order of the ranking."""
        most = max(context.importance)
        total = max(sum(context.updates), 2)

        def index(m: int) -> float:
            n = context.updates[m]
            bonus = math.sqrt(2 * math.log(total) / n) if n else math.inf
            return context.importance[m] / most + self.exploration * bonus

        return sorted(context.ranking(), key=index, reverse=True)[: context.active]


@dataclass(frozen=True)
class RootMeanSquare:
    """The root of the mean squared gradient of a module, which does not grow with its size.

    Source: GRASS (arXiv 2604.07808); MISA (arXiv 2511.00056) uses its square.
    """

    def score_gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the root of the mean over all elements of all gradients."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        squares = torch.stack([gradient.detach().float().square().sum() for gradient in gradients])
        return (squares.sum() / sum(map(Tensor.numel, gradients))).sqrt()


@dataclass(frozen=True)
class Alignment:
    """How much a gradient points where its running mean does: their cosine, mapped to [0, 1].

    Attributes:
        beta: Decay of the running mean.

    Source: Magma (arXiv 2602.15322).
    """

    beta: float = 0.9
    _means: WeakTensorKeyDictionary = field(
        default_factory=WeakTensorKeyDictionary, repr=False, compare=False
    )

    def score_gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return (1 + cosine) / 2 over all gradients of the module; 1 the first time."""
        terms = [self._sums(p, p.grad.detach().float()) for p in parameters if p.grad is not None]
        product, mean, gradient = torch.stack(terms).sum(0)
        cosine: Tensor = product / (mean * gradient).sqrt().clamp_min(1e-30)
        return (1 + cosine) / 2

    def _sums(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return <m, g>, <m, m> and <g, g>, and move the mean m towards g."""
        mean: Tensor = self._means.get(parameter, gradient)  # type: ignore[no-untyped-call]
        self._means[parameter] = self.beta * mean + (1 - self.beta) * gradient
        pairs = ((mean, gradient), (mean, mean), (gradient, gradient))
        return torch.stack([(a * b).sum() for a, b in pairs])


@dataclass(frozen=True)
class Softmax:
    """Draws modules, one after the other, with weights exp(y / (T mean y)).

    Dividing by the mean makes the temperature T independent of the scale of the scores. A high T
    draws uniformly; a low one draws the most important modules.

    Attributes:
        temperature: T.

    Source: GRASS (arXiv 2604.07808), MISA (arXiv 2511.00056).
    """

    temperature: float = 1.0

    def weights(self, context: AllocationContext) -> list[float]:
        """Return exp((y^ - max y^) M / T) for M modules, whose mean y^ is 1 / M."""
        top, modules = max(context.importance), len(context.importance)
        return [math.exp((y - top) * modules / self.temperature) for y in context.importance]

    def select(self, context: AllocationContext) -> list[int]:
        """Return the modules that are drawn."""
        return context.sample(self.weights(context))


# Short names of what is not in dynalora_optim, or has other settings there.
ALLOCATORS: dict[str, Callable[..., Any]] = {
    "bandit": UpperConfidence,
    "softmax": Softmax,
    "shuffled": partial(RoundRobin, "random"),
}
MEASURES: dict[str, Callable[[], Any]] = {
    "decrease": ExpectedDecrease,
    "rms": RootMeanSquare,
    "alignment": Alignment,
}
