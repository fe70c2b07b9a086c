"""Calling a listener before each training forward."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class BeforeForward(Protocol):
    """A listener that is called before each training forward."""

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle the arguments with which the model is about to be called."""
        ...


class _Announce:
    """Pre-hook of the model, with a weak reference to the listener; its copies have none."""

    def __init__(self, driver: BeforeForward | None = None) -> None:
        self._driver = weakref.ref(driver) if driver else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # compiled code cannot be measured; the first step() raises an error
        driver = self._driver() if self._driver else None
        if driver and module.training and torch.is_grad_enabled():
            driver.before_forward(args, kwargs)

    def __reduce__(self) -> tuple[type[_Announce], tuple[()]]:
        return _Announce, ()


def announce(model: nn.Module, listener: BeforeForward) -> RemovableHandle:
    """Call ``listener``, kept by a weak reference, before each training forward of ``model``."""
    hook = _Announce(listener)
    return model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
