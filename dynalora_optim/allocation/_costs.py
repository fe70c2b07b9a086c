"""What a choice of blocks costs: peak bytes and backward FLOPs, predicted from measured numbers.

A backward pass ends at the lowest block that trains. Every block from there up is either kept in
full, or checkpointed: it keeps only its input and is recomputed. Let h_j be the bytes that block j
holds between its forward and its backward, and f_b, w_b the most bytes that are alive within the
forward and the backward of block b. Then

    peak = max over blocks b of  { base + sum_{j<b} h_j + f_b,
                                   base + sum_{j<b} h_j + w_b + gradients above b }

and the same for the part after the blocks (the head and the loss). All these numbers are measured,
in ``memory/_block_profiler.py``. This file computes with numbers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any


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
        batch: The number of elements of the largest batch that was measured.
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
        """The plan in which every block trains and none is checkpointed, as in plain LoRA."""
        return Plan(frozenset(range(len(self.blocks))))

    def lowest_blocks(self) -> range:
        """Return the possible lowest blocks: none is above a block that always trains."""
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
        """Return the bytes that stay alive after the blocks' forward and that no block holds."""
        if lowest or self.prefix:
            return self.forward_base
        lowest_role = self.blocks[0].lowest
        held_in_any_case = min(lowest_role.full.input, lowest_role.checkpointed.input)
        return self.forward_base - min(self.entry, held_in_any_case)

    def peak(self, plan: Plan) -> int:
        """Return the most bytes alive at any time of a step, in addition to weights and batch."""
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
        """The bytes of the gradients of the parameters outside the blocks."""
        return self.head_gradients + (self.prefix.backward if self.prefix else 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers as plain dicts and lists."""
        return {**asdict(self), "pinned": sorted(self.pinned)}

    def check(self, modules: int) -> None:
        """Raise unless these can be the costs of this many modules.

        Raises:
            ValueError: They are the costs of other modules, or not numbers of bytes and FLOPs.
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
        """Return the costs from which `state_dict` made ``state``.

        Raises:
            ValueError: ``state`` has another form.
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
    """Yield the values in nested dataclasses, tuples and sets; they should all be numbers."""
    if is_dataclass(tree):
        tree = tuple(getattr(tree, field.name) for field in fields(tree))
    if isinstance(tree, (tuple, frozenset)):  # not a list: it is yielded, so that `check` fails
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
