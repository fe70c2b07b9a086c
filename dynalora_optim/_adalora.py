"""peft's AdaLoRA, whose rank allocator scores the gradients of all modules at each step.

``update_and_allocate(step)`` multiplies each adapter parameter by its gradient, and an inactive
module has none. So its scores stay as they are until it is active again. This file knows the
allocator by its methods, and does not import peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_METHOD = "update_ipt"


class _Trained:
    """The parameters of a model that have a gradient."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._named = [(name, p) for name, p in named if p.grad is not None]

    def __bool__(self) -> bool:
        return bool(self._named)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._named)


class _Update:
    """The allocator's ``update_ipt``, for the parameters that have a gradient."""

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator

    def __call__(self, model: nn.Module) -> None:
        allocator = self._allocator
        trained = _Trained(model.named_parameters())
        if not trained and allocator.ipt:
            return  # a reallocation in step() has left no gradient of a module that is active now
        # Without any gradient at first, peft's own error is right: zero_grad() came too early.
        type(allocator).update_ipt(allocator, trained or model)
        for name, parameter in model.named_parameters():
            ours = "lora_" in name and allocator.adapter_name in name
            if ours and name not in allocator.ipt:
                self._begin(name, parameter)

    def _begin(self, name: str, parameter: Tensor) -> None:
        """Give a parameter that was never active the mean scores of the others of its kind."""
        kind = next(part for part in name.split(".") if part.startswith("lora_"))
        for scores in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            known = getattr(self._allocator, scores)
            means = [value.mean() for other, value in known.items() if kind in other.split(".")]
            mean = torch.stack(means).mean() if means else torch.zeros(())
            known[name] = torch.zeros_like(parameter) + mean.to(parameter.device)


def score_active_modules(model: nn.Module) -> None:
    """Let AdaLoRA's allocators in ``model`` score active modules only."""
    for allocator in _allocators(model):
        setattr(allocator, _METHOD, _Update(allocator))


def score_all_modules(model: nn.Module) -> None:
    """Undo `score_active_modules`."""
    for allocator in _allocators(model):
        vars(allocator).pop(_METHOD, None)


def _allocators(model: nn.Module) -> list[Any]:
    found = (vars(module).get("rankallocator") for module in model.modules())
    return [allocator for allocator in found if callable(getattr(type(allocator), _METHOD, None))]
