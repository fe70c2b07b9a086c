"""Keeping an idle module idle while its forward is recomputed, and its parameters its own.

In a forward, an idle module has detached tensors in the places of its parameters. An interrupt
(Ctrl-C) ends the forward without the hook that puts the parameters back. So whoever reads such a
place after that, to copy, convert or load the model, puts them back.

A checkpoint may recompute a part of a forward without a call of the module, so that no hook of the
module runs: the module's own forward checkpoints one of its methods, a caller checkpoints a
submodule, transformers' layers recompute their forward alone. But in all of these the code reads
the parameters as attributes of their modules.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from dynalora_optim._base.calls import Call, call_around, is_running
from dynalora_optim._base.past import Past
from dynalora_optim._base.torch_private import parameter_slots, set_parameter_slots
from dynalora_optim._base.torch_private_autograd import in_backward
from dynalora_optim.groups._module_group import Slot

# The names that were idle in each forward, by module: it may become idle between two of them.
_histories: weakref.WeakKeyDictionary[nn.Module, Past[frozenset[str]]] = weakref.WeakKeyDictionary()


class _IdleSlots(dict[str, Any]):
    """The parameters of a module, of which a recomputation reads some detached.

    The rest of a backward pass, such as hooks of parameters, runs without gradients, and reads the
    parameters themselves.
    """

    idle: frozenset[str] = frozenset()
    history: Past[frozenset[str]]

    def _read(self, name: str, held: Any) -> Any:
        if name not in self.idle or held is None:
            return held
        if isinstance(held, nn.Parameter):
            return held.detach() if _is_recomputing() and name in self.history.value() else held
        if not torch.compiler.is_compiling():
            end_interrupted()
        return super().__getitem__(name)

    def __getitem__(self, name: str) -> Any:
        return self._read(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._read(name, super().get(name, default))

    def values(self) -> Any:
        return {name: self[name] for name in self}.values()

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A copy of a model is active. One that is copied with its optimizer is idle again from its
        # next forward on.
        end_interrupted()
        own = dict(dict.items(self))
        # A copy that is made within them:
        running = (forward() for _, forward in reversed(_running.forwards))
        for forward in filter(None, running):
            places = zip(forward.slots, forward.held, strict=False)
            own.update((s.attribute, p) for s, p in places if parameter_slots(s.owner) is self)
        return dict, (), None, None, iter(own.items())


def _is_recomputing() -> bool:
    return torch.is_grad_enabled() and in_backward()


def stay_idle(slots: Sequence[Slot]) -> None:
    """Let recomputations read the parameters in ``slots`` detached, until `wake`."""
    for slot in slots:
        held = parameter_slots(slot.owner)
        if type(held) is dict:
            held = _IdleSlots(held)
            held.history = _histories.setdefault(slot.owner, Past(frozenset()))
            set_parameter_slots(slot.owner, held)
        if isinstance(held, _IdleSlots) and slot.attribute not in held.idle:
            held.idle |= {slot.attribute}
            held.history.note(held.idle)


def wake(slots: Sequence[Slot]) -> None:
    """Let recomputations read the parameters in ``slots`` as they are."""
    for slot in slots:
        held = parameter_slots(slot.owner)
        if isinstance(held, _IdleSlots):
            held.idle -= {slot.attribute}
            held.history.note(held.idle)
            if not held.idle:
                set_parameter_slots(slot.owner, dict.copy(held))


class IdleForward(Protocol):
    """What puts ``held`` back into ``slots`` after a forward."""

    slots: Sequence[Slot]
    held: list[Any]

    def restore(self) -> None: ...


class _Running(threading.local):
    """The forwards of idle modules that run in this thread, each with its call.

    A forward leads to the model, which must not live longer because it was interrupted.
    """

    def __init__(self) -> None:
        self.forwards: list[tuple[Call | None, weakref.ref[IdleForward]]] = []


_running = _Running()


def begin(forward: IdleForward) -> None:
    """Note that ``forward`` runs, until the call of its module ends, whose hook calls this."""
    end_interrupted()
    _running.forwards.append((call_around(2), weakref.ref(forward)))


def end(forward: IdleForward) -> None:
    """Note that ``forward`` has ended."""
    _running.forwards = [one for one in _running.forwards if one[1]() is not forward]


def end_interrupted() -> None:
    """Put back the parameters of forwards that have ended without their hook, the last first."""
    forwards = _running.forwards
    # If the last one runs, then so do all others, because it was called within them.
    while forwards and not is_running(forwards[-1][0]):
        if last := forwards[-1][1]():
            last.restore()
        forwards.pop()
