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

Several lists of blocks (an encoder and a decoder, a tower for images and one for text) form one
sequence, in the order in which they run. What a block costs can depend on the list in which the
backward pass ends: if that is the encoder, a decoder block also passes a gradient to the encoder's
output. So each list in which a backward pass can end has a *route* with numbers of its own. In it
the gradient reaches all blocks of a list that reads what an earlier list of the route has made. Of
any other list, such as a second tower, it reaches the blocks from the lowest one up that trains; if
none trains there, the list runs without a graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dynalora_optim.allocation._loop import ALONE, Loop
from dynalora_optim.allocation._plan import BlockCost, BlockUses, Plan, Use

__all__ = ["BlockCost", "BlockUses", "Costs", "Plan", "Use"]


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
        first: The first block of this route: what runs before it records no graph.
        own: Ranges (first, stop) of blocks in which the gradient goes no further down than to the
            lowest block of the range that trains.
        routes: The costs of the routes that end in a later list, each with its ``first``.
        order: For each block its position in the model's definition; ``()`` if that is the same.
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
    first: int = 0
    own: tuple[tuple[int, int], ...] = ()
    routes: tuple[Costs, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def all_active(self) -> Plan:
        """The plan in which every block trains and none is checkpointed, as in plain LoRA."""
        return Plan(self.trainable)

    def at(self, lowest: int) -> Costs:
        """Return the costs of the route on which ``lowest`` is the lowest block that trains."""
        for number, route in reversed([*enumerate(self.routes)]):
            if lowest >= route.first:
                return replace(
                    route,
                    routes=self.routes[number + 1 :],
                    loop=self.loop,
                    pinned=self.pinned,
                    group_blocks=self.group_blocks,
                )
        return self

    def route_of(self, plan: Plan) -> tuple[Costs, int]:
        """Return the costs of the route of ``plan``, and the lowest block the gradient reaches."""
        lowest = plan.lowest(len(self.blocks))
        here = self.at(lowest)
        return here, here.first if here.prefix and plan.active else lowest

    def in_model(self, blocks: Collection[int]) -> frozenset[int]:
        """Return the positions of these blocks in the model's definition."""
        return frozenset(self.positions[block] for block in blocks)

    @property
    def positions(self) -> Sequence[int]:
        """The position of each block in the model's definition."""
        return self.order or range(len(self.blocks))

    @property
    def trainable(self) -> frozenset[int]:
        """The blocks in which something can train; the last one if nothing in any block can."""
        everyone = range(len(self.group_blocks))
        return self.blocks_of(everyone) or frozenset({len(self.blocks) - 1})

    @property
    def choosable(self) -> frozenset[int]:
        """The blocks that hold groups; those in which something can train if no block does."""
        return frozenset(b for b in self.group_blocks if b is not None) or self.trainable

    def lowest_blocks(self) -> list[int]:
        """Return the possible lowest blocks: none is above a block that always trains.

        A block that always trains is one only if there is something to choose from there up.
        If what comes before the blocks of a route trains, the gradient reaches the first of them in
        any case; this one then stands for the route, whether it trains or not.
        """
        highest = min(self.reached, max(self.choosable))
        found = [block for block in sorted(self.trainable) if block <= highest]
        is_first = highest == self.reached and highest not in self.trainable  # of the last route
        return found + [highest] * is_first

    @property
    def reached(self) -> int:
        """The block to which the gradient goes down in any case; their number if there is none."""
        last = self.routes[-1] if self.routes else self
        always = self.pinned | ({last.first} if last.prefix else set())
        return min(always, default=len(self.blocks))

    def role(self, block: int, lowest: int, *, active: bool) -> BlockUses:
        """Return the costs of ``block`` when the backward pass ends at ``lowest``."""
        cost = self.blocks[block]
        if block == lowest and not self.prefix:
            return cost.lowest
        return cost.active if active else cost.idle

    def roles(self, plan: Plan) -> Iterator[tuple[int, BlockUses]]:
        """Yield the blocks that the gradient reaches, from the lowest up, and their roles."""
        here, lowest = self.route_of(plan)
        ends = [(f, s, min(plan.active & {*range(f, s)}, default=s)) for f, s in here.own]
        for block in range(lowest, len(self.blocks)):
            active = block in plan.active
            end = next((end for f, s, end in ends if f <= block < s), lowest)
            if block == end > lowest:
                yield block, here.blocks[block].lowest
            elif block >= end:
                yield block, here.role(block, lowest, active=active)

    def uses(self, plan: Plan) -> Iterator[tuple[int, Use]]:
        """Yield the blocks that the gradient reaches, from the lowest up, and what each costs."""
        for block, role in self.roles(plan):
            yield block, role.checkpointed if block in plan.checkpointed else role.full

    def base(self, lowest: int) -> int:
        """Return the bytes that stay alive after the blocks' forward and that no block holds."""
        base = self.forward_base + self.loop.stale
        if lowest > self.first or self.prefix:
            return base
        lowest_role = self.blocks[lowest].lowest
        held_in_any_case = min(lowest_role.full.input, lowest_role.checkpointed.input)
        return base - min(self.entry, held_in_any_case)

    def peak(self, plan: Plan) -> int:
        """Return the most bytes alive at any time of a step, in addition to weights and batch.

        With a budget on everything, the state of what is active counts too.
        """
        here, lowest = self.route_of(plan)
        state = here.loop.resident.of_active(here.gradients(plan))
        return here.loop.carried + state + max(here._moments(plan, lowest))

    def _moments(self, plan: Plan, lowest: int) -> Iterator[int]:
        """Yield the bytes alive at the moments of a step, if its route is this one."""
        base, back = self.base(lowest), self.backward_base
        held = self.prefix.held if self.prefix else 0
        trained = self.outer_gradients + self.gradients(plan)
        standing, waiting = trained * self.loop.standing, trained * self.loop.waiting
        grown = above = (self.head_gradients + self.gradients(plan)) * self.loop.grows
        reached = dict(self.uses(plan))
        yield self.before + self.loop.stale + standing
        for block in range(self.first, len(self.blocks)):
            cost, use = self.blocks[block], reached.get(block)
            if use is None:
                yield base + held + cost.below + standing
                continue
            above -= cost.gradients * (block in plan.active) * self.loop.grows
            yield base + held + use.forward + standing
            yield back + held + self.in_backward(use) + waiting + above + self.kept
            held += use.held
        forward, backward = self.after_blocks(base)
        yield held + max(forward + standing, backward + waiting)
        if self.loop.followers:
            yield held + self.left_beside + self.loop.stale + self.loop.later(plan.active)
        if self.prefix:
            yield back + self.in_backward(self.prefix) + waiting + grown + self.kept
        yield trained + self.loop.temporary(self.gradients(plan))

    def in_backward(self, use: Use) -> int:
        """Return the most bytes that this part holds itself during its backward."""
        return use.backward if self.loop.grows else use.spent

    @property
    def left_beside(self) -> int:
        """What the forward leaves alive beside what the blocks hold."""
        return self.backward_base + self.head.held + self.output_alone

    def after_blocks(self, base: int) -> tuple[int, int]:
        """Return the most bytes beside what the blocks hold: of forward and loss, and backward."""
        alone = self.output_alone if self.loop.keeps_output else 0
        alive = self.left_beside + self.loop.stale
        backward = self.backward_base + self.in_backward(self.head) + alone + self.outside
        return max(base + self.head.forward, alive + self.outside), backward

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
        roles = self.roles(plan)
        smaller = [b for b, role in roles if role.checkpointed.held < role.full.held]
        return Plan(plan.active, frozenset(smaller))

    def left(self, plan: Plan) -> int:
        """Return the bytes that a forward leaves alive for its backward, its output included."""
        here, _ = self.route_of(plan)
        return here.held(plan) + here.backward_base + here.output_alone + here.outside

    def held(self, plan: Plan) -> int:
        """Return the bytes that autograd keeps at the end of the forward pass."""
        here, _ = self.route_of(plan)
        before = here.prefix.held if here.prefix else 0
        return before + sum(use.held for _, use in here.uses(plan)) + here.head.held

    def flops(self, plan: Plan) -> int:
        """Return the FLOPs of the backward pass, recomputation included."""
        here, _ = self.route_of(plan)
        return here.outer_flops + sum(use.flops for _, use in here.uses(plan))

    @property
    def outer_flops(self) -> int:
        """The FLOPs of the backward of what lies outside the blocks."""
        return self.head.flops + (self.prefix.flops if self.prefix else 0)

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

    @cached_property
    def releasable(self) -> Costs:
        """The costs if blocks that are kept in full can still be recomputed after the forward."""
        routes = tuple(route.releasable for route in self.routes)
        return replace(self, blocks=tuple(b.releasable for b in self.blocks), routes=routes)

    def in_loop(self, **changes: Any) -> Costs:
        """Return the same costs in a loop with these values."""
        return replace(self, loop=replace(self.loop, **changes))

    def in_no_loop(self) -> Costs:
        """Return the same costs for a forward and backward alone."""
        return replace(self, loop=ALONE)
