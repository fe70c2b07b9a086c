"""What is measured of one list of blocks while the model runs, and the costs that follow from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from dynalora_optim._base.live_bytes import LiveBytes
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Use

_NO_USE = Use(0, 0, 0, 0)
_NO_USES = BlockUses(_NO_USE, _NO_USE)
NO_COST = BlockCost(_NO_USES, _NO_USES, _NO_USES, below=0, gradients=0)  # of what does not run


class BlockList:
    """One list of blocks of a route; all bytes are those that this computation has made.

    Attributes:
        blocks: The positions of its blocks.
        reached: The first block that the gradient of an earlier list reaches; ``blocks.stop`` if
            it reaches none.
        anchor: The leaf at which the graph of what reads this list's outputs ends.
        costs: The costs of its blocks, each by itself.
        base: The bytes that stay alive beside the blocks in their forward.
        back: The bytes that stay alive beside the blocks in their backward.
        entry: The part of ``base`` that is the input of the first block.
        then: What the part after this list takes, up to the next one: the most bytes alive in its
            forward, and those that its backward adds.
    """

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks
        self.reached = blocks.stop
        self.anchor: Tensor | None = None
        self.costs: list[BlockCost] = []
        self.base = self.back = self.entry = 0
        self.then = _NO_USE

    def enter(self, memory: LiveBytes, anchor: Tensor, x: Tensor) -> None:
        """Note the input of the first block."""
        self.anchor = anchor
        self.entry = memory.size([x])
        self._first_input = weakref.ref(x.untyped_storage())

    def leave(self, base: int) -> None:
        """Note what was alive beside the last block."""
        self.base = base
        self.entry = self.entry if self._first_input() is not None else 0

    def add_then(self, backward: int, flops: int) -> None:
        """Count a backward of what follows this list."""
        most = max(self.then.backward, backward)
        self.then = replace(self.then, backward=most, flops=self.then.flops + flops)

    def finished(self, first: BlockList, following: BlockList | None) -> Iterator[BlockCost]:
        """Yield the costs of the blocks, relative to what is alive beside those of ``first``.

        What runs between this list and the ``following`` one belongs to this list's last block: it
        is recorded in the graph if that block is.
        """
        added = self.base - first.base
        forward, backward = added - self._held_entry(), self.back - first.back
        for position, cost in zip(self.blocks, self.costs, strict=True):
            shifted = _changed(cost, lambda use: _shifted(use, forward, backward))
            shifted = replace(shifted, below=max(cost.below + added, 0))
            if following and position == self.blocks[-1]:
                peak, back = self.then.forward - first.base, following.back - first.back
                shifted = _changed(shifted, lambda use, p=peak, b=back: self._followed(use, p, b))
                shifted = replace(shifted, below=max(shifted.below, peak))
            yield shifted

    def _held_entry(self) -> int:
        """Return the bytes of the first block's input that its graph holds in any case."""
        if self.reached > self.blocks.start:
            return 0
        roles = self.costs[0].active, self.costs[0].idle
        return min(self.entry, *(use.input for r in roles for use in (r.full, r.checkpointed)))

    def _followed(self, use: Use, peak: int, back: int) -> Use:
        """Return what the last block takes together with what follows."""
        return replace(
            use,
            forward=max(use.forward, use.held + peak),
            backward=max(use.backward, use.held + self.then.backward + back),
            flops=use.flops + self.then.flops,
        )


def finished(lists: Sequence[BlockList], count: int) -> tuple[BlockCost, ...]:
    """Return the costs of all ``count`` blocks of the model."""
    costs = [NO_COST] * count
    for number, found in enumerate(lists):
        following = lists[number + 1] if number + 1 < len(lists) else None
        costs[found.blocks.start : found.blocks.stop] = found.finished(lists[0], following)
    return tuple(costs)


def _shifted(use: Use, forward: int, backward: int) -> Use:
    moments = {"forward": use.forward + forward, "backward": use.backward + backward}
    return replace(use, **{name: max(size, 0) for name, size in moments.items()})


def _changed(cost: BlockCost, change: Callable[[Use], Use]) -> BlockCost:
    roles = {
        name: BlockUses(change(role.full), change(role.checkpointed))
        for name in ("lowest", "active", "idle")
        if (role := getattr(cost, name))
    }
    return replace(cost, **roles)
