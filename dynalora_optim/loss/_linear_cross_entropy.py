"""`linear_cross_entropy`: checks its arguments, and divides the sum of the rows.

The logits exist for one chunk of rows at a time. In float32 they take 4 x chunk x classes bytes,
and twice that if the head is not a plain linear layer. The gradients are formed with them, in the
forward pass, and only those that are needed: none under `torch.no_grad`. The loss and the gradients
of parameters are summed in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from dynalora_optim._base.checks import whole_number
from dynalora_optim.loss._chunks import ChunkedLoss, ModuleHead, PlainHead, Task
from dynalora_optim.loss._head import is_plain, mixing

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module | Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    transform: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 256,
) -> Tensor:
    """Return ``cross_entropy(head(hidden), labels)`` in float32, or float64 for float64.

    Args:
        hidden: What the head gets, (..., features).
        head: `nn.Linear`, another module that maps each row by itself, such as one with an adapter,
            or a weight, (classes, features).
        labels: The class of each row, (...), int64. They are not shifted.
        bias: (classes,), with a weight.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for (...), with a head that does not train.
        ignore_index: Rows with this label do not count; if no row counts, the loss is 0.
        label_smoothing: As in `torch.nn.functional.cross_entropy`.
        transform: A function of the logits of single rows, such as a soft cap.
        chunk: Rows whose logits exist at one time.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: A value or a shape is not allowed.
    """
    _check_options(reduction, label_smoothing, chunk)
    _check_tensors(hidden, labels)
    rows, flat, each = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), reduction == "none"
    grad = torch.is_grad_enabled()
    part = _head(head, bias, hidden, trains=not (each and grad))
    task = Task(part, transform, flat, ignore_index, label_smoothing, chunk, each, grad)
    loss = cast(Tensor, ChunkedLoss.apply(task, rows, *part.parameters.values()))  # type: ignore[no-untyped-call]
    if reduction != "mean":
        return loss.view(labels.shape) if each else loss
    return loss / (flat != ignore_index).sum().clamp(min=1).to(loss.device)


def _head(
    head: nn.Module | Tensor, bias: Tensor | None, hidden: Tensor, *, trains: bool
) -> PlainHead | ModuleHead:
    """Return the head as a part of a `Task`; with ``trains=False`` it must not train."""
    found: PlainHead | ModuleHead
    if isinstance(head, nn.Module):
        if bias is not None:
            raise ValueError("bias goes with a weight, but head is a module; leave bias out.")
        reason = mixing(head, hidden)
        if reason:
            raise ValueError(
                f"head={type(head).__name__} {reason}, and chunks need a module that maps each "
                "row by itself; use torch.nn.functional.cross_entropy(head(hidden), labels)."
            )
        plain = isinstance(head, nn.Linear) and is_plain(head)
        found = PlainHead(head.weight, head.bias) if plain else ModuleHead(head)  # type: ignore[arg-type]
    elif not isinstance(head, Tensor):
        raise TypeError(
            f"head={type(head).__name__} is neither a module nor a weight; pass nn.Linear, or its "
            "weight."
        )
    elif head.ndim != 2:
        raise ValueError(
            f"head of shape {tuple(head.shape)} must be a weight, (classes, features); pass "
            "nn.Linear, or its weight."
        )
    else:
        found = PlainHead(head, bias)
    if not trains and any(p.requires_grad for p in found.parameters.values()):
        raise ValueError(
            "reduction='none' is for a head that does not train: the gradient of its weights is "
            "summed over the rows in the forward pass; pass 'sum' or 'mean', or freeze the head."
        )
    return found


def _check_options(reduction: str, label_smoothing: float, chunk: int) -> None:
    whole_number("chunk", chunk, least=1, of="rows")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; pass one of {REDUCTIONS}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"label_smoothing={label_smoothing!r} must be a share of the target in [0, 1]; pass 0 "
            "for none."
        )


def _check_tensors(hidden: Tensor, labels: Tensor) -> None:
    if not (isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.ndim):
        raise TypeError(
            f"hidden={_described(hidden)} must be a floating-point tensor, (..., features); pass "
            "what the head would get."
        )
    if not (isinstance(labels, Tensor) and labels.dtype == torch.int64):
        raise TypeError(
            f"labels={_described(labels)} must be int64, the class of each row; pass labels.long()."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} must have one class for each row of hidden, "
            f"{tuple(hidden.shape)}; pass labels of shape {tuple(hidden.shape[:-1])}."
        )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor of {value.dtype}, {tuple(value.shape)}"
    return type(value).__name__
