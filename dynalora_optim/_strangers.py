"""Telling the user of another optimizer that trains modules which are inactive at times."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dynalora_optim._base.claims import is_claimed, is_owner, owners
from dynalora_optim._base.torch_private import parameter_slots
from dynalora_optim._grouping import Owner
from dynalora_optim.groups._module_group import ModuleGroup

logger = logging.getLogger(__name__)

_watching: list[Any] = []  # the handle of the hook, once there is one
_known: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def watch_strangers() -> None:
    """Look at each optimizer of the process at its first step from now on."""
    _known.clear()  # an optimizer that was no stranger may be one now
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if optimizer in _known:
        return
    _known.add(optimizer)
    if is_owner(optimizer) or is_claimed(optimizer):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for owner in owners():
        if not isinstance(owner, Owner):
            continue
        groups = owner.driven_groups()
        both = [group.name for group in groups if _has_one_of(held, group)]
        if both:
            logger.warning(
                "%s trains %d of the %d module groups that a DynamicAllocationOptimizer drives, "
                "such as %s. While that makes a module inactive, the module gets no gradient and "
                "does not train. Call close() of the DynamicAllocationOptimizer first.",
                type(optimizer).__name__,
                len(both),
                len(groups),
                both[0],
            )


def _has_one_of(held: set[int], group: ModuleGroup) -> bool:
    # A parameter that has left its place is no business of the other optimizer.
    return any(id(parameter_slots(s.owner).get(s.attribute)) in held for s in group.slots)
