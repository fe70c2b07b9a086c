"""`linear_cross_entropy`: checks its arguments, and divides the sum of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from dynalora_optim._base.checks import whole_number
from dynalora_optim._base.torch_private import forward_hooks, forward_pre_hooks
from dynalora_optim.loss._chunks import ChunkedLoss, ModuleHead, PlainHead, Task

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
    """Return ``cross_entropy(head(hidden), labels)`` without the logits of all rows at once.

    The logits exist for ``chunk`` rows at a time, and the gradients are formed with them, in the
    forward pass: without gradients (`torch.no_grad`) none are. The loss and the gradients of
    parameters are summed in float32 (float64 for float64), and rounded once.

    Args:
        hidden: What the head gets, (..., features).
        head: `nn.Linear`, or any module that maps each row by itself, such as a linear layer with
            an adapter or a quantised one. Or its weight, (classes, features).
        labels: The class of each row, (...), int64. They are not shifted: for a language model,
            pass ``hidden[:, :-1]`` and ``labels[:, 1:]``.
        bias: (classes,), with a weight.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"``, which
            returns (...), for a head that does not train.
        ignore_index: Rows with this label do not count. If all have it, the loss is 0, and the
            gradients are.
        label_smoothing: As in `torch.nn.functional.cross_entropy`.
        transform: A function of the logits of single rows, such as a soft cap:
            ``lambda logits: 30 * torch.tanh(logits / 30)``.
        chunk: Rows whose logits exist at one time. They take ``4 chunk classes`` bytes, twice that
            if the head is another module than `nn.Linear`, or with a ``transform``.

    Returns:
        The loss, in float32 (float64 for float64): a scalar unless ``reduction="none"``.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: A value or a shape is not allowed.

    Example:
        >>> loss = linear_cross_entropy(hidden, model.head, labels)  # doctest: +SKIP
        >>> loss.backward()  # doctest: +SKIP
    """
    _check_options(reduction, label_smoothing, chunk)
    _check_tensors(hidden, labels)
    part = _head(head, bias)
    parameters = list(part.parameters.values())
    if reduction == "none" and torch.is_grad_enabled():
        _check_frozen(parameters)
    task = Task(
        head=part,
        transform=transform,
        labels=labels.reshape(-1),
        ignore_index=ignore_index,
        smoothing=label_smoothing,
        chunk=chunk,
        each=reduction == "none",
        differentiable=torch.is_grad_enabled(),
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = cast(Tensor, ChunkedLoss.apply(task, rows, *parameters))  # type: ignore[no-untyped-call]
    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss
    return loss / (task.labels != ignore_index).sum().clamp(min=1).to(loss.device)


def is_plain(head: nn.Module) -> bool:
    """Whether calling ``head`` does nothing but multiply with its dense weight."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in (Tensor, nn.Parameter)
        and "forward" not in vars(head)  # as accelerate replaces it
        and not forward_hooks(head)
        and not forward_pre_hooks(head)
    )


def _head(head: nn.Module | Tensor, bias: Tensor | None) -> PlainHead | ModuleHead:
    if isinstance(head, nn.Module):
        if bias is not None:
            raise ValueError("bias goes with a weight, but head is a module; leave bias out.")
        if is_plain(head):
            return PlainHead(head.weight, head.bias)  # type: ignore[arg-type]
        return ModuleHead(head)
    if not isinstance(head, Tensor):
        raise TypeError(
            f"head={type(head).__name__} is neither a module nor a weight; pass nn.Linear, or its "
            "weight."
        )
    if head.ndim != 2:
        raise ValueError(
            f"head of shape {tuple(head.shape)} must be a weight, (classes, features); pass "
            "nn.Linear, or its weight."
        )
    return PlainHead(head, bias)


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


def _check_frozen(parameters: list[Tensor]) -> None:
    if any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "reduction='none' is for a head that does not train: the gradient of its weights is "
            "summed over the rows in the forward pass; pass 'sum' or 'mean', or freeze the head."
        )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor of {value.dtype}, {tuple(value.shape)}"
    return type(value).__name__
