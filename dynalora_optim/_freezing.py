"""Making groups active and inactive: the only writer of ``active`` flags and of ``grad``.

An inactive module's forward uses detached parameters. ``requires_grad`` stays True for ever: a
toggle is undone by peft's own calls, crashes FSDP2 in mixed precision, and makes ranks diverge in
silence under DDP when it was False at wrap time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._groups import AdapterModule, ModuleGroup, Slot


class _DetachedForward:
    """Hooks that lend a module detached parameters for the duration of each forward.

    They serve modules that have no ``active`` flag of their own: peft's layers, a user's.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._held: list[nn.Parameter | None] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._detach, prepend=True),
            module.register_forward_hook(self._restore, always_call=True),
        ]

    def _detach(self, module: nn.Module, args: object) -> None:
        self._held = [slot.owner._parameters[slot.attribute] for slot in self._slots]
        for slot, parameter in zip(self._slots, self._held, strict=True):
            if parameter is not None:
                # _parameters takes only Parameters through setattr; the forward needs a Tensor.
                slot.owner._parameters[slot.attribute] = parameter.detach()  # type: ignore[assignment]

    def _restore(self, module: nn.Module, args: object, output: object) -> None:
        for slot, parameter in zip(self._slots, self._held, strict=False):
            slot.owner._parameters[slot.attribute] = parameter
        self._held = []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Freezer:
    """Makes groups active and inactive."""

    def __init__(self) -> None:
        self._detached: dict[str, list[_DetachedForward]] = {}

    def set_active(self, groups: Iterable[ModuleGroup], active: Collection[str]) -> None:
        """Make those of ``groups`` that are named in ``active`` active, and the others inactive."""
        for group in groups:
            if group.name in active:
                self._activate(group)
            else:
                self._deactivate(group)

    def _activate(self, group: ModuleGroup) -> None:
        for module in group.modules:
            if _has_flag(module):
                module.active = True  # type: ignore[assignment]
        for hooks in self._detached.pop(group.name, []):
            hooks.remove()

    def _deactivate(self, group: ModuleGroup) -> None:
        for module in group.modules:
            if _has_flag(module):
                module.active = False  # type: ignore[assignment]
        if group.name not in self._detached:
            self._detached[group.name] = [
                _DetachedForward(module, group.slots)
                for module in group.modules
                if not _has_flag(module)
            ]


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Set ``grad`` to None: a zero gradient would leave momentum and weight decay at work."""
    for parameter in parameters:
        parameter.grad = None


def _has_flag(module: nn.Module) -> bool:
    return isinstance(module, AdapterModule) and isinstance(getattr(module, "active", None), bool)
