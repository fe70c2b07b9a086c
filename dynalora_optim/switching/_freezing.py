"""Making groups active and inactive: the only writer of flags (active, checkpointed) and ``grad``.

An inactive module's forward uses detached parameters. ``requires_grad`` stays True for ever: a
toggle is undone by peft's own calls, crashes FSDP2 in mixed precision, and makes ranks diverge in
silence under DDP when it was False at wrap time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.collectives import is_sharded, world_size
from dynalora_optim._base.torch_private import prepend_forward_hook
from dynalora_optim.groups._groups import AdapterModule, ModuleGroup, Slot
from dynalora_optim.switching._gate import gated, needs_gate, new_gate, set_gate


class _DetachedForward:
    """Hooks that lend a module detached parameters for each forward while it is inactive.

    They serve modules that have no ``active`` flag of their own: peft's layers, a user's. They stay
    when it is active: hooks that come and go would make torch.compile begin anew.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.gated = True
        self._active = True
        self._gate = new_gate()
        self._held: list[nn.Parameter | None] = []
        self._checkpoint: _LentCheckpoint | None = None
        self._handles: list[RemovableHandle] = [
            # Within the hooks by which FSDP2 puts the whole parameters into this very module.
            module.register_forward_pre_hook(self._detach),
            prepend_forward_hook(module, self._restore, always_call=True),
        ]

    @property
    def active(self) -> bool:
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self.give_back()
        self._active = active
        set_gate(self._gate, active)

    def _detach(self, module: nn.Module, args: object) -> None:
        is_gated = self.gated and needs_gate()
        if not is_gated and self._active:  # in this order: compiled code is not to ask for it
            return
        self.give_back()
        self._held = [slot.owner._parameters[slot.attribute] for slot in self.slots]
        for slot, parameter in zip(self.slots, self._held, strict=True):
            if parameter is not None:
                lent = gated(parameter, self._gate) if is_gated else parameter.detach()
                # _parameters takes only Parameters through setattr; the forward needs a Tensor.
                slot.owner._parameters[slot.attribute] = lent  # type: ignore[assignment]
        self._checkpoint = _LentCheckpoint.over(module)

    def _restore(self, module: nn.Module, args: object, output: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Put the parameters back; no hook does after a KeyboardInterrupt in the forward."""
        for slot, parameter in zip(self.slots, self._held, strict=False):
            slot.owner._parameters[slot.attribute] = parameter
        self._held = []
        if self._checkpoint:
            self._checkpoint.remove()
            self._checkpoint = None

    def lends(self, parameter: Tensor) -> bool:
        places = (slot.owner._parameters[slot.attribute] for slot in self.slots)
        return any(held is parameter for held in (self._held or places))

    def remove(self) -> None:
        self.give_back()
        for handle in self._handles:
            handle.remove()


def drop_copied_hooks(module: nn.Module) -> None:
    """Remove the hooks that a copy of a model has brought along from the original's optimizer."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _DetachedForward):
                del hooks[key]


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
        lent = _lent_parameters(self._block)

        def run(*args: Any, **kwargs: Any) -> Any:
            with _standing_in(lent):
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    def remove(self) -> None:
        if self._previous is None:
            del self._block.__dict__["forward"]
        else:
            self._block.__dict__["forward"] = self._previous


Loan: TypeAlias = (
    "tuple[nn.Module, str, Tensor | None]"  # in the place owner._parameters[attribute]
)


def _lent_parameters(module: nn.Module) -> list[Loan]:
    """Return what stands in for parameters of ``module`` now."""
    return [
        (owner, attribute, tensor)
        for owner in module.modules()
        for attribute, tensor in owner._parameters.items()
        if tensor is not None and not isinstance(tensor, nn.Parameter)
    ]


@contextmanager
def _standing_in(lent: Sequence[Loan]) -> Iterator[None]:
    before = [owner._parameters[attribute] for owner, attribute, _ in lent]
    for owner, attribute, tensor in lent:
        owner._parameters[attribute] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for (owner, attribute, _), parameter in zip(lent, before, strict=True):
            owner._parameters[attribute] = parameter


class _LentCheckpoint:
    """Stands in for the checkpoint function of a transformers layer during one forward.

    From transformers 5.2 on, the recomputation calls the layer's forward without its hooks; those
    lend it detached parameters while it is idle.
    """

    _NAME = "_gradient_checkpointing_func"

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._function = layer.__dict__[self._NAME]
        self._lent = _lent_parameters(layer)
        layer.__dict__[self._NAME] = self

    @classmethod
    def over(cls, module: nn.Module) -> _LentCheckpoint | None:
        """Put one in place if ``module`` is a layer that has such a function."""
        return cls(module) if cls._NAME in module.__dict__ else None

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        lent = self._lent

        def run_again(*args: Any, **kwargs: Any) -> Any:
            with _standing_in(lent):
                return run(*args, **kwargs)

        return self._function(run_again, *args, **kwargs)

    def remove(self) -> None:
        self._layer.__dict__[self._NAME] = self._function


class _LayerSwitch:
    """The switch that transformers' own layers have (``GradientCheckpointingLayer``)."""

    _NAMES = ("gradient_checkpointing", "_gradient_checkpointing_func")

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._previous = {n: block.__dict__[n] for n in self._NAMES if n in block.__dict__}
        block.gradient_checkpointing = True  # type: ignore[assignment]
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

    def remove(self) -> None:
        for name in self._NAMES:
            self._block.__dict__.pop(name, None)
        self._block.__dict__.update(self._previous)


class _CheckpointedCode:
    """What ``block.compile()`` made of a block, run under a checkpoint in training.

    One outside the compiled code is no part of it, and changes without a recompilation.
    """

    _NAME = "_compiled_call_impl"  # in torch since 2.1; a copy of the model leaves it out

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._previous = block.__dict__[self._NAME]
        block.__dict__[self._NAME] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._block.training:
            return self._previous(*args, **kwargs)
        return checkpoint(self._previous, *args, use_reentrant=False, **kwargs)

    def remove(self) -> None:
        if self._block.__dict__.get(self._NAME) is self:  # else it was compiled again since
            self._block.__dict__[self._NAME] = self._previous


def is_compiled(block: nn.Module) -> bool:
    """Return whether ``block.compile()`` was called, so that the block is compiled by itself."""
    return block.__dict__.get(_CheckpointedCode._NAME) is not None


def checkpoints_itself(block: nn.Module) -> bool:
    """Return whether the user has switched gradient checkpointing on for this block."""
    return getattr(block, "gradient_checkpointing", False) is True


class Checkpointer:
    """Checkpoints blocks, and leaves those alone that the user has checkpointed."""

    def __init__(self) -> None:
        self._switched: dict[nn.Module, _Switch] = {}

    def set_checkpointed(self, blocks: Collection[nn.Module]) -> None:
        """Checkpoint these blocks and no others."""
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


class Freezer:
    """Makes groups active and inactive, and blocks checkpointed as the choice asks for.

    Args:
        checkpointed: The blocks to checkpoint while the groups of these names are active.
    """

    def __init__(
        self, checkpointed: Callable[[Collection[str]], Collection[nn.Module]] | None = None
    ) -> None:
        self._detached: dict[str, list[_DetachedForward]] = {}
        self._checkpointed = checkpointed
        self._checkpointer = Checkpointer()

    def set_active(self, groups: Iterable[ModuleGroup], active: Collection[str]) -> None:
        """Make those of ``groups`` that are named in ``active`` active, and the others inactive."""
        self.set_flags(groups, active)
        if self._checkpointed:
            self._checkpointer.set_checkpointed(self._checkpointed(active))

    def give_back(self) -> None:
        """Give modules the parameters that an interrupted forward still holds."""
        for hooks in self._detached.values():
            for hook in hooks:
                hook.give_back()

    def clear(self, groups: Iterable[ModuleGroup]) -> None:
        """Make all ``groups`` active and checkpoint nothing."""
        groups = list(groups)
        self.set_flags(groups, [group.name for group in groups])
        self._checkpointer.set_checkpointed(())

    def close(self, groups: Iterable[ModuleGroup]) -> None:
        """Do so, and remove all hooks."""
        self.clear(groups)
        for hooks in self._detached.values():
            for hook in hooks:
                hook.remove()
        self._detached.clear()

    def set_flags(self, groups: Iterable[ModuleGroup], active: Collection[str]) -> None:
        """Do so without a change of what is checkpointed."""
        for group in groups:
            for switch in self._switches(group):
                switch.active = group.name in active

    def set_gated(self, groups: Iterable[ModuleGroup], gated: Collection[str]) -> None:
        """Let compiled code depend on whether a group is active, unless ``gated`` names it."""
        for group in groups:
            for switch in self._switches(group):
                if hasattr(switch, "gated"):
                    switch.gated = group.name in gated

    def _switches(self, group: ModuleGroup) -> list[nn.Module | _DetachedForward]:
        """Return what has the flags of a group: its modules, or the hooks of one that has none."""
        if group.name not in self._detached:
            self._detached[group.name] = [
                _DetachedForward(module, group.slots)
                for module in group.modules
                if not _has_flag(module)
            ]
        return [*filter(_has_flag, group.modules), *self._detached[group.name]]

    def is_detached(self, parameter: Tensor) -> bool:
        """Return whether it belongs to a module without a flag that is inactive."""
        hooks = (hook for hooks in self._detached.values() for hook in hooks)
        return any(not hook.active and hook.lends(parameter) for hook in hooks)


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Set ``grad`` to None: a zero gradient would leave momentum and weight decay at work."""
    for parameter in parameters:
        parameter.grad = None


def set_aside(parameter: Tensor) -> Tensor | None:
    """Take the gradient of ``parameter`` away and return it, before DDP looks for it.

    DDP would send it, and put the mean over all ranks in its place. It finds zeros, as it makes
    where there is no gradient: without any, a static graph would take the parameter for unused for
    ever.
    """
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None and world_size() > 1 and not is_sharded(gradient):
        parameter.grad = torch.zeros_like(gradient)
    return gradient


@contextmanager
def lent_gradients(gradients: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let parameters have these gradients for a moment."""
    before = {parameter: parameter.grad for parameter in gradients}
    try:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        yield
    finally:
        for parameter, former in before.items():
            parameter.grad = former


def _has_flag(module: nn.Module) -> bool:
    return isinstance(module, AdapterModule) and isinstance(getattr(module, "active", None), bool)
