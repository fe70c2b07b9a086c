"""Telling the user of steps of another optimizer over modules which are inactive at times.

It may be a stranger, or the wrapped optimizer itself, which a loop must no longer step.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dynalora_optim._base.claims import is_claimed, is_owner, owners, owners_of
from dynalora_optim._base.torch_private import parameter_slots
from dynalora_optim._grouping import Owner
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.state._placeholders import is_rehearsal
from dynalora_optim.update._wrappable import optimizers_within

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
    if owners_of(optimizer):
        _look_at_wrapped(optimizer)
        return
    _known.add(optimizer)
    if _makes_or_leads_to_choices(optimizer):
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


def _look_at_wrapped(optimizer: Optimizer) -> None:
    """Tell the user of a step that does not come from the owner, which lends other groups."""
    shared = [
        owner
        for owner in owners_of(optimizer)
        if isinstance(owner, Owner) and owner.param_groups is optimizer.param_groups
    ]
    # torch.distributed.checkpoint steps what it saves, and changes nothing.
    if shared and not is_rehearsal(optimizer.param_groups, optimizer.state):
        _known.add(optimizer)
        logger.warning(
            "step() of the wrapped %s was called instead of step() of its "
            "DynamicAllocationOptimizer: no other modules are chosen, so that only those that are "
            "active now train. Pass the DynamicAllocationOptimizer to whatever makes the steps "
            "(the loop, GradScaler.step, accelerator.prepare, Lookahead), or call its close() "
            "first.",
            type(optimizer).__name__,
        )


def _makes_or_leads_to_choices(optimizer: Optimizer) -> bool:
    """Return whether ``optimizer`` is an owner or a wrapped one, or has one within it."""
    found = [optimizer]
    for one in found:  # which grows
        if is_owner(one) or is_claimed(one):
            return True
        within = (item for items in optimizers_within(one).values() for item in items)
        found += [item for item in within if all(item is not known for known in found)]
    return False


def _has_one_of(held: set[int], group: ModuleGroup) -> bool:
    # A parameter that has left its place is no business of the other optimizer.
    return any(id(parameter_slots(s.owner).get(s.attribute)) in held for s in group.slots)
