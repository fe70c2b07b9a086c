"""The hook that scores a module's forward passes, and which passes count."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.torch_private import in_backward
from dynalora_optim.importance._measures import ForwardMeasure, ForwardPass
from dynalora_optim.importance._windows import Passes, Window


class Watch:
    """What all hooks of one tracker share.

    Attributes:
        enabled: Whether this step is measured.
        mask: The mask of the batch in hand.
        passes: What has been measured and is still to be added up.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.mask: Tensor | None = None
        self.passes = Passes()


class ForwardHook:
    """Scores the forward passes of one module into a window.

    It holds nothing else, so that a copy of the model (an EMA, say) carries no optimizer with it.
    """

    def __init__(
        self, module: nn.Module, measure: ForwardMeasure, window: Window, watch: Watch
    ) -> None:
        self._module = module
        self._measure = measure
        self._window = window
        self._watch = watch
        self._base_output: Tensor | None = None
        self._unrepeated = 0  # forward passes that a checkpoint may recompute in the backward
        self._ticket = _ticket(self)

    def keep_base_output(self, base: nn.Module, args: object, output: object) -> None:
        """Forward hook of the base layer."""
        self._base_output = first_tensor(output).detach()

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        base_output, self._base_output = self._base_output, None
        if not (module.training and torch.is_grad_enabled()):
            return
        rows = first_tensor(output)
        if torch.compiler.is_compiling():
            inputs = [x.detach() for x in args if isinstance(x, Tensor)]
            observe(self._ticket, rows.detach(), inputs, base_output)
        else:
            self.observe(args, rows, base_output)

    def observe(
        self, inputs: tuple[object, ...], output: Tensor, base_output: Tensor | None
    ) -> None:
        """Score one pass, if passes count now."""
        if not self._watch.enabled or self._is_recomputation():
            return
        with torch.no_grad():
            forward = ForwardPass(self._module, inputs, output, self._watch.mask, base_output)
            self._watch.passes.add(self._window, self._measure.score(forward))

    def _is_recomputation(self) -> bool:
        # Non-reentrant checkpoints run the forward again inside the backward, after a first pass
        # that counted. Reentrant ones make their first pass without gradients, which did not.
        if not in_backward():
            self._unrepeated += 1
            return False
        if self._unrepeated == 0:
            return False
        self._unrepeated -= 1
        return True

    def end_step(self) -> None:
        """Forget this step's forward passes; no later backward will recompute them."""
        self._unrepeated = 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_ticket"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ticket = _ticket(self)


_numbers = itertools.count()
_hooks: weakref.WeakValueDictionary[int, ForwardHook] = weakref.WeakValueDictionary()


def _ticket(hook: ForwardHook) -> Tensor:
    """Return the number of ``hook`` as compiled code takes it: the same code for every hook."""
    number = next(_numbers)
    _hooks[number] = hook
    return torch.tensor(number, device="cpu")


# What a hook does is no part of the compiled code but a call out of it, so that whatever changes
# there (the mask, the window, which steps count) compiles nothing anew. Said to change its ticket,
# which it does not: torch.compile leaves out what has no effect.
@torch.library.custom_op("dynalora_optim::observe", mutates_args=("ticket",))
def observe(
    ticket: Tensor, output: Tensor, inputs: Sequence[Tensor], base_output: Tensor | None
) -> None:
    """Have the hook of this number score a pass of its module."""
    hook = _hooks.get(int(ticket))
    if hook is not None:
        hook.observe(tuple(inputs), output, base_output)


def first_tensor(output: object) -> Tensor:
    """The output of a module, or the first item of its tuple or dict (transformers' blocks)."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output
    return first_tensor(next(iter(items)))  # type: ignore[call-overload]
