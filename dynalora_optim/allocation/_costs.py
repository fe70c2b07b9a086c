"""What a choice of blocks costs: peak bytes and backward FLOPs, predicted from measured numbers.

A backward pass ends at the lowest block that trains. Every block from there up is either kept in
full, or checkpointed: it keeps only its input and is recomputed. Let h_j be the bytes that block j
holds between its forward and its backward, and f_b, w_b the most bytes that are alive within the
forward and the backward of block b. Then

    peak = max over blocks b of  { base + sum_{j<b} h_j + f_b,
                                   base + sum_{j<b} h_j + w_b + gradients above b }

and the same for the part after the blocks (the head and the loss). All these numbers are measured,
in ``memory/_block_profiler.py``. What the loop keeps alive beside them (gradients, the output,
other forwards) is in a `Loop`. This file computes with numbers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dynalora_optim.allocation._loop import ALONE, Loop


@dataclass(frozen=True)
class Use:
    """What one block costs in one role. Bytes include the block's own input if the block holds it.

    Attributes:
        forward: The most bytes alive during its forward.
        held: The bytes alive between its forward and its backward.
        backward: The most bytes alive during its backward, its recomputation included.
        flops: The FLOPs of its backward, its recomputation included.
        input: The bytes of the block's own input among those held.
    """

    forward: int
    held: int
    backward: int
    flops: int
    input: int = 0


@dataclass(frozen=True)
class BlockUses:
    """The costs of one block in one role, kept in full or checkpointed."""

    full: Use
    checkpointed: Use


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


@dataclass(frozen=True)
class Plan:
    """Which blocks train, and which blocks that the gradient passes through are checkpointed."""

    active: frozenset[int]
    checkpointed: frozenset[int] = frozenset()

    def lowest(self, blocks: int) -> int:
        """Return the block at which the backward pass ends; ``blocks`` if none trains."""
        return min(self.active, default=blocks)


@dataclass(frozen=True)
class Costs:
    """The measured numbers that give the costs of every choice.

    Attributes:
        blocks: The costs of the blocks in forward order.
        group_blocks: The block of each allocated group; None for a group after the blocks, which
            costs almost nothing and is always chosen.
        pinned: The blocks that always train, whichever groups are active.
        head: The costs of the part after the blocks, the loss included.
        forward_base: The bytes that stay alive after the blocks' forward, such as masks and
            position tables.
        backward_base: The part of ``forward_base`` that is still alive in the backward pass.
        entry: The part of ``forward_base`` that is the input of block 0, which the graph of block 0
            may hold too.
        head_gradients: The bytes of the gradients of parameters after the blocks.
        prefix: The costs of the part before the blocks (embeddings) if it trains.
        batch: The number of elements of the batch that was measured.
        before: The most bytes alive before the blocks, such as in a frozen tower for images.
        prefix_gradients: The bytes of the gradients of parameters before the blocks.
        output: The bytes of what the model returns, without the loss.
        output_alone: The part of ``output`` that the graph does not hold.
        outside: What a loss that the model does not compute itself is assumed to take.
        loop: What the loop keeps alive beside a forward and its backward.
    """

    blocks: tuple[BlockCost, ...]
    group_blocks: tuple[int | None, ...]
    pinned: frozenset[int]
    head: Use
    forward_base: int
    backward_base: int
    entry: int
    head_gradients: int
    prefix: Use | None
    batch: int
    before: int = 0
    prefix_gradients: int = 0
    output: int = 0
    output_alone: int = 0
    outside: int = 0
    loop: Loop = ALONE

    @property
    def all_active(self) -> Plan:
        """The plan in which every block trains and none is checkpointed, as in plain LoRA."""
        return Plan(self.trainable | ({0} if self.prefix else set()))

    @property
    def trainable(self) -> frozenset[int]:
        """The blocks in which something can train; the last one if nothing in any block can."""
        everyone = range(len(self.group_blocks))
        return self.blocks_of(everyone) or frozenset({len(self.blocks) - 1})

    def lowest_blocks(self) -> list[int]:
        """Return the possible lowest blocks: none is above a block that always trains."""
        if self.prefix:
            return [0]
        highest = min(self.pinned, default=len(self.blocks) - 1)
        return [block for block in sorted(self.trainable) if block <= highest]

    def role(self, block: int, lowest: int, *, active: bool) -> BlockUses:
        """Return the costs of ``block`` when the backward pass ends at ``lowest``."""
        cost = self.blocks[block]
        if block == lowest and not self.prefix:
            return cost.lowest
        return cost.active if active else cost.idle

    def uses(self, plan: Plan) -> Iterator[tuple[int, Use]]:
        """Yield the blocks that the gradient reaches, from the lowest up, and what each costs."""
        lowest = plan.lowest(len(self.blocks))
        for block in range(lowest, len(self.blocks)):
            role = self.role(block, lowest, active=block in plan.active)
            yield block, role.checkpointed if block in plan.checkpointed else role.full

    def base(self, lowest: int) -> int:
        """Return the bytes that stay alive after the blocks' forward and that no block holds."""
        base = self.forward_base + self.loop.stale
        if lowest or self.prefix:
            return base
        lowest_role = self.blocks[0].lowest
        held_in_any_case = min(lowest_role.full.input, lowest_role.checkpointed.input)
        return base - min(self.entry, held_in_any_case)

    def peak(self, plan: Plan) -> int:
        """Return the most bytes alive at any time of a step, in addition to weights and batch.

        With a budget on everything, the state of what is active counts too.
        """
        lowest = plan.lowest(len(self.blocks))
        base, back = self.base(lowest), self.backward_base
        held = self.prefix.held if self.prefix else 0
        trained = self.outer_gradients + self.gradients(plan)
        standing = trained if self.loop.standing else 0
        below = [base + held + block.below for block in self.blocks[:lowest]]
        moments = [moment + standing for moment in (self.before + self.loop.stale, *below)]
        above = self.head_gradients + self.gradients(plan)
        for block, use in self.uses(plan):
            above -= self.blocks[block].gradients * (block in plan.active)
            moments.append(base + held + use.forward + standing)
            moments.append(back + held + use.backward + (standing or above) + self.kept)
            held += use.held
        moments.append(held + self.after_blocks(base, lowest) + standing)
        if self.prefix:
            gradients = standing or self.head_gradients + self.gradients(plan)
            moments.append(back + self.prefix.backward + gradients + self.kept)
        moments.append(trained + self.update(self.gradients(plan)))
        state = self.loop.resident.of_active(self.gradients(plan))
        return self.loop.carried + state + max(moments)

    def update(self, gradients: int) -> int:
        """Return the temporary bytes of an update of blocks whose gradients have so many bytes."""
        return max(self.loop.update, self.loop.resident.temporary(gradients))

    def after_blocks(self, base: int, lowest: int) -> int:
        """Return the most bytes alive after the blocks' forward, besides what the blocks hold."""
        alone = self.output_alone if self.loop.keeps_output else 0
        left = base + self.head.held + self.output_alone
        moments = [
            base + self.head.forward,
            left + self.outside,
            self.backward_base + self.head.backward + alone + self.outside,
        ]
        if self.loop.later:
            moments.append(left + self.loop.later[lowest])
        return max(moments)

    @property
    def kept(self) -> int:
        """The bytes of the model's output that may be alive while the blocks run backward."""
        return self.output if self.loop.keeps_output else 0

    @property
    def whole_peak(self) -> int:
        """The peak of the whole step with all modules active and nothing checkpointed."""
        return self.loop.reference or self.peak(self.all_active)

    def sparing(self, active: Collection[int]) -> Plan:
        """Return the plan in which these blocks train and the forward leaves the least alive."""
        plan = Plan(frozenset(active))
        lowest = min(active, default=0)
        roles = {b: self.role(b, lowest, active=b in plan.active) for b, _ in self.uses(plan)}
        smaller = [b for b, role in roles.items() if role.checkpointed.held < role.full.held]
        return Plan(plan.active, frozenset(smaller))

    def left(self, plan: Plan) -> int:
        """Return the bytes that a forward leaves alive for its backward, its output included."""
        base = self.base(plan.lowest(len(self.blocks))) - self.loop.stale
        return base + self.held(plan) + self.output_alone + self.outside

    def held(self, plan: Plan) -> int:
        """Return the bytes that autograd keeps at the end of the forward pass."""
        before = self.prefix.held if self.prefix else 0
        return before + sum(use.held for _, use in self.uses(plan)) + self.head.held

    def flops(self, plan: Plan) -> int:
        """Return the FLOPs of the backward pass, recomputation included."""
        outer = self.head.flops + (self.prefix.flops if self.prefix else 0)
        return outer + sum(use.flops for _, use in self.uses(plan))

    def recomputed(self, plan: Plan) -> int:
        """Return the FLOPs of the recomputation alone."""
        kept = Plan(plan.active)
        return self.flops(plan) - self.flops(kept)

    def gradients(self, plan: Plan) -> int:
        """Return the bytes of the gradients of the blocks that train."""
        return sum(self.blocks[block].gradients for block in plan.active)

    def blocks_of(self, groups: Collection[int]) -> frozenset[int]:
        """Return the blocks that train when the ``groups`` (by position) are active."""
        places = (self.group_blocks[group] for group in groups)
        return self.pinned | {place for place in places if place is not None}

    @property
    def outer_gradients(self) -> int:
        """The bytes of the gradients of the parameters outside the blocks."""
        return self.head_gradients + self.prefix_gradients

    def in_loop(self, **changes: Any) -> Costs:
        """Return the same costs in a loop with these values."""
        return replace(self, loop=replace(self.loop, **changes))

    def in_no_loop(self) -> Costs:
        """Return the same costs for a forward and backward alone."""
        return replace(self, loop=ALONE)
