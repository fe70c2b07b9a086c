"""Switching between idle and active without a recompilation, by a gate in the compiled code.

torch.compile specialises code for the value of a Python flag, so that it would recompile for every
choice of active modules. So compiled code computes gradients for all modules, through a gate that
it reads at run time, and that replaces the gradients of idle modules with zeros.
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
    """Return ``param`` with a gradient of zeros unless ``is_open``, a bool scalar on the CPU."""
    return cast(Tensor, _Gate.apply(param, is_open))  # type: ignore[no-untyped-call]


def new_gate() -> Tensor:
    """Return an open gate; it is not a buffer of a module, because DDP would broadcast it."""
    return torch.ones((), dtype=torch.bool, device="cpu")


def set_gate(gate: Tensor, is_open: bool) -> None:
    """Open or close ``gate``; this also changes the backward pass of graphs that hold it."""
    gate.data.fill_(is_open)  # by .data: autograd reports other in-place changes as an error


def needs_gate() -> bool:
    """Return whether torch.compile traces this code now, with gradients enabled."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled()
