"""Wraps every torch optimizer that a program builds by ours, with all modules active.

``sitecustomize.py`` in a folder of its own imports this in each process that has the folder on its
path, before accelerate's own tests run. They build optimizers as ``torch.optim.AdamW(parameters)``;
the model is found as the module that holds these parameters.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

NAMES = ("AdamW", "Adam", "SGD")


def model_of(parameters: list[torch.Tensor]) -> nn.Module | None:
    """Return the largest module that holds all ``parameters``."""
    wanted = set(map(id, parameters))
    found = [
        module
        for module in gc.get_objects()
        if issubclass(type(module), nn.Module) and wanted <= set(map(id, module.parameters()))
    ]
    return max(found, key=lambda module: len(list(module.modules())), default=None)


def group_of(name: str, module: nn.Module) -> str | None:
    """Make each module with parameters of its own a group."""
    return (name or "root") if any(True for _ in module.parameters(recurse=False)) else None


def wrapping(rule: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that is called like the class ``rule``."""

    def build(params: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        from dynalora_optim import DynamicAllocationOptimizer

        inner = rule(params, *args, **kwargs)
        held = [p for group in inner.param_groups for p in group["params"]]
        model = model_of(held)
        if model is None:  # accelerate itself builds one over a dummy parameter
            return inner
        if log := os.environ.get("DYNALORA_WRAPPED"):
            with Path(log).open("a") as file:
                file.write(f"{rule.__name__}\n")
        return DynamicAllocationOptimizer(inner, model, active=1.0, groups=group_of)

    return build


def install() -> None:
    """Replace torch's optimizers in this process."""
    for name in NAMES:
        setattr(torch.optim, name, wrapping(getattr(torch.optim, name)))
