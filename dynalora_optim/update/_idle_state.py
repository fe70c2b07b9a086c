"""The optimizer state of inactive modules: kept on the device, moved to the host, or deleted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from dynalora_optim.update._param_groups import State
from dynalora_optim.update._pause import Pause, PausedState
from dynalora_optim.update._rule import UpdateRule
from dynalora_optim.update._trial import recreated

# The keys of state that holds the weights themselves or their mean: in ASGD, in schedule-free
# optimizers, and in Prodigy. If it were deleted, the progress in it would be lost.
_ITERATES = ("ax", "z", "p0", "x0")


class IdleState(Protocol):
    """Moves or deletes the optimizer state of parameters that pause."""

    def release(self, state: State, parameters: Iterable[Tensor]) -> None:
        """Handle the state of ``parameters`` that are inactive now."""
        ...

    def restore(self, state: State, parameters: Iterable[Tensor]) -> None:
        """Handle the state of ``parameters`` that are active now."""
        ...

    def settle(self) -> None:
        """Return when every value in the state can be read."""
        ...


class Keep:
    """Leaves the state where it is."""

    def release(self, state: State, parameters: Iterable[Tensor]) -> None:
        """Do nothing."""

    def restore(self, state: State, parameters: Iterable[Tensor]) -> None:
        """Do nothing."""

    def settle(self) -> None:
        """Do nothing."""


class Drop(Keep):
    """Deletes the state, so that a new one is created later, as in BAdam (arXiv 2404.02827)."""

    def release(self, state: State, parameters: Iterable[Tensor]) -> None:
        """Delete the state of ``parameters``.

        Raises:
            ValueError: The state holds weights, which cannot be restored. Then nothing is changed.
        """
        present = [parameter for parameter in parameters if parameter in state]
        for parameter in present:
            if found := [key for key in _ITERATES if key in state[parameter]]:
                raise ValueError(_holds_iterate(f"an optimizer whose state has {found[0]!r}"))
        for parameter in present:
            del state[parameter]


class Offload:
    """Moves the state to the host, and back unchanged.

    On CUDA both copies run in parallel to the computation, to and from pinned memory. State that is
    always on the host, such as step counts, is not moved.
    """

    def __init__(self) -> None:
        self._copied: dict[torch.device, torch.cuda.Event] = {}  # the last copies from each

    def release(self, state: State, parameters: Iterable[Tensor]) -> None:
        """Start to move the state of ``parameters`` to the host."""
        leaving: dict[torch.device, list[Place]] = defaultdict(list)
        for parameter in parameters:
            values = state.get(parameter, {})
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim and value.device.type != "cpu":
                    leaving[value.device].append((values, key))
        for device, places in leaving.items():
            if device.type == "cuda":
                self._copied[device] = _begin_copies(device, places)
            else:
                for values, key in places:
                    values[key] = values[key].cpu()

    def restore(self, state: State, parameters: Iterable[Tensor]) -> None:
        """Move the state back; the device's next kernels wait for it, but this thread does not."""
        for parameter in parameters:
            values = state.get(parameter, {})
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim and value.device != parameter.device:
                    if parameter.device in self._copied:
                        here = torch.cuda.current_stream(parameter.device)
                        here.wait_event(self._copied[parameter.device])
                    values[key] = value.to(parameter.device, non_blocking=True)

    def settle(self) -> None:
        """Wait for the copies to the host."""
        for copied in self._copied.values():
            copied.synchronize()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {"_copied": {}}


Place: TypeAlias = "tuple[dict[str, Any], str]"  # values[key]


def _begin_copies(device: torch.device, places: Iterable[Place]) -> torch.cuda.Event:
    """Start to replace ``places`` with pinned copies; return the event of their completion."""
    with torch.cuda.device(device):
        copy_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copy_stream):
            for values, key in places:
                value = values[key]
                host = torch.empty_like(value, device="cpu", pin_memory=True)
                values[key] = host.copy_(value, non_blocking=True)
                value.record_stream(copy_stream)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(copy_stream)
    return copied


_KINDS: dict[PausedState, type[Keep | Offload]] = {
    "keep": Keep,
    "offload": Offload,
    "drop": Drop,
}


def idle_state(pause: Pause, rule: UpdateRule) -> IdleState:
    """Return the `IdleState` that handles the state of an optimizer as ``pause`` says.

    Raises:
        ValueError: The state is to be dropped, but holds weights, or cannot be created again.
    """
    if pause.state == "drop":
        # What cannot be tried out is seen when it is dropped.
        states = recreated(rule, "state='drop'")
        has_modes = callable(getattr(rule.optimizer, "eval", None))  # schedule-free optimizers
        if has_modes or any(key in state for state in states for key in _ITERATES):
            raise ValueError(_holds_iterate(type(rule.optimizer).__name__))
    return _KINDS[pause.state]()


def _holds_iterate(what: str) -> str:
    return (
        f"Pause(state='drop') would delete state that {what} cannot create again: it holds the "
        "weights themselves or their mean. Pass 'keep' or 'offload', or an optimizer such as AdamW."
    )
