"""Keeping an idle module idle while its forward is recomputed, whoever checkpoints it.

A checkpoint may recompute a part of a forward without a call of the module, so that no hook of the
module runs: the module's own forward checkpoints one of its methods, a caller checkpoints a
submodule, transformers' layers recompute their forward alone. But in all of these the code reads
the parameters as attributes of their modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynalora_optim._base.torch_private import parameter_slots, set_parameter_slots
from dynalora_optim._base.torch_private_autograd import in_backward
from dynalora_optim.groups._module_group import Slot


class _IdleSlots(dict[str, Any]):
    """The parameters of a module, of which a recomputation reads some detached.

    The rest of a backward pass, such as hooks of parameters, runs without gradients, and reads the
    parameters themselves.
    """

    idle: frozenset[str] = frozenset()

    def _read(self, name: str, held: Any) -> Any:
        if name in self.idle and isinstance(held, nn.Parameter) and _is_recomputing():
            return held.detach()
        return held

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
        return dict, (), None, None, iter(dict.items(self))


def _is_recomputing() -> bool:
    return torch.is_grad_enabled() and in_backward()


def stay_idle(slots: Sequence[Slot]) -> None:
    """Let recomputations read the parameters in ``slots`` detached, until `wake`."""
    for slot in slots:
        held = parameter_slots(slot.owner)
        if type(held) is dict:
            held = _IdleSlots(held)
            set_parameter_slots(slot.owner, held)
        if isinstance(held, _IdleSlots) and slot.attribute not in held.idle:
            held.idle |= {slot.attribute}


def wake(slots: Sequence[Slot]) -> None:
    """Let recomputations read the parameters in ``slots`` as they are."""
    for slot in slots:
        held = parameter_slots(slot.owner)
        if isinstance(held, _IdleSlots):
            held.idle -= {slot.attribute}
            if not held.idle:
                set_parameter_slots(slot.owner, dict.copy(held))
