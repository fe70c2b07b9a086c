"""Calling a listener before and after each training forward, which autocast keeps no casts of.

Autocast keeps its cast of each parameter that trains until it ends, be it after the forward or
after the backward pass. Where whole blocks train, these casts take half as much as their weights,
and which of them are alive when does not follow from a plan. Without this cache each product casts
its weight itself, with the same result, and what its backward needs is held by its graph alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim.groups._blocks import Block, in_lists
from dynalora_optim.switching._recompute import autocast_keeps_casts


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
        self._is_off = False  # autocast's cache, which was on

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if listener := self._listening(module):
            listener.before_forward(args, kwargs)
            self._is_off = False
            self._turn_off()

    def before_list(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listening(module):  # the model's forward may have an autocast of its own
            self._turn_off()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if listener := self._listening(module):
            listener.after_forward(output)
            if self._is_off:  # after an error the end of autocast turns it on
                torch.set_autocast_cache_enabled(True)

    def _turn_off(self) -> None:
        if autocast_keeps_casts():
            torch.set_autocast_cache_enabled(False)
            self._is_off = True

    def _listening(self, module: nn.Module) -> ForwardListener | None:
        if torch.compiler.is_compiling():
            return None  # compiled code cannot be measured; the first step() raises an error
        trains = module.training and torch.is_grad_enabled()
        return self._listener() if self._listener and trains else None

    def __reduce__(self) -> tuple[type[_Announce], tuple[()]]:
        return _Announce, ()


def announce(
    model: nn.Module, blocks: Sequence[Block], listener: ForwardListener
) -> list[RemovableHandle]:
    """Call ``listener``, kept by a weak reference, around each training forward of ``model``.

    ``blocks``: its blocks, from whose first ones on autocast keeps no casts.
    """
    hook = _Announce(listener)
    lists = [found[0].module for found in in_lists(blocks)]
    return [
        model.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True),
        model.register_forward_hook(hook.after),
        *(block.register_forward_pre_hook(hook.before_list) for block in lists),
    ]
