"""Recomputing blocks in the backward pass; only this file switches gradient checkpointing.

How it is switched on depends on the block: the block's own ``forward`` is replaced; or the code
that ``block.compile()`` made is wrapped; or the switch of a transformers layer is used.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from torch.utils.checkpoint import checkpoint

from dynalora_optim._base.torch_private import COMPILED_CALL


class _CheckpointedForward:
    """A block's own ``forward``, run under a checkpoint in training.

    It is an attribute of the block itself, so that it is copied with the model.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._previous = block.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._previous or partial(type(self._block).forward, self._block)
        if not self._block.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def remove(self) -> None:
        if self._previous is None:
            del self._block.__dict__["forward"]
        else:
            self._block.__dict__["forward"] = self._previous


class _LayerSwitch:
    """The switch that transformers' own layers have (``GradientCheckpointingLayer``)."""

    _FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"

    def __init__(self, block: nn.Module) -> None:
        self._own = block.__dict__
        names = (self._FLAG, self._FUNCTION)
        self._previous = {name: self._own[name] for name in names if name in self._own}
        self._function = partial(checkpoint, use_reentrant=False)
        self._own.update({self._FLAG: True, self._FUNCTION: self._function})

    def remove(self) -> None:
        """Switch checkpointing off again, except what the user has switched since."""
        if self._own.get(self._FUNCTION) is not self._function:
            return  # the user has switched checkpointing on, with another function
        names = [self._FUNCTION] if self._own.get(self._FLAG) is not True else []
        for name in names or (self._FLAG, self._FUNCTION):
            self._own.pop(name, None)
            if name in self._previous:
                self._own[name] = self._previous[name]


class _CheckpointedCode:
    """The code that ``block.compile()`` made, run under a checkpoint in training.

    The checkpoint is outside the compiled code, so that switching it does not cause a
    recompilation.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._previous = block.__dict__[COMPILED_CALL]
        block.__dict__[COMPILED_CALL] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._block.training:
            return self._previous(*args, **kwargs)
        return checkpoint(self._previous, *args, use_reentrant=False, **kwargs)

    def remove(self) -> None:
        if self._block.__dict__.get(COMPILED_CALL) is self:  # else the block was compiled again
            self._block.__dict__[COMPILED_CALL] = self._previous


def is_compiled(block: nn.Module) -> bool:
    """Return whether ``block.compile()`` was called, so that the block is compiled by itself."""
    return block.__dict__.get(COMPILED_CALL) is not None


def checkpoints_itself(block: nn.Module) -> bool:
    """Return whether the user has switched gradient checkpointing on for this block."""
    return getattr(block, "gradient_checkpointing", False) is True


def is_reentrant(block: nn.Module) -> bool:
    """Return whether the user has asked for reentrant checkpoints of this block."""
    function = getattr(block, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.keywords.get("use_reentrant") is True


class Recomputer:
    """Switches checkpoints on and off, except for blocks that the user has checkpointed."""

    def __init__(self) -> None:
        self._switched: dict[nn.Module, _Switch] = {}

    def recompute(self, blocks: Collection[nn.Module]) -> None:
        """Recompute these blocks and no others."""
        for block in [block for block in self._switched if block not in blocks]:
            self._switched.pop(block).remove()
        for block in blocks:
            if block not in self._switched and not checkpoints_itself(block):
                self._switched[block] = _switch(block)


_Switch: TypeAlias = "_CheckpointedForward | _CheckpointedCode | _LayerSwitch"


def _switch(block: nn.Module) -> _Switch:
    if is_compiled(block):
        return _CheckpointedCode(block)
    if hasattr(block, "gradient_checkpointing"):
        return _LayerSwitch(block)
    switch = _CheckpointedForward(block)
    block.__dict__["forward"] = switch
    return switch
