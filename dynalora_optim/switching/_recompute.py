"""Recomputing blocks in the backward pass: the only writer of gradient checkpointing's switches.

There are four ways to switch it on, by what a block is: its own ``forward`` is replaced; the code
that ``block.compile()`` made is wrapped; a transformers layer has a switch; and within that layer,
the function that it checkpoints with is replaced for one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from torch.utils.checkpoint import checkpoint

from dynalora_optim._base.torch_private import COMPILED_CALL
from dynalora_optim.switching._replacement import in_place, replaced_parameters


class _CheckpointedForward:
    """A block's own ``forward``, run under a checkpoint in training.

    It stands in the instance, where a copy of the model takes a copy of it along.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._previous = block.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._previous or partial(type(self._block).forward, self._block)
        if not self._block.training:
            return forward(*args, **kwargs)
        # The recomputation starts here, within the hooks of the block that detached its parameters.
        replacements = replaced_parameters(self._block)

        def run(*args: Any, **kwargs: Any) -> Any:
            with in_place(replacements):
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    def remove(self) -> None:
        if self._previous is None:
            del self._block.__dict__["forward"]
        else:
            self._block.__dict__["forward"] = self._previous


class LayerCheckpoint:
    """Takes the place of a transformers layer's checkpoint function during one forward.

    In new releases of transformers (5.23, not yet 5.17) the recomputation calls the layer's forward
    without its hooks; those replace its parameters while it is idle.
    """

    _NAME = "_gradient_checkpointing_func"

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._function = layer.__dict__[self._NAME]
        self._replacements = replaced_parameters(layer)
        layer.__dict__[self._NAME] = self

    @classmethod
    def over(cls, module: nn.Module) -> LayerCheckpoint | None:
        """Put one in place if ``module`` is a layer that has such a function."""
        return cls(module) if cls._NAME in module.__dict__ else None

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        replacements = self._replacements

        def run_again(*args: Any, **kwargs: Any) -> Any:
            with in_place(replacements):
                return run(*args, **kwargs)

        return self._function(run_again, *args, **kwargs)

    def remove(self) -> None:
        self._layer.__dict__[self._NAME] = self._function


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
        """Undo what was switched, but not what the user has switched since."""
        if self._own.get(self._FUNCTION) is not self._function:
            return  # switched on by the user, with a function of his own
        names = [self._FUNCTION] if self._own.get(self._FLAG) is not True else []
        for name in names or (self._FLAG, self._FUNCTION):
            self._own.pop(name, None)
            if name in self._previous:
                self._own[name] = self._previous[name]


class _CheckpointedCode:
    """What ``block.compile()`` made of a block, run under a checkpoint in training.

    One outside the compiled code is no part of it, and changes without a recompilation.
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
        if self._block.__dict__.get(COMPILED_CALL) is self:  # else it was compiled again since
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
    """Switches checkpoints on and off; leaves blocks alone that the user has checkpointed."""

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
