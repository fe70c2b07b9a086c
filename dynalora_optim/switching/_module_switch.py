"""Making groups active and inactive; only this file sets ``active`` flags.

An inactive module's forward uses detached parameters. ``requires_grad`` always stays True: changing
it would be undone by peft's own calls, would crash FSDP2 in mixed precision, and would let ranks
diverge without an error under DDP if it was False when DDP was built.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from dynalora_optim.allocation._choice import Choice
from dynalora_optim.groups._blocks import Block
from dynalora_optim.groups._layout import blocks_of
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.switching._detach import DetachedForward, has_flag
from dynalora_optim.switching._former_flags import Flagged, FormerFlags
from dynalora_optim.switching._idle_slots import end_interrupted
from dynalora_optim.switching._recompute import Recomputer, can_keep, is_compiled


class ModuleSwitch:
    """Applies a choice to the modules; it decides nothing itself.

    Args:
        blocks: The model's blocks, in the order by which a choice numbers them.
        holds: Whether a choice decides for every block, so that the user's own checkpoints of
            blocks are held off or on; else these stay as they are.

    Attributes:
        held: The blocks whose own checkpoints are held.
        former: What was active in forwards whose backward is still to come.
    """

    def __init__(self, blocks: Sequence[Block], *, holds: bool = False) -> None:
        self._blocks = [block.module for block in blocks]
        self._detached: dict[str, list[DetachedForward]] = {}
        self._recomputer = Recomputer()
        self.former = FormerFlags()
        self.held = self._blocks if holds else []

    def apply(self, groups: Iterable[ModuleGroup], choice: Choice) -> None:
        """Make the chosen ``groups`` active, the others inactive; recompute the chosen blocks."""
        self.set_flags(groups, choice.active)
        self.recompute(choice.recomputed)

    def recompute(self, blocks: Collection[int], *, keeping: Collection[int] = ()) -> None:
        """Recompute the blocks at these positions, and no others.

        Those of ``keeping`` are recomputed only if what they keep is released.
        """
        chosen, keeps = ([self._blocks[b] for b in sorted(some)] for some in (blocks, keeping))
        self._recomputer.recompute(chosen, keeping=keeps, among=self.held)

    def can_keep(self, block: int) -> bool:
        """Return whether the block at this position can be one that keeps; see `recompute`."""
        return can_keep(self._blocks[block])

    def release(self) -> None:
        """Drop what such blocks keep of the forwards so far; their backward recomputes it."""
        self._recomputer.kept.release()

    def restore(self) -> None:
        """Put back the parameters that an interrupted forward has replaced."""
        end_interrupted()
        for hooks in self._detached.values():
            for hook in hooks:
                hook.restore()

    def clear(self, groups: Iterable[ModuleGroup]) -> None:
        """Make all ``groups`` active and recompute nothing."""
        groups = list(groups)
        self.set_flags(groups, [group.name for group in groups])
        self._recomputer.recompute(())

    def close(self, groups: Iterable[ModuleGroup]) -> None:
        """Make all ``groups`` active, recompute nothing, and remove all hooks."""
        self.former.forget()
        self.clear(groups)
        for hooks in self._detached.values():
            for hook in hooks:
                hook.remove()
        self._detached.clear()

    def set_flags(self, groups: Iterable[ModuleGroup], active: Collection[str]) -> None:
        """Make the groups named in ``active`` active, the others inactive, and change no block."""
        for group in groups:
            for module, switch in self._switches(group):
                self.former.change(module, switch, active=group.name in active)

    def set_gated(self, groups: Iterable[ModuleGroup], gated: Collection[str]) -> None:
        """Use gates in the groups that ``gated`` names; other groups compile once per state."""
        for group in groups:
            for _, switch in self._switches(group):
                if hasattr(switch, "gated"):
                    switch.gated = group.name in gated

    def _switches(self, group: ModuleGroup) -> list[tuple[nn.Module, Flagged]]:
        """Return the modules of a group, each with what has its flag: itself, or hooks of it."""
        bare = [module for module in group.modules if not has_flag(module)]
        if group.name not in self._detached:
            self._detached[group.name] = [DetachedForward(m, group.slots) for m in bare]
        flagged = ((module, module) for module in filter(has_flag, group.modules))
        return [*flagged, *zip(bare, self._detached[group.name], strict=True)]

    def replace(self, group: ModuleGroup) -> None:
        """Detach the parameters of ``group``, which holds more than the one of the same name."""
        for hook in self._detached.get(group.name, ()):
            hook.active = True  # as the next `apply` finds new hooks
            hook.slots = group.slots

    def is_detached(self, parameter: Tensor) -> bool:
        """Return whether ``parameter`` belongs to an inactive module that hooks detach."""
        hooks = (hook for hooks in self._detached.values() for hook in hooks)
        return any(not hook.active and hook.holds(parameter) for hook in hooks)


def gated_groups(
    groups: Sequence[ModuleGroup], choice: Choice, blocks: Sequence[Block]
) -> set[str]:
    """Return the groups for which compiled code always computes a gradient, also while inactive.

    These are all groups except those in blocks that are compiled by themselves and idle as a whole.
    So at most four versions of code are compiled, and an idle block costs what it costs in eager
    mode.
    """
    names = [group.name for group in groups]
    places = dict(zip(names, blocks_of(groups, blocks), strict=True))
    compiled = {i for i, block in enumerate(blocks) if is_compiled(block.module)}
    idle = compiled - {places[name] for name in choice.active}
    return {name for name, block in places.items() if block not in idle}
