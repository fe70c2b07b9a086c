"""Updates within the backward pass, so that at most one gradient is alive at a time.

A loop that clips, unscales or accumulates gradients needs all of them at once, after the backward
pass. The optimizer cannot ask whether a loop does so, but one ordinary step, the rehearsal, shows
it: a gradient arrives twice, or is written to before the step. A loop that begins later meets a
`SpentGradient` in place of each gradient that is already used. `step` must find these in their
places, and the options of the param groups as they were in the backward pass. After the step they
stay until the loop sets its gradients to zero, as the gradients would.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.collectives import world_size
from dynalora_optim._base.torch_private import version_of
from dynalora_optim.update._backward import refusal
from dynalora_optim.update._param_groups import ParamGroup
from dynalora_optim.update._pieces import NOT_OPTIONS
from dynalora_optim.update._spent import SpentGradient

_NOT_ZEROED = (
    "the gradients of the step before, which are used, were not set to zero; call zero_grad() "
    "after each step()"
)


class Receive(Protocol):
    """A method that is told of each gradient."""

    def __call__(self, parameter: Tensor, position: int, *, now: bool) -> ParamGroup | None:
        """Take note of the gradient of ``parameter``, and update ``parameter`` ``now`` if asked to.

        Args:
            parameter: A parameter that has its gradient.
            position: The position of its group among those of `FusedBackward.attach`.
            now: Whether to use the gradient at once.

        Returns:
            The user's param group whose options count; None if the parameter is not active.
        """
        ...


class FusedBackward:
    """Updates each parameter as soon as its gradient exists, and frees the gradient.

    Attributes:
        is_rehearsed: Whether the first ordinary step has been done, so that updates are fused.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._places: dict[Tensor, tuple[int, str]] = {}  # its group's position, and its name
        self._former: dict[Tensor, SpentGradient] = {}  # of the step before
        self.is_rehearsed = False
        self._forget()

    def _forget(self) -> None:
        self._marks: dict[Tensor, Tensor] = {}  # after the backward pass
        self._spent: dict[Tensor, SpentGradient] = {}
        self._options: list[tuple[ParamGroup, dict[str, _Used]]] = []  # in the backward pass
        self._arrived: set[Tensor] = set()
        self._twice = False

    def attach(self, groups: Sequence[ParamGroup], receive: Receive) -> None:
        """Handle the gradients of the parameters of ``groups``, and of no others.

        Args:
            groups: The param groups, with the names of their parameters.
            receive: A method, kept by a weak reference.
        """
        self.remove()
        self._receive = weakref.WeakMethod(receive)
        self._places = {
            parameter: (position, name)
            for position, group in enumerate(groups)
            for parameter, name in zip(group["params"], group["param_names"], strict=True)
        }
        for parameter in self._places:
            if parameter.requires_grad:
                self._handles += [
                    parameter.register_hook(partial(self._expect, parameter)),  # type: ignore[no-untyped-call]
                    parameter.register_post_accumulate_grad_hook(self._arrive),  # type: ignore[no-untyped-call]
                ]

    def remove(self) -> None:
        """Remove the hooks from all parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def _expect(self, parameter: Tensor, gradient: Tensor) -> None:
        """Look at a gradient before it is added to the former one."""
        self._twice |= parameter in self._arrived
        if self._twice and self.is_rehearsed:
            raise RuntimeError(refusal("a second backward pass came before step()"))
        former = self._former.get(parameter)
        if former is not None and parameter.grad is former:
            if not former.is_zeroed:
                raise RuntimeError(refusal(_NOT_ZEROED))
            parameter.grad = None

    def _arrive(self, parameter: Tensor) -> None:
        self._arrived.add(parameter)
        gradient, receive = parameter.grad, self._receive()
        if gradient is None or receive is None:
            return
        position, _ = self._places[parameter]
        group = receive(parameter, position, now=self.is_rehearsed)
        if group is not None and all(group is not known for known, _ in self._options):
            self._options.append((group, _options_of(group)))
        if not self.is_rehearsed:
            self._marks[parameter] = _mark(gradient)
        elif group is None:
            parameter.grad = None
        else:
            self._spent[parameter] = parameter.grad = SpentGradient.of(gradient)

    def drop_spent(self) -> None:
        """Delete what stands in for gradients that are used; zeros of the loop become zeros."""
        for parameter, spent in {**self._former, **self._spent}.items():
            if parameter.grad is spent:
                parameter.grad = torch.zeros_like(parameter) if spent.is_zeroed else None
        self._former, self._spent = self._spent, {}

    def check(self, groups: Sequence[ParamGroup]) -> None:
        """Raise if an update after the backward pass would differ from one within it.

        Args:
            groups: The user's param groups.

        Raises:
            RuntimeError: Since the gradients came, they were accumulated, changed or deleted, or
                an option was set; or ranks average the gradients; or gradients are used twice.
        """
        for parameter, former in self._former.items():
            if parameter.grad is former and not former.is_zeroed:
                raise RuntimeError(refusal(_NOT_ZEROED))
        if not self._arrived:
            return
        if self._twice:
            raise RuntimeError(refusal("gradients were accumulated over several backward passes"))
        if world_size() > 1:
            raise RuntimeError(refusal("ranks average their gradients after the backward pass"))
        for group, used in self._options:
            _check_options(group, used, groups)
        if names := [self._places[parameter][1] for parameter in self._missing()]:
            raise RuntimeError(
                refusal(
                    f"the gradients of {len(names)} parameter(s), such as {names[0]}, were deleted "
                    "or replaced between backward() and step(), as zero_grad() does"
                )
            )
        if any(self._changed()):
            raise RuntimeError(
                refusal(
                    "gradients were changed between backward() and step(), as clip_grad_norm_ and "
                    "GradScaler do"
                )
            )

    def end_step(self) -> set[Tensor]:
        """Start the next step, which is fused; return the parameters updated in this backward."""
        for parameter, spent in self._former.items():
            if parameter.grad is None:
                parameter.grad = spent
        self.is_rehearsed |= bool(self._arrived)
        self._forget()
        return set(self._former)

    def _missing(self) -> Iterator[Tensor]:
        """Yield the parameters without the gradient of this backward, or what stands in for it."""
        yield from (parameter for parameter in self._marks if parameter.grad is None)
        for parameter, spent in self._spent.items():
            if parameter.grad is not spent or not spent.is_whole():
                yield parameter

    def _changed(self) -> Iterator[bool]:
        # A write alone is no change: the Trainer always clips, to a norm of inf if it is not asked
        # to, and thereby multiplies by 1.
        for parameter, before in self._marks.items():
            assert parameter.grad is not None
            yield not torch.allclose(_mark(parameter.grad), before, 0, 0, equal_nan=True)


class _Used(NamedTuple):
    """An option as it was in the backward pass; schedulers write into rates that are tensors."""

    option: Any
    value: Any
    version: int  # of a tensor

    @classmethod
    def of(cls, option: Any) -> _Used:
        if isinstance(option, Tensor):
            return cls(option, option.detach().clone(), version_of(option))
        return cls(option, option, 0)

    def is_still(self, option: Any) -> bool:
        """Return whether ``option`` is equal; waits for a device only if it was written to."""
        is_written = isinstance(option, Tensor) and version_of(option) != self.version
        if option is self.option and not is_written:
            return True
        return bool(torch.as_tensor(self.value == option).all())


def _options_of(group: ParamGroup) -> dict[str, _Used]:
    """Return the options of ``group`` as they are now."""
    return {key: _Used.of(value) for key, value in group.items() if key not in NOT_OPTIONS}


def _check_options(group: ParamGroup, used: dict[str, _Used], groups: Sequence[ParamGroup]) -> None:
    """Raise unless ``group`` is one of ``groups`` and has the options that were ``used``."""
    line = next((line for line, known in enumerate(groups) if known is group), None)
    if line is None:
        raise RuntimeError(
            refusal(
                "param groups were replaced between backward() and step(), as load_state_dict() "
                "does; do this before backward()"
            )
        )
    for key, option in used.items():
        if not option.is_still(now := group.get(key)):
            raise RuntimeError(
                refusal(
                    f"{key!r} of param group {line} was changed from {option.value} to {now} "
                    "between backward() and step(); set it before backward()"
                )
            )


def _mark(gradient: Tensor) -> Tensor:
    """Return numbers that change if a value of ``gradient`` changes."""
    gradient = gradient.detach()
    values = (gradient.coalesce().values() if gradient.is_sparse else gradient).flatten().float()
    places = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float32)
    return torch.stack([values.sum(), values.square().sum(), (values * places).sum()])
