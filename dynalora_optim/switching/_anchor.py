"""Keeping DistributedDataParallel synchronised although inactive parameters have no gradient.

DDP waits for every parameter that it was built with. An inactive parameter is not used in the
forward, so DDP would wait for ever (or need ``find_unused_parameters``, which searches the graph at
each step). The anchor is an identity on the output of one active module that has the inactive
parameters as further inputs. So their hooks run in the backward pass, without any computation.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.past import Past
from dynalora_optim._base.torch_private import active_ddp, parameters_reduced
from dynalora_optim._base.torch_private_autograd import in_backward
from dynalora_optim._base.trees import first_tensor, replaced
from dynalora_optim.groups._module_group import ModuleGroup


class _Tie(torch.autograd.Function):
    """The identity on ``y``, with ``parameters`` as further inputs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, zeros: bool, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters] if zeros else []
        ctx.count = len(parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # With static_graph=True DDP records in the first pass which parameters get a gradient, and
        # later waits for these only: so all get zeros. Otherwise no gradient is needed.
        if not ctx.shapes:
            return gradient, *[None] * (1 + ctx.count)
        return gradient, None, *(gradient.new_zeros(()).expand(shape) for shape in ctx.shapes)


class Anchor:
    """Ties the parameters of the inactive groups to the output of an active module, the carrier.

    The hooks stay on every module that can be the carrier, because moving hooks would make
    torch.compile recompile. Compiled code needs no anchor: its gates keep all parameters in the
    graph.
    """

    def __init__(self) -> None:
        self._idle: list[Tensor] = []
        self.carrier: nn.Module | None = None
        self.has_met_ddp = False  # whether a forward ran within DDP, which averages gradients
        self._handles: list[RemovableHandle] = []
        self._ddp: Past[weakref.ref[DistributedDataParallel] | None] = Past(None)
        # By each DDP that was checked: the parameters that were frozen then.
        self._checked: weakref.WeakKeyDictionary[DistributedDataParallel, list[Tensor]] = (
            weakref.WeakKeyDictionary()
        )

    def attach(self, groups: Sequence[ModuleGroup]) -> None:
        """Let ``groups`` be carriers too, in addition to those attached before."""
        self._checked.clear()  # DDP does not know what was added to the model since
        for group in groups:
            self._handles.append(group.modules[-1].register_forward_hook(_Tied(self)))

    def move(self, carrier: ModuleGroup | None, idle: Sequence[ModuleGroup]) -> None:
        """Tie ``idle`` to the last module of ``carrier``, which is active and always runs.

        It is None while the user keeps all groups frozen, so that DDP waits for none of them.
        """
        # The parameters themselves, not their places: in a module that is running, tensors may
        # temporarily replace them there.
        self._idle = [parameter for group in idle for parameter in group.parameters()]
        self.carrier = carrier.modules[-1] if carrier else None

    def remove(self) -> None:
        """Remove the hooks from all carriers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def tied(self, output: Any) -> Any:
        """Return the tied ``output`` of the carrier; None outside a forward of DDP, or if not tied.

        The recomputation of a checkpoint counts as a part of that forward.
        """
        ddp = self._current_ddp()  # also without gradients: the forward of a reentrant checkpoint
        y = first_tensor(output)
        if ddp is None or not (torch.is_grad_enabled() and y.requires_grad):
            return None
        self._check(ddp)
        if not self._idle:
            return None
        parameters = [parameter for parameter in self._idle if parameter.requires_grad]
        new = _Tie.apply(y, bool(ddp.static_graph), *parameters)  # type: ignore[no-untyped-call]
        return replaced(output, y, new)

    def _current_ddp(self) -> DistributedDataParallel | None:
        if not in_backward():  # a recomputation comes after DDP's forward
            ddp = active_ddp()
            self._ddp.note(None if ddp is None else weakref.ref(ddp))
            self.has_met_ddp |= ddp is not None
        found = self._ddp.value()
        return found() if found else None

    def _check(self, ddp: DistributedDataParallel) -> None:
        """Raise if DDP was built while some parameters were frozen; it never averages these."""
        frozen = self._checked.get(ddp)
        if frozen is not None and not any(parameter.requires_grad for parameter in frozen):
            return
        averaged = [
            parameter
            for name, parameter in ddp.module.named_parameters()
            if name not in ddp.parameters_to_ignore
        ]
        trainable = sum(parameter.requires_grad for parameter in averaged)
        known = parameters_reduced(ddp)
        if known < trainable:
            raise RuntimeError(
                f"DistributedDataParallel was built while only {known} of the {trainable} "
                "parameters that now have requires_grad=True had it; it would never synchronise "
                "the others. Set requires_grad=True on all parameters that can train, before "
                "DistributedDataParallel or accelerator.prepare; DynamicAllocationOptimizer keeps "
                "inactive ones from changing. If you unfreeze some later, build "
                "DistributedDataParallel anew then."
            )
        self._checked[ddp] = [p for p in averaged if not p.requires_grad]


class _Tied:
    """The forward hook of a carrier, with a weak reference to the anchor; its copies have none."""

    def __init__(self, anchor: Anchor | None = None) -> None:
        self._anchor = weakref.ref(anchor) if anchor else None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        anchor = self._anchor() if self._anchor else None
        return anchor.tied(output) if anchor and module is anchor.carrier else None

    def __reduce__(self) -> tuple[type[_Tied], tuple[()]]:
        return _Tied, ()
