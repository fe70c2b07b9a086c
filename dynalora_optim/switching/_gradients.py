"""The only writer of ``grad``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dynalora_optim._base.collectives import is_sharded, world_size


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Set ``grad`` to None: a zero gradient would leave momentum and weight decay at work."""
    for parameter in parameters:
        parameter.grad = None


def set_aside(parameter: Tensor) -> Tensor | None:
    """Take the gradient of ``parameter`` away and return it, before DDP looks for it.

    DDP would send it, and put the mean over all ranks in its place. It finds zeros, as it makes
    where there is no gradient: without any, a static graph would take the parameter for unused for
    ever.
    """
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None and world_size() > 1 and not is_sharded(gradient):
        parameter.grad = torch.zeros_like(gradient)
    return gradient


@contextmanager
def temporary_gradients(gradients: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let parameters have these gradients for a moment."""
    before = {parameter: parameter.grad for parameter in gradients}
    try:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        yield
    finally:
        for parameter, former in before.items():
            parameter.grad = former
