"""Deleting, removing and replacing gradients of parameters while modules are switched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dynalora_optim._base.collectives import is_sharded, world_size


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Set ``grad`` to None; with zeros, momentum and weight decay would still change weights."""
    for parameter in parameters:
        parameter.grad = None


def set_aside(parameter: Tensor) -> Tensor | None:
    """Remove the gradient of ``parameter`` and return it, before DDP reads it.

    DDP would average it over all ranks. With several ranks zeros replace it, as in DDP itself if a
    gradient is missing. Without these, a static graph would always treat the parameter as unused.
    """
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None and world_size() > 1 and not is_sharded(gradient):
        parameter.grad = torch.zeros_like(gradient)
    return gradient


@contextmanager
def temporary_gradients(gradients: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Give parameters these gradients within this context."""
    before = {parameter: parameter.grad for parameter in gradients}
    try:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        yield
    finally:
        for parameter, former in before.items():
            parameter.grad = former
