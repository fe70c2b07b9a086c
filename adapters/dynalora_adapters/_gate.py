"""A gate that makes an adapter active or inactive without a recompilation.

torch.compile compiles code again when a Python flag that it has read changes its value. With such
a flag, each new set of active adapters would be compiled again. So compiled code computes the
gradients of all adapters. Each gradient passes through a gate, a tensor that is read at run time.
The gate of an inactive adapter replaces the gradient by zeros.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, param: Tensor, is_open: Tensor) -> Tensor:
        ctx.save_for_backward(is_open)
        return param.view_as(param)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (is_open,) = ctx.saved_tensors
        return torch.where(is_open, gradient, torch.zeros_like(gradient)), None


def gated(param: Tensor, is_open: Tensor) -> Tensor:
    """Return ``param``, whose gradient is zero unless ``is_open``, a bool scalar on the CPU."""
    return cast(Tensor, _Gate.apply(param, is_open))  # type: ignore[no-untyped-call]


def new_gate() -> Tensor:
    """Return an open gate. It is not a buffer, because DDP copies buffers from rank 0 to all."""
    return torch.ones((), dtype=torch.bool, device="cpu")


def set_gate(gate: Tensor, is_open: bool) -> None:
    """Open or close ``gate``. A graph that exists already reads the new value in its backward."""
    gate.data.fill_(is_open)  # .data: otherwise autograd would report an in-place change


def needs_gate() -> bool:
    """Whether torch.compile is compiling this code, with gradients enabled."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled()
