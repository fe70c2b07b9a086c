"""Updates within the backward pass, so that at most one gradient is alive at a time.

A loop that clips, unscales or accumulates gradients needs all of them at once, after the backward
pass. The optimizer cannot ask whether a loop does so, but one ordinary step, the rehearsal, shows
it: a gradient arrives twice, or is written to before the step. A loop that begins later meets a
`SpentGradient` in place of each gradient that is already used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.collectives import world_size
from dynalora_optim.update._backward import refusal
from dynalora_optim.update._param_groups import ParamGroup
from dynalora_optim.update._spent import SpentGradient

Update: TypeAlias = Callable[[Tensor, int], bool]


class FusedBackward:
    """Updates each parameter as soon as its gradient exists, and frees the gradient.

    Attributes:
        is_rehearsed: Whether the first ordinary step has been done, so that updates are fused.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._positions: dict[Tensor, int] = {}
        self.is_rehearsed = False
        self._forget()

    def attach(self, groups: Sequence[ParamGroup], update: Update) -> None:
        """Handle the gradients of the parameters of ``groups``, and of no others.

        Args:
            groups: The param groups.
            update: A method, kept by a weak reference. It is called with a parameter that has its
                gradient, and the position of the parameter's group, and returns whether it has used
                the gradient.
        """
        self.remove()
        self._update = weakref.WeakMethod(update)
        self._positions = {p: i for i, group in enumerate(groups) for p in group["params"]}
        for parameter in self._positions:
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

    def _arrive(self, parameter: Tensor) -> None:
        self._arrived.add(parameter)
        if self.is_rehearsed:
            gradient, update = parameter.grad, self._update()
            spent = None
            if gradient is not None and update and update(parameter, self._positions[parameter]):
                spent = SpentGradient.of(gradient)
            parameter.grad = spent
        elif parameter.grad is not None:
            self._marks[parameter] = _mark(parameter.grad)

    def drop_spent(self) -> None:
        """Delete what stands in for the gradients of this backward pass."""
        for parameter in self._arrived if self.is_rehearsed else ():
            if isinstance(parameter.grad, SpentGradient):
                parameter.grad = None

    def check(self) -> None:
        """Raise if a fused update would not have used the gradients as they are now.

        Raises:
            RuntimeError: They were accumulated or changed, or ranks average them.
        """
        if self._twice:
            raise RuntimeError(refusal("gradients were accumulated over several backward passes"))
        if world_size() > 1:
            raise RuntimeError(refusal("ranks average their gradients after the backward pass"))
        if any(self._changed()):
            raise RuntimeError(
                refusal(
                    "gradients were changed between backward() and step(), as clip_grad_norm_ and "
                    "GradScaler do"
                )
            )

    def end_step(self) -> set[Tensor]:
        """Start the next step, which is fused; return the parameters updated in this backward."""
        updated = self._arrived if self.is_rehearsed else set()
        self.is_rehearsed |= bool(self._arrived)
        self._forget()
        return updated

    def _changed(self) -> Iterator[bool]:
        # A write alone is no change: the Trainer always clips, to a norm of inf if it is not asked
        # to, and thereby multiplies by 1.
        for parameter, before in self._marks.items():
            if parameter.grad is None:
                yield True
            else:
                yield not torch.allclose(_mark(parameter.grad), before, 0, 0, equal_nan=True)

    def _forget(self) -> None:
        self._marks: dict[Tensor, Tensor] = {}  # after the backward pass
        self._arrived: set[Tensor] = set()
        self._twice = False


def _mark(gradient: Tensor) -> Tensor:
    """Return numbers that change if a value of ``gradient`` changes."""
    gradient = gradient.detach()
    values = (gradient.coalesce().values() if gradient.is_sparse else gradient).flatten().float()
    places = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float32)
    return torch.stack([values.sum(), values.square().sum(), (values * places).sum()])
