"""Hooks and settings of the model as a whole, in place while an optimizer drives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim.groups._blocks import Block, outside
from dynalora_optim.switching._input_cut import InputCut


class ModelHooks:
    """Ends the graph before the first block, and turns off the model's key-value cache.

    Args:
        model: The adapted model.
        blocks: Its blocks; there may be none.
        recomputes: Whether some blocks will be recomputed; the cache is turned off only then.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], *, recomputes: bool) -> None:
        self._model = model
        self._blocks = blocks
        self._recomputes = recomputes
        self._handles: list[RemovableHandle] = []
        self._caching: list[Any] = []

    def attach(self) -> None:
        """Set the hooks and settings; a copy of the model contains them too."""
        self.close()
        if self._blocks:
            rest = list(outside(self._model, self._blocks))
            cut = InputCut([block.module for block in self._blocks], rest)
            first = self._blocks[0].module
            self._handles.append(first.register_forward_pre_hook(cut, with_kwargs=True))
        if self._recomputes:
            self._caching = _caching_configs(self._model)
            for config in self._caching:
                config.use_cache = False

    def close(self) -> None:
        """Remove the hooks, and turn the cache on again."""
        for handle in self._handles:
            handle.remove()
        for config in self._caching:
            config.use_cache = True
        self._handles, self._caching = [], []


def _caching_configs(model: nn.Module) -> list[Any]:
    """Return the configs that make a training forward hold every block's keys and values."""
    configs = (getattr(module, "config", None) for module in model.modules())
    caching = {id(c): c for c in configs if getattr(c, "use_cache", False) is True}
    return list(caching.values())
