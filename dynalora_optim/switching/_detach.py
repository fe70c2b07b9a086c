"""Detached parameters for modules that have no ``active`` flag of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.torch_private_hooks import (
    forward_hooks,
    forward_pre_hooks,
    prepend_forward_hook,
)
from dynalora_optim.groups._module_group import AdapterModule, Slot
from dynalora_optim.switching._gate import gated, needs_gate, new_gate, set_gate
from dynalora_optim.switching._idle_slots import begin, end, stay_idle, wake


class DetachedForward:
    """Hooks that give a module detached parameters in each forward while it is inactive.

    They are for modules without an ``active`` flag of their own, such as peft's layers. The hooks
    also stay while the module is active: adding and removing them would make torch.compile
    recompile. A recomputation does not need them (see `stay_idle`).
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.gated = True
        self._active = True
        self._gate = new_gate()
        self.held: list[Tensor | None] = []
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
        wake(self.slots)
        set_gate(self._gate, active)

    def _detach(self, module: nn.Module, args: object) -> None:
        is_gated = self.gated and needs_gate()
        if not is_gated and self._active:  # in this order: compiled code must not depend on it
            return
        if not torch.compiler.is_compiling():  # compiled code must find ordinary dicts
            if not (module.training or torch.is_grad_enabled()):
                return
            begin(self)
            stay_idle(self.slots)
        self.restore()
        self.held = [slot.tensor for slot in self.slots]
        for slot, parameter in zip(self.slots, self.held, strict=True):
            if parameter is not None:
                slot.put(gated(parameter, self._gate) if is_gated else parameter.detach())

    def _restore(self, module: nn.Module, args: object, output: object) -> None:
        self.restore()
        if not torch.compiler.is_compiling():
            end(self)

    def restore(self) -> None:
        """Put the parameters back; also needed if an interrupt in the forward skipped the hook."""
        if self.held:
            for slot, parameter in zip(self.slots, self.held, strict=True):
                slot.put(parameter)
            self.held = []

    def holds(self, parameter: Tensor) -> bool:
        return any(held is parameter for held in (self.held or [s.tensor for s in self.slots]))

    def remove(self) -> None:
        self.restore()
        wake(self.slots)
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model has no optimizer that would make its modules active again.
        return {**self.__dict__, "_active": True, "held": []}

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
        # Without a sixth item, a function that sets the state: `copy.copy` does not take one.
        return new_module, (function, *arguments), state, *more


def new_module(function: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """Return an empty module, as ``function`` makes it, that is active once it gets its state."""
    module = function(*arguments)
    vars(module)["__setstate__"] = partial(_set_state, module)
    return module


def _set_state(module: nn.Module, state: Any) -> None:
    del vars(module)["__setstate__"]
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
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, DetachedForward):
                del hooks[key]
                wake(owner.slots)


def has_flag(module: nn.Module) -> bool:
    """Return whether ``module`` detaches its own parameters by its flag ``active``."""
    return isinstance(module, AdapterModule) and isinstance(getattr(module, "active", None), bool)
