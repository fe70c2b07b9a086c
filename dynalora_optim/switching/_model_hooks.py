"""Hooks and settings of the model as a whole, in place while an optimizer drives it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim.groups._blocks import Block, in_lists, outside
from dynalora_optim.switching._input_cut import CallersTensors, InputCut


class ModelHooks:
    """Ends the graph before the first block of each list; keeps training from filling a cache.

    Training never reads the key-value cache, which would hold the keys and values of every block.

    Args:
        model: The adapted model.
        blocks: Its blocks; there may be none.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._model = model
        self._blocks = blocks
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Set the hooks; a copy of the model contains them too."""
        self.close()
        if self._blocks:
            self._handles += self._cuts()
        for module in filter(_fills_cache, self._model.modules()):
            self._handles.append(module.register_forward_pre_hook(_without_cache, with_kwargs=True))

    def _cuts(self) -> Iterator[RemovableHandle]:
        """Register the hooks that end the graph."""
        callers = CallersTensors()
        yield self._model.register_forward_pre_hook(callers.enter, with_kwargs=True)
        yield self._model.register_forward_hook(callers.leave, always_call=True)
        for blocks in in_lists(self._blocks):
            rest = list(outside(self._model, blocks))  # another list may come before this one
            cut = InputCut([block.module for block in blocks], rest, callers)
            first = blocks[0].module
            yield first.register_forward_pre_hook(cut.enter, with_kwargs=True)
            yield first.register_forward_hook(cut.leave)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _without_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Ask a transformers model for no cache in training; this is its forward pre-hook."""
    is_unasked = kwargs.get("use_cache") is None
    if torch.compiler.is_compiling() or not (
        module.training and torch.is_grad_enabled() and is_unasked
    ):
        return None
    return args, {**kwargs, "use_cache": False}


def _fills_cache(module: nn.Module) -> bool:
    """Return whether a forward of ``module`` fills a key-value cache unless it is told not to."""
    if getattr(getattr(module, "config", None), "use_cache", False) is not True:
        return False
    return "use_cache" in inspect.signature(type(module).forward).parameters
