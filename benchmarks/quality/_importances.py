"""Two importances that might be better than a random choice when few modules are active.

They are also examples of how to write a measure and an allocator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dynalora_optim import AllocationContext


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
