"""The hook that scores a module's forward passes, and which passes count."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynalora_optim._measures import ForwardMeasure, ForwardPass
from dynalora_optim._windows import Window


class Watch:
    """What all hooks of one tracker share: whether this step is measured, and its mask."""

    def __init__(self) -> None:
        self.enabled = True
        self.mask: Tensor | None = None


class ForwardHook:
    """Scores the forward passes of one module into a window.

    It holds nothing else, so that a copy of the model (an EMA, say) carries no optimizer with it.
    """

    def __init__(self, measure: ForwardMeasure, window: Window, watch: Watch) -> None:
        self._measure = measure
        self._window = window
        self._watch = watch
        self._base_output: Tensor | None = None
        self._unrepeated = 0  # forward passes that a checkpoint may recompute in the backward

    def keep_base_output(self, base: nn.Module, args: object, output: object) -> None:
        """Forward hook of the base layer."""
        self._base_output = first_tensor(output).detach()

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        base_output, self._base_output = self._base_output, None
        if not (self._watch.enabled and module.training and torch.is_grad_enabled()):
            return
        if self._is_recomputation():
            return
        rows = first_tensor(output).detach()
        with torch.no_grad():
            forward = ForwardPass(module, args, rows, self._watch.mask, base_output)
            self._window.add(self._measure.score(forward))

    def _is_recomputation(self) -> bool:
        # Non-reentrant checkpoints run the forward again inside the backward, after a first pass
        # that counted. Reentrant ones make their first pass without gradients, which did not.
        if torch._C._current_graph_task_id() == -1:
            self._unrepeated += 1
            return False
        if self._unrepeated == 0:
            return False
        self._unrepeated -= 1
        return True

    def end_step(self) -> None:
        """Forget this step's forward passes; no later backward will recompute them."""
        self._unrepeated = 0


def first_tensor(output: object) -> Tensor:
    """The output of a module, or the first item of its tuple or dict (transformers' blocks)."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output
    return first_tensor(next(iter(items)))  # type: ignore[call-overload]
