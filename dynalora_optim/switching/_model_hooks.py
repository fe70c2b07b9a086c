"""Hooks and settings of the model as a whole, in place while an optimizer drives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim.groups._blocks import Block, outside
from dynalora_optim.switching._input_cut import CallersTensors, InputCut


class ModelHooks:
    """Ends the graph before the first block of each list, and turns off the key-value cache.

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
            self._handles += self._cuts()
        if self._recomputes:
            self._caching = _caching_configs(self._model)
            for config in self._caching:
                config.use_cache = False

    def _cuts(self) -> Iterator[RemovableHandle]:
        """Register the hooks that end the graph."""
        rest, callers = list(outside(self._model, self._blocks)), CallersTensors()
        yield self._model.register_forward_pre_hook(callers.enter, with_kwargs=True)
        yield self._model.register_forward_hook(callers.leave, always_call=True)
        for blocks in in_lists(self._blocks):
            cut = InputCut([block.module for block in blocks], rest, callers)
            first = blocks[0].module
            yield first.register_forward_pre_hook(cut.enter, with_kwargs=True)
            yield first.register_forward_hook(cut.leave)

    def close(self) -> None:
        """Remove the hooks, and turn the cache on again."""
        for handle in self._handles:
            handle.remove()
        for config in self._caching:
            config.use_cache = True
        self._handles, self._caching = [], []


def in_lists(blocks: Sequence[Block]) -> list[list[Block]]:
    """Return the blocks of each list, such as an encoder's and a decoder's, by their parents."""
    lists: dict[str, list[Block]] = {}
    for block in blocks:
        lists.setdefault(block.name.rpartition(".")[0], []).append(block)
    return list(lists.values())


def _caching_configs(model: nn.Module) -> list[Any]:
    """Return the configs that make a training forward hold every block's keys and values."""
    configs = (getattr(module, "config", None) for module in model.modules())
    caching = {id(c): c for c in configs if getattr(c, "use_cache", False) is True}
    return list(caching.values())
