"""Tensors that temporarily stand in the places of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

Replacement: TypeAlias = (
    "tuple[nn.Module, str, Tensor | None]"  # what stands in owner._parameters[attribute]
)


def replaced_parameters(module: nn.Module) -> list[Replacement]:
    """Return what stands in the places of parameters of ``module`` now."""
    return [
        (owner, attribute, tensor)
        for owner in module.modules()
        for attribute, tensor in owner._parameters.items()
        if tensor is not None and not isinstance(tensor, nn.Parameter)
    ]


@contextmanager
def in_place(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Put ``replacements`` into their places for a while."""
    before = [owner._parameters[attribute] for owner, attribute, _ in replacements]
    for owner, attribute, tensor in replacements:
        owner._parameters[attribute] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for (owner, attribute, _), parameter in zip(replacements, before, strict=True):
            owner._parameters[attribute] = parameter
