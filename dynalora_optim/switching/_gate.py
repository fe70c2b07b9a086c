"""Idle or active without a recompilation: a gate that compiled code reads as it runs.

A flag in Python is part of what torch.compile specialises code for, and every choice of active
modules would be compiled anew. So compiled code takes gradients for all of them, through a gate
that turns those of idle ones into zeros.
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
    """Return an open gate; a tensor of no module, for DDP would send a buffer from rank to rank."""
    return torch.ones((), dtype=torch.bool, device="cpu")


def set_gate(gate: Tensor, is_open: bool) -> None:
    """Open or close ``gate``, also where a graph holds it: what counts is the backward pass."""
    gate.data.fill_(is_open)  # by .data, so that autograd does not take it for a mistake


def needs_gate() -> bool:
    """Whether this is code in the making that gradients will pass through."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled()
