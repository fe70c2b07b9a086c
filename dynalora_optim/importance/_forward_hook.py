"""The hook that scores a module's forward passes, and decides which passes count."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.past import Past
from dynalora_optim._base.torch_private_autograd import backward_number, repeats_pass
from dynalora_optim._base.trees import first_tensor
from dynalora_optim.groups._module_group import Slot
from dynalora_optim.importance._measures import ForwardMeasure, ForwardPass
from dynalora_optim.importance._windows import Passes, Window


class Watch:
    """The data that all hooks of one tracker share.

    Attributes:
        enabled: Whether this step is measured.
        mask: The mask of the current batch.
        passes: The scores that are not yet added to their windows.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.mask: Tensor | None = None
        self.passes = Passes()
        self._masks: Past[Tensor | None] = Past(None)  # in passes without gradients

    def note_mask(self) -> None:
        """Keep the mask of a pass without gradients, which a reentrant checkpoint may recompute."""
        self._masks.note(self.mask_of_pass())

    def mask_of_pass(self) -> Tensor | None:
        """Return the mask of the pass that runs or is recomputed."""
        return self.mask if backward_number() == -1 else self._masks.value()

    def end_step(self) -> None:
        """Forget the masks of this step's passes."""
        self._masks = Past(None)


class ForwardHook:
    """Scores the forward passes of one module and adds the scores to a window.

    It has no reference to the optimizer, so that a copy of the model, such as an EMA model, does
    not copy the optimizer.
    """

    def __init__(
        self,
        module: nn.Module,
        slots: Sequence[Slot],
        measure: ForwardMeasure,
        window: Window,
        watch: Watch,
    ) -> None:
        self._module = module
        self._slots = slots
        self._measure = measure
        self._window = window
        self._watch = watch
        self._base_output: Tensor | None = None
        self._ticket = _ticket(self)

    def keep_base_output(self, base: nn.Module, args: object, output: object) -> None:
        """Keep the output of the base layer; this is the base layer's forward hook."""
        # A checkpoint may stop recomputing within the module, which would then keep the tensor.
        if torch.compiler.is_compiling() or self._counts():
            self._base_output = first_tensor(output).detach()

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        base_output, self._base_output = self._base_output, None
        if not (module.training and torch.is_grad_enabled()):
            if not torch.compiler.is_compiling():
                self._leave_out(module)
            return
        rows = first_tensor(output)
        if torch.compiler.is_compiling():
            inputs = [x.detach() for x in args if isinstance(x, Tensor)]
            observe(self._ticket, rows.detach(), inputs, base_output)
        else:
            self.observe(args, rows, base_output)

    def _leave_out(self, module: nn.Module) -> None:
        if torch.is_grad_enabled():
            self._window.skipped = True
        elif module.training:
            self._watch.note_mask()

    def observe(
        self, inputs: tuple[object, ...], output: Tensor, base_output: Tensor | None
    ) -> None:
        """Score one pass, if it counts."""
        if not self._counts():
            return
        with torch.set_grad_enabled(False):  # half the calls of no_grad()
            mask = self._watch.mask_of_pass()
            forward = ForwardPass(self._module, inputs, output, mask, base_output)
            self._watch.passes.add(self._window, self._measure.score(forward))

    def _counts(self) -> bool:
        """Return whether this step is measured, and the pass that runs is not a recomputation."""
        return self._watch.enabled and self._can_train() and not repeats_pass()

    def _can_train(self) -> bool:
        """Return whether the group has a parameter that can train in this pass.

        peft sets ``requires_grad`` of the adapters that are not in use to False. The pass is then
        none of their optimizer. A tensor that replaces a parameter for a forward does not tell.
        """
        for slot in self._slots:
            tensor = slot.tensor
            if not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
                return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_ticket"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ticket = _ticket(self)


_numbers = itertools.count()
_hooks: weakref.WeakValueDictionary[int, ForwardHook] = weakref.WeakValueDictionary()


def _ticket(hook: ForwardHook) -> Tensor:
    """Return a number for ``hook``, as a tensor so that all hooks compile to the same code."""
    number = next(_numbers)
    _hooks[number] = hook
    return torch.tensor(number, device="cpu")


# Compiled code calls this operator instead of containing what a hook does. So a change of the mask,
# the window or the measured steps does not cause a recompilation. The operator is declared to
# change its ticket, which it does not do, because torch.compile removes a call without an effect.
@torch.library.custom_op("dynalora_optim::observe", mutates_args=("ticket",))
def observe(
    ticket: Tensor, output: Tensor, inputs: Sequence[Tensor], base_output: Tensor | None
) -> None:
    """Score a pass with the hook that has this number."""
    hook = _hooks.get(int(ticket))
    if hook is not None:
        hook.observe(tuple(inputs), output, base_output)
