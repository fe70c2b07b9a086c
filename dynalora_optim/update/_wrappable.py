"""Which optimizers can be wrapped."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch.optim import Optimizer

from dynalora_optim._base.claims import is_owner


def check_wrappable(optimizer: object) -> None:
    """Raise unless ``optimizer`` can be wrapped.

    Raises:
        TypeError: It is not a torch optimizer.
        ValueError: It wraps another optimizer, evaluates the loss itself, or has one state for all
            parameters together.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is not a torch.optim.Optimizer; pass an instance such as "
            "torch.optim.AdamW(model.parameters(), lr=4e-4). Of several optimizers, wrap each by "
            "itself."
        )
    kind = type(optimizer).__name__
    if is_owner(optimizer):
        raise ValueError(
            f"optimizer={kind} already wraps another optimizer; pass that one instead, or use "
            "this one as it is."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer=LBFGS keeps one state over all parameters together, so modules cannot be "
            "active one by one; pass a per-parameter optimizer such as AdamW."
        )
    _check_alone(optimizer, kind)
    _check_closure(optimizer, kind)


def _check_alone(optimizer: Optimizer, kind: str) -> None:
    """Raise if ``optimizer`` changes the weights through another optimizer."""
    inner = optimizers_within(optimizer)
    if inner or "param_groups" not in vars(optimizer):
        where = f" in its attribute {next(iter(inner))!r}" if inner else ""
        raise ValueError(
            f"optimizer={kind} itself wraps an optimizer{where}, so that it cannot be given the "
            "groups of active modules. Build it the other way round: wrap the inner optimizer in "
            "DynamicAllocationOptimizer, and pass the result to what wraps it (Lookahead, "
            "accelerator.prepare)."
        )


def optimizers_within(optimizer: Optimizer) -> dict[str, list[Optimizer]]:
    """Return the optimizers that ``optimizer`` has as attributes, by the attribute."""
    found = {
        name: [item for item in _items(value) if isinstance(item, Optimizer)]
        for name, value in vars(optimizer).items()
    }
    return {name: inner for name, inner in found.items() if inner}


def _items(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else (value,)


def _check_closure(optimizer: Optimizer, kind: str) -> None:
    """Raise if ``optimizer`` evaluates the loss itself, at weights of its own choice."""
    parameters = inspect.signature(type(optimizer).step).parameters
    closure = parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer={kind} evaluates the loss itself in step(closure), at more than one point, "
            "so that modules cannot be active one by one; pass an optimizer such as AdamW."
        )
