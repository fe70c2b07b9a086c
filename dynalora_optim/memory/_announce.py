"""Calling a listener before and after each training forward."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardListener(Protocol):
    """A listener that is called before and after each training forward."""

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle the arguments with which the model is about to be called."""
        ...

    def after_forward(self, output: Any) -> None:
        """Handle what the model has returned."""
        ...


class _Announce:
    """Hooks of the model, with a weak reference to the listener; their copies have none."""

    def __init__(self, listener: ForwardListener | None = None) -> None:
        self._listener = weakref.ref(listener) if listener else None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if listener := self._listening(module):
            listener.before_forward(args, kwargs)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if listener := self._listening(module):
            listener.after_forward(output)

    def _listening(self, module: nn.Module) -> ForwardListener | None:
        if torch.compiler.is_compiling():
            return None  # compiled code cannot be measured; the first step() raises an error
        trains = module.training and torch.is_grad_enabled()
        return self._listener() if self._listener and trains else None

    def __reduce__(self) -> tuple[type[_Announce], tuple[()]]:
        return _Announce, ()


def announce(model: nn.Module, listener: ForwardListener) -> list[RemovableHandle]:
    """Call ``listener``, kept by a weak reference, around each training forward of ``model``."""
    hook = _Announce(listener)
    return [
        model.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True),
        model.register_forward_hook(hook.after),
    ]
