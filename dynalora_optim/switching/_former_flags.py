"""Recomputing a forward with the modules that were active in it.

Modules may become inactive between two forwards of one backward, because the second is larger than
any before and needs the memory. What the checkpoints of the first recompute still has them active.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.past import Past
from dynalora_optim._base.torch_private_autograd import in_backward
from dynalora_optim.switching._gradients import set_aside


class Flagged(Protocol):
    """What switches a module: the module itself, or hooks of it."""

    active: Any


class FormerFlags:
    """Sets flags, and gives modules in a recomputation the flags that they had in its forward.

    Its hooks are there only from a change between two such forwards until `forget`.
    """

    def __init__(self) -> None:
        self._former: dict[nn.Module, _FormerFlag] = {}
        self._handles: list[RemovableHandle] = []
        self._recalls = False

    def change(self, module: nn.Module, flagged: Flagged, *, active: bool) -> None:
        """Set the flag of ``flagged``, which switches ``module``, from the next forward on."""
        if self._recalls:
            if module not in self._former and flagged.active != active:
                self._former[module] = _FormerFlag(module, flagged)
            if module in self._former:
                self._former[module].flags.note(active)
        flagged.active = active

    @contextmanager
    def recalled(self, is_between: bool) -> Iterator[None]:
        """Change flags within it, before the backward of earlier forwards if ``is_between``."""
        self._recalls = is_between
        try:
            yield
        finally:
            self._recalls = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run other passes within it: it recomputes none of these forwards."""
        for former in self._former.values():
            former.is_paused = True
        try:
            yield
        finally:
            for former in self._former.values():
                former.is_paused = False

    def drop_arriving(self, parameters: Iterable[Tensor]) -> None:
        """Delete each gradient that such a backward gives to ``parameters``, until `forget`."""
        for parameter in parameters:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
                self._handles.append(hook)

    def forget(self) -> None:
        """Remove the hooks: all such forwards have had their backward."""
        for former in self._former.values():
            former.remove()
        for handle in self._handles:
            handle.remove()
        self._former.clear()
        self._handles.clear()


def _drop(parameter: Tensor) -> None:
    set_aside(parameter)


class _FormerFlag:
    """The hooks of one module; they run around those that detach its parameters."""

    def __init__(self, module: nn.Module, flagged: Flagged) -> None:
        self.flags = Past(bool(flagged.active))
        self.is_paused = False
        self._flagged = flagged
        self._now: bool | None = None  # in a recomputation that differs: the flag outside of it
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: object) -> None:
        if in_backward() and not self.is_paused and self.flags.value() != self._flagged.active:
            self._now, self._flagged.active = self._flagged.active, self.flags.value()

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._now is not None:
            self._flagged.active, self._now = self._now, None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "is_paused": True}  # a copy of the model has no such forwards

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
