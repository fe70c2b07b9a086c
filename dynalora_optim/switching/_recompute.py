"""Recomputing blocks in the backward pass; only this file switches gradient checkpointing.

How it is switched on depends on the block: the block's own ``forward`` is replaced; or the code
that ``block.compile()`` made is wrapped; or the switch of a transformers layer is used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynalora_optim._base.torch_private import COMPILED_CALL
from dynalora_optim._base.torch_private_autograd import current_saved_tensors_hooks
from dynalora_optim.switching._kept import Kept


def autocast_keeps_casts() -> bool:
    """Return whether autocast is on, and keeps its casts of parameters that train until it ends."""
    is_cast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    return is_cast and torch.is_autocast_cache_enabled()


def _recomputed(
    function: Callable[..., Any],
    *args: Any,
    kept: Kept | None = None,
    use_reentrant: bool = False,
    **kwargs: Any,
) -> Any:
    """Return ``function(*args, **kwargs)`` under torch's non-reentrant checkpoint.

    If ``kept`` is given, the backward recomputes nothing until its `Kept.release`.

    The casts that autocast keeps take as much memory as the checkpoint saves where much trains.
    Here it keeps none of them.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)
    if kept is not None:
        if current_saved_tensors_hooks():  # the user's: they keep it in a place of their own
            return function(*args, **kwargs)
        function = kept.keeping(function)
    if not autocast_keeps_casts():
        return checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)
    torch.set_autocast_cache_enabled(False)
    try:
        return checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)
    finally:
        torch.set_autocast_cache_enabled(True)


class _CheckpointedForward:
    """A block's own ``forward``, run under a checkpoint in training.

    It is an attribute of the block itself, so that it is copied with the model.

    Attributes:
        kept: What keeps the saved tensors, until they must be recomputed; None: nothing does.
    """

    def __init__(self, block: nn.Module) -> None:
        self.kept: Kept | None = None
        self._block = block
        self._previous = block.__dict__.get("forward")
        block.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._previous or partial(type(self._block).forward, self._block)
        if not self._block.training:
            return forward(*args, **kwargs)
        return _recomputed(forward, *args, kept=self.kept, **kwargs)

    def remove(self) -> None:
        if self._previous is None:
            del self._block.__dict__["forward"]
        else:
            self._block.__dict__["forward"] = self._previous


class _Function(partial[Any]):
    """The checkpoint function of a transformers layer while a switch of ours holds the layer.

    It is an attribute of the layer, so that a copy of the model knows what the user had set.
    """

    users: dict[str, Any]


class _LayerSwitch:
    """Holds the switch that transformers' own layers have (``GradientCheckpointingLayer``)."""

    _FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
    # Equal to True and False, but not the same objects: so what the user sets is told from these.
    _ON, _OFF = 1, 0

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._ours: dict[str, Any] = {}
        found = vars(block).get(self._FUNCTION)
        if isinstance(found, _Function):  # this is a copy of a block that is held
            self._ours = {self._FLAG: vars(block)[self._FLAG], self._FUNCTION: found}
            self._function = found
        else:
            self._function = _Function(_recomputed, use_reentrant=False)
            self._function.users = {}

    def hold(self, *, on: bool, kept: Kept | None = None) -> None:
        """Switch checkpointing on or off, whatever the user has set; see `_recomputed`."""
        self._note()
        self._function.keywords.pop("kept", None)
        self._function.keywords.update({"kept": kept} if kept else {})
        self._ours = {self._FLAG: self._ON if on else self._OFF, self._FUNCTION: self._function}
        vars(self._block).update(self._ours)

    def is_users(self) -> bool:
        """Return whether the user has switched checkpointing on."""
        self._note()
        return self._function.users.get(self._FLAG) is True

    def remove(self) -> None:
        """Leave what the user has set last."""
        self._note()
        for name in self._ours:
            vars(self._block).pop(name, None)
        vars(self._block).update(self._function.users)

    def _note(self) -> None:
        """Note what the user has set since this switch was set."""
        own, users = vars(self._block), self._function.users
        for name in (self._FLAG, self._FUNCTION):
            if name not in own:
                users.pop(name, None)
            elif name not in self._ours or own[name] is not self._ours[name]:
                users[name] = own[name]


class _CheckpointedCode:
    """The code that ``block.compile()`` made, run under a checkpoint in training.

    The checkpoint is outside the compiled code, so that switching it does not cause a
    recompilation.
    """

    kept: Kept | None = None  # see `can_keep`

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._previous = block.__dict__[COMPILED_CALL]
        block.__dict__[COMPILED_CALL] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._block.training:
            return self._previous(*args, **kwargs)
        return _recomputed(self._previous, *args, **kwargs)

    def remove(self) -> None:
        if self._block.__dict__.get(COMPILED_CALL) is self:  # else the block was compiled again
            self._block.__dict__[COMPILED_CALL] = self._previous


def is_compiled(block: nn.Module) -> bool:
    """Return whether ``block.compile()`` was called, so that the block is compiled by itself."""
    return block.__dict__.get(COMPILED_CALL) is not None


def can_keep(block: nn.Module) -> bool:
    """Return whether `Recomputer.recompute` can recompute this block only where it must."""
    return not is_compiled(block)  # whose code decides itself what it saves, and how


def checkpoints_itself(block: nn.Module) -> bool:
    """Return whether the user has switched gradient checkpointing on for this block."""
    return getattr(block, "gradient_checkpointing", False) is True


def is_reentrant(block: nn.Module) -> bool:
    """Return whether the user has asked for reentrant checkpoints of this block."""
    function = getattr(block, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.keywords.get("use_reentrant") is True


class Recomputer:
    """Switches checkpoints on and off.

    Attributes:
        kept: What blocks have saved that are recomputed only after its `Kept.release`.
    """

    def __init__(self) -> None:
        self.kept = Kept()
        self._layers: dict[nn.Module, _LayerSwitch] = {}
        self._wrapped: dict[nn.Module, _CheckpointedForward | _CheckpointedCode] = {}

    def recompute(
        self,
        blocks: Collection[nn.Module],
        *,
        keeping: Collection[nn.Module] = (),
        among: Collection[nn.Module] = (),
    ) -> None:
        """Recompute these blocks and no others.

        Blocks that the user has checkpointed are left alone, except those of ``among``.

        Args:
            blocks: The blocks to recompute.
            keeping: Further blocks, which are recomputed only if what they keep is released;
                `can_keep` says which can be.
            among: Blocks whose own switch is held until a call without them: off unless they are
                recomputed. Then what the user has set last stands again, also if that was while
                the switch was held.
        """
        kept = dict.fromkeys(keeping, self.kept)
        blocks = [b for b in (*blocks, *keeping) if b in among or not self._is_users(b)]
        layers = dict.fromkeys(filter(_has_switch, among), False)
        layers |= {b: True for b in blocks if _has_switch(b) and not is_compiled(b)}
        for block in self._layers.keys() - layers.keys():
            self._layers.pop(block).remove()
        for block, on in layers.items():
            if block not in self._layers:
                self._layers[block] = _LayerSwitch(block)
            self._layers[block].hold(on=on, kept=kept.get(block))
        self._wrap([block for block in blocks if not layers.get(block)], kept)

    def _wrap(self, blocks: Collection[nn.Module], kept: Mapping[nn.Module, Kept]) -> None:
        """Recompute these blocks, whose switch cannot be used, and no others of this kind."""
        for block in [block for block in self._wrapped if block not in blocks]:
            self._wrapped.pop(block).remove()
        for block in blocks:
            if block not in self._wrapped:
                wrap = _CheckpointedCode if is_compiled(block) else _CheckpointedForward
                self._wrapped[block] = wrap(block)
            self._wrapped[block].kept = kept.get(block)

    def _is_users(self, block: nn.Module) -> bool:
        held = self._layers.get(block)
        return held.is_users() if held else checkpoints_itself(block)


def _has_switch(block: nn.Module) -> bool:
    return hasattr(block, "gradient_checkpointing")
