"""Making groups active and inactive: the only writer of ``active`` flags.

An inactive module's forward uses detached parameters. ``requires_grad`` stays True for ever: a
toggle is undone by peft's own calls, crashes FSDP2 in mixed precision, and makes ranks diverge in
silence under DDP when it was False at wrap time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from dynalora_optim.allocation._choice import Choice
from dynalora_optim.groups._blocks import Block
from dynalora_optim.groups._layout import block_of
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.switching._detach import DetachedForward, has_flag
from dynalora_optim.switching._recompute import Recomputer, is_compiled


class ModuleSwitch:
    """Puts a choice into force, and decides nothing.

    Args:
        blocks: The model's blocks, in the order by which a choice numbers them.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = [block.module for block in blocks]
        self._detached: dict[str, list[DetachedForward]] = {}
        self._recomputer = Recomputer()

    def apply(self, groups: Iterable[ModuleGroup], choice: Choice) -> None:
        """Make those of ``groups`` that are chosen active, and recompute the blocks chosen."""
        self.set_flags(groups, choice.active)
        self._recomputer.recompute([self._blocks[b] for b in sorted(choice.recomputed)])

    def restore(self) -> None:
        """Give modules the parameters that an interrupted forward still holds."""
        for hooks in self._detached.values():
            for hook in hooks:
                hook.restore()

    def clear(self, groups: Iterable[ModuleGroup]) -> None:
        """Make all ``groups`` active and recompute nothing."""
        groups = list(groups)
        self.set_flags(groups, [group.name for group in groups])
        self._recomputer.recompute(())

    def close(self, groups: Iterable[ModuleGroup]) -> None:
        """Do so, and remove all hooks."""
        self.clear(groups)
        for hooks in self._detached.values():
            for hook in hooks:
                hook.remove()
        self._detached.clear()

    def set_flags(self, groups: Iterable[ModuleGroup], active: Collection[str]) -> None:
        """Make the groups named in ``active`` active, the others inactive; recompute as before."""
        for group in groups:
            for switch in self._switches(group):
                switch.active = group.name in active

    def set_gated(self, groups: Iterable[ModuleGroup], gated: Collection[str]) -> None:
        """Let compiled code depend on whether a group is active, unless ``gated`` names it."""
        for group in groups:
            for switch in self._switches(group):
                if hasattr(switch, "gated"):
                    switch.gated = group.name in gated

    def _switches(self, group: ModuleGroup) -> list[nn.Module | DetachedForward]:
        """Return what has the flags of a group: its modules, or the hooks of one that has none."""
        if group.name not in self._detached:
            self._detached[group.name] = [
                DetachedForward(module, group.slots)
                for module in group.modules
                if not has_flag(module)
            ]
        return [*filter(has_flag, group.modules), *self._detached[group.name]]

    def is_detached(self, parameter: Tensor) -> bool:
        """Return whether it belongs to a module without a flag that is inactive."""
        hooks = (hook for hooks in self._detached.values() for hook in hooks)
        return any(not hook.active and hook.holds(parameter) for hook in hooks)


def gated_groups(
    groups: Iterable[ModuleGroup], choice: Choice, blocks: Sequence[Block]
) -> set[str]:
    """Return the groups that compiled code takes a gradient for, inactive ones too.

    That is all but those in blocks that are compiled by themselves and idle as a whole: there are
    at most four kinds of code then, and an idle block costs what it does in eager mode.
    """
    places = {group.name: block_of(group, blocks) for group in groups}
    compiled = {i for i, block in enumerate(blocks) if is_compiled(block.module)}
    idle = compiled - {places[name] for name in choice.active}
    return {name for name, block in places.items() if block not in idle}
