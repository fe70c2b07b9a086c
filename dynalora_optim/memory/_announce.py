"""Telling of a training forward before it runs."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class BeforeForward(Protocol):
    """What is told of a forward pass before it runs."""

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to be called so."""
        ...


class _Announce:
    """Pre-hook of the model: tells the driver, without owning it, and alone in this process."""

    def __init__(self, driver: BeforeForward | None = None) -> None:
        self._driver = weakref.ref(driver) if driver else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # nothing can be measured within; the first step says so
        driver = self._driver() if self._driver else None
        if driver and module.training and torch.is_grad_enabled():
            driver.before_forward(args, kwargs)

    def __reduce__(self) -> tuple[type[_Announce], tuple[()]]:
        return _Announce, ()


def announce(model: nn.Module, listener: BeforeForward) -> RemovableHandle:
    """Tell ``listener``, which is not owned, of each training forward of ``model``."""
    hook = _Announce(listener)
    return model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
