"""What a block costs in each role, and the plan that gives each block its role; numbers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Use:
    """What one block costs in one role. Bytes include the block's own input if the block holds it.

    Attributes:
        forward: The most bytes alive during its forward.
        held: The bytes alive between its forward and its backward.
        backward: The most bytes alive during its backward, its recomputation included.
        spent: The same if each gradient of a parameter is added to one that is already alive, and
            is not alive itself any more.
        flops: The FLOPs of its backward, its recomputation included.
        input: The bytes of the block's own input among those held.
    """

    forward: int
    held: int
    backward: int
    spent: int
    flops: int
    input: int = 0

    def in_backward(self, change: Callable[[int], int]) -> Use:
        """Return the same with ``change`` applied to the bytes that its backward takes."""
        return replace(self, backward=change(self.backward), spent=change(self.spent))

    def then(self, other: Use) -> Use:
        """Return the same with the backward of ``other`` after its own."""
        return replace(
            self,
            backward=max(self.backward, other.backward),
            spent=max(self.spent, other.spent),
            flops=self.flops + other.flops,
        )


@dataclass(frozen=True)
class BlockUses:
    """The costs of one block in one role.

    Attributes:
        full: The block is kept in full.
        checkpointed: The block is checkpointed.
        beside: The bytes that it holds only if it is kept in full, but can still be recomputed; in
            addition to what it is recomputed from.
    """

    full: Use
    checkpointed: Use
    beside: int = 0

    @property
    def releasable(self) -> BlockUses:
        """The same if a block that is kept in full can still be recomputed in the backward pass.

        So it also holds what it is recomputed from, and has the larger of the two backward passes.
        """
        full, other = self.full, self.checkpointed
        more = self.beside + other.held - (other.input if full.input else 0)
        full = replace(
            full,
            forward=full.forward + more,
            held=full.held + more,
            backward=max(full.backward + more, other.backward),
            spent=max(full.spent + more, other.spent),
            input=max(full.input, other.input),
        )
        return replace(self, full=full, beside=0)


@dataclass(frozen=True)
class BlockCost:
    """The costs of one block in each role.

    Attributes:
        lowest: The block trains, and the backward pass ends there.
        active: The block trains and passes the gradient on.
        idle: The block passes the gradient on, but does not train.
        below: The most bytes alive during its forward if it records no graph.
        gradients: The bytes of the gradients of its allocated parameters.
    """

    lowest: BlockUses
    active: BlockUses
    idle: BlockUses
    below: int
    gradients: int

    @property
    def releasable(self) -> BlockCost:
        """The same in each role; see `BlockUses.releasable`."""
        lowest, active = self.lowest.releasable, self.active.releasable
        return replace(self, lowest=lowest, active=active, idle=self.idle.releasable)


@dataclass(frozen=True)
class Plan:
    """Which blocks train, and which blocks that the gradient passes through are checkpointed."""

    active: frozenset[int]
    checkpointed: frozenset[int] = frozenset()

    def lowest(self, blocks: int) -> int:
        """Return the block at which the backward pass ends; ``blocks`` if none trains."""
        return min(self.active, default=blocks)
