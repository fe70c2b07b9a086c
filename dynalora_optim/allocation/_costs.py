"""What a choice of blocks costs: peak bytes and backward FLOPs, predicted from measured numbers.

A backward pass reaches down to the lowest block that trains and no further. Every block from there
up is either kept in full, or checkpointed: it keeps its input and is recomputed. With h_j the bytes
that block j holds between its forward and its backward, and f_b, w_b the most bytes that are alive
within its own forward and backward,

    peak = max over blocks b of  { base + sum_{j<b} h_j + f_b,
                                   base + sum_{j<b} h_j + w_b + gradients above b }

and the same for what comes after the blocks (the head and the loss). All are measured, none guessed
(`_profile`). This file knows numbers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Use:
    """What one block costs in one role. Bytes include the block's own input where it is held.

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
    """The cost of one block in one place of the backward graph, kept in full or checkpointed."""

    full: Use
    checkpointed: Use


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block wherever it stands.

    Attributes:
        lowest: It trains, and no gradient goes further down.
        active: It trains and passes the gradient on.
        idle: It passes the gradient on.
        below: The most bytes alive during its forward when it records no graph.
        gradients: The bytes of the gradients of its allocated parameters.
    """

    lowest: BlockUses
    active: BlockUses
    idle: BlockUses
    below: int
    gradients: int


@dataclass(frozen=True)
class Plan:
    """Which blocks train, and which of those the gradient passes through are checkpointed."""

    active: frozenset[int]
    checkpointed: frozenset[int] = frozenset()

    def lowest(self, blocks: int) -> int:
        """Return the block, of so many, at which the backward pass ends."""
        return min(self.active, default=blocks)


@dataclass(frozen=True)
class Costs:
    """What every choice costs.

    Attributes:
        blocks: The blocks in forward order.
        group_blocks: The block of each allocated group; None for one after the blocks, which
            costs next to nothing and is always chosen.
        pinned: The blocks that train whatever is chosen.
        head: What comes after the blocks, the loss included.
        forward_base: The bytes that outlive the blocks' forward (masks, position tables).
        backward_base: Those of them that are still alive in the backward pass.
        entry: Those of them that are block 0's input, which its graph may hold as well.
        head_gradients: The bytes of the gradients of what trains after the blocks.
        prefix: What trains before the blocks (embeddings), if any.
        batch: The elements of the largest batch measured.
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

    @property
    def all_active(self) -> Plan:
        """Every block trains and is kept as it is, as in plain LoRA."""
        return Plan(frozenset(range(len(self.blocks))))

    def lowest_blocks(self) -> range:
        """Where the backward pass may end: not above a block that trains in any case."""
        if self.prefix:
            return range(1)
        return range(min(self.pinned, default=len(self.blocks) - 1) + 1)

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
        """Return the bytes that outlive the blocks' forward, beside what the blocks hold."""
        if lowest or self.prefix:
            return self.forward_base
        lowest_role = self.blocks[0].lowest
        held_in_any_case = min(lowest_role.full.input, lowest_role.checkpointed.input)
        return self.forward_base - min(self.entry, held_in_any_case)

    def peak(self, plan: Plan) -> int:
        """Return the most bytes alive at any moment of a step, above weights and batch."""
        uses = dict(self.uses(plan))
        held = self.prefix.held if self.prefix else 0
        below = self.blocks[: plan.lowest(len(self.blocks))]
        base = self.base(plan.lowest(len(self.blocks)))
        moments = [base + held + block.below for block in below]
        above = self.head_gradients + sum(self.blocks[b].gradients for b in plan.active)
        for block, use in uses.items():
            above -= self.blocks[block].gradients * (block in plan.active)
            moments.append(base + held + use.forward)
            moments.append(self.backward_base + held + use.backward + above)
            held += use.held
        moments.append(base + held + self.head.forward)
        moments.append(self.backward_base + held + self.head.backward)
        if self.prefix:
            gradients = self.head_gradients + self.gradients(plan)
            moments.append(self.backward_base + self.prefix.backward + gradients)
        return max(moments)

    def held(self, plan: Plan) -> int:
        """Return the bytes that autograd keeps at the end of the forward pass."""
        return sum(use.held for _, use in self.uses(plan)) + self.head.held

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
        """The bytes of the gradients of what trains outside the blocks."""
        return self.head_gradients + (self.prefix.backward if self.prefix else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers as plain dicts and lists."""
        return {**asdict(self), "pinned": sorted(self.pinned)}

    def check(self, modules: int) -> None:
        """Raise unless these can be the costs of so many modules.

        Raises:
            ValueError: They are of other modules, or not numbers of bytes and FLOPs.
        """
        may_lack = {"group_blocks", "prefix"}
        parts = [getattr(self, f.name) for f in fields(self) if f.name not in may_lack]
        parts += [part for part in (*self.group_blocks, self.prefix) if part is not None]
        if (
            not all(
                type(number) is int and 0 <= number < 2**63 for number in _numbers(tuple(parts))
            )
            or len(self.group_blocks) != modules
            or not {*self.group_blocks, *self.pinned} <= {None, *range(len(self.blocks))}
            or not self.flops(self.all_active)
        ):
            raise ValueError("state_dict has costs of other modules, or no costs at all.")

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Costs:
        """Return what `state_dict` was taken from.

        Raises:
            ValueError: It is not of that form.
        """
        try:
            return Costs(
                **{
                    **state,
                    "blocks": tuple(map(_block_cost, state["blocks"])),
                    "group_blocks": tuple(state["group_blocks"]),
                    "pinned": frozenset(state["pinned"]),
                    "head": Use(**state["head"]),
                    "prefix": Use(**state["prefix"]) if state["prefix"] else None,
                }
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"state_dict has costs of another form: {error!r}.") from error


def _numbers(tree: Any) -> Iterator[Any]:
    """Yield the numbers, or what stands in their place, in dataclasses and collections of them."""
    if is_dataclass(tree):
        tree = tuple(getattr(tree, field.name) for field in fields(tree))
    if isinstance(tree, (tuple, frozenset)):  # no list: that would stand where a number must be
        for item in tree:
            yield from _numbers(item)
    else:
        yield tree


def _block_cost(state: dict[str, Any]) -> BlockCost:
    roles = {
        name: BlockUses(Use(**state[name]["full"]), Use(**state[name]["checkpointed"]))
        for name in ("lowest", "active", "idle")
    }
    return BlockCost(**{**state, **roles})
