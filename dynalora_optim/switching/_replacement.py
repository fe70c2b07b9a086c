"""Temporarily replaced parameters: the tensors that are in their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

from dynalora_optim._base.torch_private import parameter_slots

Replacement: TypeAlias = (
    "tuple[nn.Module, str, Tensor | None]"  # the tensor that replaces owner.attribute
)


def replaced_parameters(module: nn.Module) -> list[Replacement]:
    """Return the tensors that replace parameters of ``module`` now."""
    return [
        (owner, attribute, tensor)
        for owner in module.modules()
        for attribute, tensor in parameter_slots(owner).items()
        if tensor is not None and not isinstance(tensor, nn.Parameter)
    ]


@contextmanager
def in_place(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Put ``replacements`` into their places within this context."""
    before = [parameter_slots(owner)[attribute] for owner, attribute, _ in replacements]
    for owner, attribute, tensor in replacements:
        parameter_slots(owner)[attribute] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for (owner, attribute, _), parameter in zip(replacements, before, strict=True):
            parameter_slots(owner)[attribute] = parameter
