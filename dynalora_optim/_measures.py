"""What makes a module important: measures that turn one forward pass into one number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class ImportanceMeasure(Protocol):
    """Scores one forward pass of one module."""

    def score(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return a scalar tensor on the output's device; it is summed over forward passes."""
        ...


@dataclass(frozen=True)
class ForwardNorm:
    """The summed p-norms of a module's output rows (equation 1).

    y = sum over samples x of ||(W + dW) x||_p, where a sample is one token: one row of the
    module's output, base and adapter together. Summed in float32.

    Raises:
        ValueError: ``p`` is neither 1 nor 2.
    """

    p: int = 2

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ValueError(f"ForwardNorm(p={self.p!r}): the paper's norms are p=1 and p=2.")

    def score(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return the sum over the rows of ``output``, shape (..., d), of their p-norm."""
        norms: Tensor = torch.linalg.vector_norm(output, self.p, dim=-1, dtype=torch.float32)
        return norms.sum()


MEASURES: dict[str, Callable[[], ImportanceMeasure]] = {"forward": ForwardNorm}


def as_measure(importance: str | ImportanceMeasure) -> ImportanceMeasure:
    """Return ``importance`` itself, or the default measure behind its short name.

    Raises:
        ValueError: An unknown short name.
        TypeError: Neither a name nor an object with ``score``.
    """
    if isinstance(importance, str):
        if importance not in MEASURES:
            raise ValueError(
                f"importance={importance!r} is not a known measure; pass one of "
                f"{sorted(MEASURES)} or an object with score(module, output)."
            )
        return MEASURES[importance]()
    if isinstance(importance, ImportanceMeasure) and not isinstance(importance, type):
        return importance
    raise TypeError(
        f"importance={importance!r} is neither a short name nor a measure; pass one of "
        f"{sorted(MEASURES)} or an object with score(module, output) -> scalar tensor."
    )
