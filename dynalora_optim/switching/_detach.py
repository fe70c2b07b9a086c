"""Detached parameters for modules that have no ``active`` flag of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.torch_private import (
    forward_hooks,
    forward_pre_hooks,
    parameter_slots,
    prepend_forward_hook,
)
from dynalora_optim.groups._module_group import AdapterModule, Slot
from dynalora_optim.switching._gate import gated, needs_gate, new_gate, set_gate
from dynalora_optim.switching._recompute import LayerCheckpoint


class DetachedForward:
    """Hooks that give a module detached parameters in each forward while it is inactive.

    They are for modules without an ``active`` flag of their own, such as peft's layers. The hooks
    also stay while the module is active: adding and removing them would make torch.compile
    recompile.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.gated = True
        self._active = True
        self._gate = new_gate()
        self._held: list[nn.Parameter | None] = []
        self._checkpoint: LayerCheckpoint | None = None
        self._handles: list[RemovableHandle] = [
            # Both run inside FSDP2's hooks, which put the full parameters into this module.
            module.register_forward_pre_hook(self._detach),
            prepend_forward_hook(module, self._restore, always_call=True),
        ]

    @property
    def active(self) -> bool:
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self.restore()
        self._active = active
        set_gate(self._gate, active)

    def _detach(self, module: nn.Module, args: object) -> None:
        is_gated = self.gated and needs_gate()
        if not is_gated and self._active:  # in this order: compiled code must not depend on it
            return
        self.restore()
        self._held = [parameter_slots(slot.owner)[slot.attribute] for slot in self.slots]
        for slot, parameter in zip(self.slots, self._held, strict=True):
            if parameter is not None:
                replacement = gated(parameter, self._gate) if is_gated else parameter.detach()
                # setattr accepts only a Parameter; the replacement is a Tensor.
                parameter_slots(slot.owner)[slot.attribute] = replacement  # type: ignore[assignment]
        self._checkpoint = LayerCheckpoint.over(module)

    def _restore(self, module: nn.Module, args: object, output: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the parameters back; also needed if an interrupt in the forward skipped the hook."""
        if self._held:
            for slot, parameter in zip(self.slots, self._held, strict=True):
                parameter_slots(slot.owner)[slot.attribute] = parameter
            self._held = []
        if self._checkpoint:
            self._checkpoint.remove()
            self._checkpoint = None

    def holds(self, parameter: Tensor) -> bool:
        places = (parameter_slots(slot.owner)[slot.attribute] for slot in self.slots)
        return any(held is parameter for held in (self._held or places))

    def remove(self) -> None:
        self.restore()
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model has no optimizer that would make its modules active again.
        return {**self.__dict__, "_active": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        set_gate(self._gate, True)


class ActiveCopies:
    """Makes each copy of a module with a flag active, by `copy` as well as by `pickle`.

    A copy of a model (an EMA model, a file from ``torch.save(model)``) has no optimizer that would
    make its modules active again: it would train some of its modules only, without a word.
    """

    _NAMES = ("__deepcopy__", "__reduce_ex__")  # looked up in the module itself before its class

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = module.__dict__
        self._own.update(zip(self._NAMES, (self._deepcopy, self._reduce), strict=True))

    @classmethod
    def of(cls, module: nn.Module) -> None:
        """Make copies of ``module`` active from now on, if it has a flag."""
        if has_flag(module):
            cls(module)

    @classmethod
    def stop(cls, module: nn.Module) -> None:
        """Copy ``module`` as it is."""
        for name in cls._NAMES:
            if isinstance(getattr(module.__dict__.get(name), "__self__", None), cls):
                del module.__dict__[name]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        mine = {name: self._own.pop(name) for name in self._NAMES if name in self._own}
        try:
            yield
        finally:
            self._own.update(mine)

    def _deepcopy(self, memo: dict[int, Any]) -> nn.Module:
        with self._aside():
            new = copy.deepcopy(self._module, memo)
        return activated(new)

    def _reduce(self, protocol: Any) -> tuple[Any, ...]:
        with self._aside():
            reduced: Any = self._module.__reduce_ex__(protocol)
        function, arguments, state, *more = reduced
        if isinstance(state, dict):  # the attributes themselves
            state = {key: value for key, value in state.items() if key not in self._NAMES}
        items = (*more, None, None)[:2]
        return function, arguments, state, *items, set_state_active


def set_state_active(module: nn.Module, state: Any) -> None:
    """Give ``module``, which is being unpickled, its ``state``, and make it active."""
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    activated(module)


def activated(module: nn.Module) -> nn.Module:
    """Return ``module`` after setting its flag."""
    module.active = True  # type: ignore[assignment]
    return module


def drop_copied_hooks(module: nn.Module) -> None:
    """Remove the hooks that a copied model has from the optimizer of the original model."""
    for hooks in (forward_pre_hooks(module), forward_hooks(module)):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), DetachedForward):
                del hooks[key]


def has_flag(module: nn.Module) -> bool:
    """Return whether ``module`` detaches its own parameters by its flag ``active``."""
    return isinstance(module, AdapterModule) and isinstance(getattr(module, "active", None), bool)
