"""The groups that an optimizer drives, by role, and other optimizers that drive them already."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim._base.claims import owners, owners_of
from dynalora_optim.allocation._context import Allocator, CostAware
from dynalora_optim.groups._blocks import model_blocks
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.groups._rules import GroupRule, find_groups
from dynalora_optim.switching._detach import has_flag
from dynalora_optim.update._param_groups import (
    ParameterIndex,
    ParamGroup,
    flatten,
    match_always_active,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grouping:
    """The module groups of a model, by role.

    Attributes:
        index: The group of each parameter.
        allocated: The groups to choose among.
        frozen: The groups that never train.
        always_active: The groups that always train.
        waiting: The groups that are frozen now, and join when the user unfreezes them.
    """

    index: ParameterIndex
    allocated: Sequence[ModuleGroup]
    frozen: Sequence[ModuleGroup]
    always_active: Sequence[ModuleGroup]
    waiting: Sequence[ModuleGroup]

    @staticmethod
    def of(
        model: nn.Module, rule: GroupRule, always_active: Sequence[str], optimizer: Optimizer
    ) -> Grouping:
        """Find the groups, and check that ``optimizer`` can train them.

        Raises:
            TypeError: ``rule`` or ``always_active`` is of another type.
            ValueError: There are no groups, or the optimizer does not hold their parameters.
        """
        parameters = flatten(optimizer.param_groups)
        groups = held_groups(model, rule, parameters)
        index = ParameterIndex(model, groups)
        index.check_belongs(parameters)
        exempt = match_always_active(always_active, groups)
        waiting = index.check_groups(parameters, named=exempt)
        left_out = {*exempt, *(group.name for group in waiting)}

        def of_role(role: str) -> list[ModuleGroup]:
            return [g for g in groups if g.role == role and g.name not in left_out]

        named = [group for group in groups if group.name in exempt]
        return Grouping(
            index,
            of_role("allocated"),
            of_role("frozen"),
            named + of_role("always_active"),
            waiting,
        )

    def groups(self) -> Iterator[ModuleGroup]:
        """Yield all groups."""
        yield from self.allocated
        yield from self.frozen
        yield from self.always_active


def held_groups(
    model: nn.Module, rule: GroupRule, parameters: Iterable[Tensor]
) -> list[ModuleGroup]:
    """Return the module groups of ``model``, with those of their ``parameters`` that are held.

    Another optimizer may train the other parameters of a module: another adapter of a peft layer,
    or the vectors beside the matrices. A group without any stays as it is, and so does a module
    whose flag is for all its parameters.

    Raises:
        TypeError: ``rule`` is not a rule.
        ValueError: There are no groups.
    """
    held = set(map(id, parameters))
    groups = []
    for group in find_groups(model, rule):
        slots = tuple(slot for slot in group.slots if id(slot.parameter) in held)
        is_divisible = bool(slots) and not any(map(has_flag, group.modules))
        groups.append(replace(group, slots=slots) if is_divisible else group)
    return groups


@dataclass(frozen=True)
class Joining:
    """Parameters that join a run, and their groups.

    Attributes:
        index: The module group of each parameter, from then on.
        groups: The groups that hold any of these parameters.
        new: Those of them that are allocated from then on.
        order: The names of all groups of the model, in forward order.
    """

    index: ParameterIndex
    groups: list[ModuleGroup]
    new: list[ModuleGroup]
    order: list[str]

    @property
    def names(self) -> list[str]:
        """The names of the new groups."""
        return [group.name for group in self.new]

    @staticmethod
    def of(
        model: nn.Module,
        rule: GroupRule,
        held: Sequence[Tensor],
        parameters: Sequence[Tensor],
        known: Collection[str],
    ) -> Joining:
        """Find the groups of ``parameters``, which join those ``held`` in the ``known`` groups.

        Raises:
            ValueError: A parameter is not in the model.
        """
        found = held_groups(model, rule, [*held, *parameters])
        index = ParameterIndex(model, found)
        index.check_belongs(parameters)
        groups = index.groups_of(parameters)
        new = [g for g in groups if g.role == "allocated" and g.name not in known]
        return Joining(index, groups, new, [group.name for group in found])


def log_waiting(grouping: Grouping, parameters: Iterable[Tensor]) -> None:
    """Log a warning that names the groups that are frozen, by whether ``parameters`` has them."""
    held = set(map(id, parameters))
    lacking = [g for g in grouping.waiting if held.isdisjoint(map(id, g.parameters()))]
    others = [g for g in grouping.waiting if g not in lacking]
    remedy_of = " and call add_param_group() with their parameters, which the optimizer lacks"
    for found, remedy in ((others, ""), (lacking, remedy_of)):
        if found:
            logger.warning(
                "requires_grad is False for every parameter of %d module group(s), such as %s: "
                "they do not train. If you set requires_grad=True later%s, they join.",
                len(found),
                found[0].name,
                remedy,
            )


@runtime_checkable
class Owner(Protocol):
    """An optimizer that drives module groups."""

    param_groups: list[ParamGroup]

    @property
    def allocator(self) -> Allocator:
        """What chooses the active groups."""
        ...

    def driven_groups(self) -> list[ModuleGroup]:
        """Return the groups that the optimizer makes active and inactive."""
        ...

    def close(self) -> None:
        """Stop driving these groups."""
        ...


def owners_to_replace(
    model: nn.Module, grouping: Grouping, optimizer: Optimizer, needs_costs: bool
) -> list[Owner]:
    """Return the optimizers that already drive ``optimizer``, or parameters of ``grouping``.

    Args:
        model: The adapted model.
        grouping: The groups of a new optimizer.
        optimizer: What it wraps.
        needs_costs: Whether it has a `Budget`.

    Raises:
        ValueError: One of them also drives module groups that are not in ``grouping``, or trains
            other parameters of the same modules; or one that stays trains in the same blocks, and
            one of the two has a `Budget`.
    """
    groups = [*grouping.groups(), *grouping.waiting]
    mine = _places(groups)
    own = owners_of(optimizer)
    found = [owner for owner in owners() if isinstance(owner, Owner)]
    # By places: another rule puts the same parameters into groups of other modules.
    former = [o for o in found if o in own or mine & _places(o.driven_groups())]
    for owner in former:
        _check_replaceable(owner, groups, optimizer)
    others = [owner for owner in found if owner not in former]
    _check_costs(model, groups, [o for o in others if needs_costs or _needs_costs(o)])
    return former


def _check_replaceable(owner: Owner, groups: Sequence[ModuleGroup], optimizer: Optimizer) -> None:
    """Raise if ``owner`` has something to train that ``optimizer`` does not have."""
    theirs, mine = owner.driven_groups(), _places(groups)
    left = [group.name for group in theirs if not _places([group]) <= mine]
    if left:
        raise ValueError(
            f"another DynamicAllocationOptimizer drives {len(theirs)} module groups; this one "
            f"would take over {len(theirs) - len(left)} of them, but not {left[0]}. close() "
            "the other one first, or give each optimizer its own groups with groups=callable."
        )
    trained = {id(p) for group in groups for p in group.parameters()}
    trained &= set(map(id, flatten(owner.param_groups)))
    if trained and trained.isdisjoint(map(id, flatten(optimizer.param_groups))):
        raise ValueError(
            "another DynamicAllocationOptimizer trains other parameters of the same modules, such "
            f"as {groups[0].name}. Its flag active holds for the whole module, so that two "
            "optimizers cannot choose apart. Pass one optimizer that holds all these parameters, "
            "in several param groups."
        )


def _needs_costs(owner: Owner) -> bool:
    return isinstance(owner.allocator, CostAware)


def _check_costs(model: nn.Module, groups: Sequence[ModuleGroup], others: Sequence[Owner]) -> None:
    """Raise if ``others`` have groups in the blocks of ``groups``: a `Budget` would not know it."""
    if not others:
        return
    mine = {module for group in groups for module in group.modules}
    inside = [set(block.module.modules()) for block in model_blocks(model, must=False)]
    shared = set[nn.Module]().union(*(block for block in inside if not mine.isdisjoint(block)))
    for group in (group for other in others for group in other.driven_groups()):
        # An adapter that waits outside of the model has its base modules in the blocks.
        if not shared.isdisjoint(part for module in group.modules for part in module.modules()):
            raise ValueError(
                "a Budget decides for whole blocks, but two DynamicAllocationOptimizers train in "
                f"the same blocks, such as at {group.name}, so that it would not know what the "
                "other one takes. Use an allocator without a memory budget in both, or wrap one "
                "optimizer that holds all these parameters (Muon with its own AdamW, for example)."
            )


def replace_owners(former: Iterable[Owner]) -> None:
    """Close the ``former`` optimizers, because a new one replaces them, and log a warning."""
    for owner in former:
        owner.close()
        logger.warning(
            "a new DynamicAllocationOptimizer takes over the %d module groups of an earlier one, "
            "which is closed.",
            len(owner.driven_groups()),
        )


def _places(groups: Iterable[ModuleGroup]) -> set[tuple[int, str]]:
    return {(id(slot.owner), slot.attribute) for group in groups for slot in group.slots}
