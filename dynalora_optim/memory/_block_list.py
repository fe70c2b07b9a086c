"""What is measured of one list of blocks while the model runs, and the costs from that."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynalora_optim._base.live_bytes import LiveBytes
from dynalora_optim._base.trees import tensors
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Use
from dynalora_optim.groups._blocks import Block
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.memory._block_run import Call, wanted
from dynalora_optim.memory._stand_ins import block_input

_NO_USE = Use(0, 0, 0, 0, 0)
_NO_USES = BlockUses(_NO_USE, _NO_USE)
NO_COST = BlockCost(_NO_USES, _NO_USES, _NO_USES, below=0, gradients=0)  # of what does not run


@dataclass(frozen=True)
class Layout:
    """The blocks of a model in the order in which they run, and the allocated groups.

    Attributes:
        blocks: The blocks.
        homes: For each group the position of its block, or None; see `Costs`.
        members: For each block the groups that it holds.
        allocated: The ids of the parameters of all groups.
    """

    blocks: Sequence[Block]
    homes: Sequence[int | None]
    members: Sequence[Sequence[ModuleGroup]]
    allocated: frozenset[int]

    @staticmethod
    def of(
        blocks: Sequence[Block], groups: Sequence[ModuleGroup], homes: Sequence[int | None]
    ) -> Layout:
        """Return the layout of ``groups``, which have these ``homes``."""
        members: list[list[ModuleGroup]] = [[] for _ in blocks]
        for group, home in zip(groups, homes, strict=True):
            if home is not None:
                members[home].append(group)
        allocated = (id(p) for group in groups for p in group.parameters())
        return Layout(blocks, homes, members, frozenset(allocated))

    def pinned(self) -> frozenset[int]:
        """Return the blocks that always train, whichever groups are active."""
        return frozenset(
            position
            for position, block in enumerate(self.blocks)
            if any(
                p.requires_grad and id(p) not in self.allocated for p in block.module.parameters()
            )
        )


class BlockList:
    """One list of blocks of a route; all bytes are those that this computation has made.

    Attributes:
        blocks: The positions of its blocks.
        reached: The first block that the gradient of an earlier list reaches; ``blocks.stop`` if
            it reaches none.
        anchors: For each block, the leaf at which the graph of what reads its output ends.
        read: The last block whose output anything else reads, the loss or a later list. Blocks
            above it never get a gradient.
        costs: The costs of its blocks, each by itself.
        stays: The bytes that the backward of each block leaves alive; see `Run`.
        base: The bytes that stay alive beside the blocks in their forward.
        back: The bytes that stay alive beside the blocks in their backward.
        entry: The part of ``base`` that is the input of the first block.
        then: What the part after this list takes, up to the next one: the most bytes alive in its
            forward, and those that its backward adds.
    """

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks
        self.reached = blocks.stop
        self.read = blocks.start - 1
        self.anchors: list[Tensor] = []
        self.costs: list[BlockCost] = []
        self.stays: list[int] = []
        self.base = self.back = self.entry = 0
        self.then = _NO_USE

    def enter(self, memory: LiveBytes, x: Tensor) -> None:
        """Note the input of the first block."""
        self.entry = memory.size([x])
        self._first_input = weakref.ref(x.untyped_storage())

    def leave(self, base: int) -> None:
        """Note what was alive beside the last block."""
        self.base = base
        self.entry = self.entry if self._first_input() is not None else 0

    def new_anchor(self) -> Tensor:
        """Return the anchor of the next block."""
        self.anchors.append(wanted(torch.zeros((), requires_grad=True)))
        return self.anchors[-1]

    def note_read(self, ends: Iterable[Tensor]) -> None:
        """Note that something reads what leads to these leaves."""
        found = set(map(id, ends))
        read = (
            i for i, anchor in enumerate(self.anchors, self.blocks.start) if id(anchor) in found
        )
        self.read = max(self.read, *read, self.read)

    def call(self, position: int, args: Any, kwargs: Any, *, is_reached: bool) -> Call:
        """Return how the block at ``position`` is called; see `Call` for ``is_reached``."""
        x, is_first = block_input(args, kwargs), position == self.blocks.start
        return Call(
            args,
            kwargs,
            shared=[t for t in tensors((args, kwargs)) if t is not x and t.requires_grad],
            is_reached=position >= self.reached or is_reached,
            input_passes=x.requires_grad or not is_first,
            is_last=position == self.blocks[-1],
        )

    @property
    def unread(self) -> range:
        """The blocks that never get a gradient."""
        return range(self.read + 1, self.blocks.stop)

    def add_then(self, use: Use) -> None:
        """Count a backward of what follows this list."""
        self.then = self.then.then(use)

    def finished(self, first: BlockList, following: BlockList | None) -> Iterator[BlockCost]:
        """Yield the costs of the blocks, relative to what is alive beside those of ``first``.

        What runs between this list and the ``following`` one belongs to the last block that it
        reads: it is recorded in the graph if that block is.
        """
        added = self.base - first.base
        forward, backward = added - self._held_entry(), self.back - first.back
        for position, cost in zip(self.blocks, self.costs, strict=True):
            shifted = _changed(cost, lambda use: _shifted(use, forward, backward))
            shifted = replace(shifted, below=max(cost.below + added, 0))
            if position in self.unread:
                shifted = _changed(shifted, lambda use: replace(use, backward=0, spent=0, flops=0))
            if following and position == max(self.read, self.blocks.start):
                peak, back = self.then.forward - first.base, following.back - first.back
                shifted = _changed(shifted, partial(self._followed, peak=peak, back=back))
                shifted = replace(shifted, below=max(shifted.below, peak))
            yield shifted

    def _held_entry(self) -> int:
        """Return the bytes of the first block's input that its graph holds in any case."""
        if self.reached > self.blocks.start:
            return 0
        roles = self.costs[0].active, self.costs[0].idle
        return min(self.entry, *(use.input for r in roles for use in (r.full, r.checkpointed)))

    def _followed(self, use: Use, *, peak: int, back: int) -> Use:
        """Return what the last block takes together with what follows."""
        following = self.then.in_backward(lambda most: use.held + most + back)
        return replace(use, forward=max(use.forward, use.held + peak)).then(following)


def anchors_of(lists: Iterable[BlockList]) -> list[Tensor]:
    """Return the leaves at which the graphs of what reads these lists end."""
    return [anchor for found in lists for anchor in found.anchors]


def finished(lists: Sequence[BlockList], count: int) -> tuple[BlockCost, ...]:
    """Return the costs of all ``count`` blocks of the model."""
    costs = [NO_COST] * count
    for number, found in enumerate(lists):
        following = lists[number + 1] if number + 1 < len(lists) else None
        costs[found.blocks.start : found.blocks.stop] = found.finished(lists[0], following)
    return tuple(_beside_what_stays(lists, costs))


def after_all(lists: Sequence[BlockList], prefix: Use | None) -> Use | None:
    """Return the costs of what comes before the blocks, whose backward is the last one."""
    return prefix and _later(prefix, sum(sum(found.stays) for found in lists))


def _beside_what_stays(lists: Sequence[BlockList], costs: Sequence[BlockCost]) -> list[BlockCost]:
    """Return the ``costs`` with what the backward of blocks above each has left alive."""
    left = {p: stays for one in lists for p, stays in zip(one.blocks, one.stays, strict=True)}
    above, found = 0, []
    for position in reversed(range(len(costs))):
        found.append(_changed(costs[position], partial(_later, left=above)))
        above += left.get(position, 0)
    return found[::-1]


def _later(use: Use, left: int) -> Use:
    return use.in_backward(lambda backward: backward + left)


def _shifted(use: Use, forward: int, backward: int) -> Use:
    use = replace(use, forward=max(use.forward + forward, 0))
    return use.in_backward(lambda most: max(most + backward, 0))


def _changed(cost: BlockCost, change: Callable[[Use], Use]) -> BlockCost:
    lowest, active, idle = (
        replace(role, full=change(role.full), checkpointed=change(role.checkpointed))
        for role in (cost.lowest, cost.active, cost.idle)
    )
    return replace(cost, lowest=lowest, active=active, idle=idle)
