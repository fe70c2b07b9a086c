"""What FSDP2 adds to the memory of a step: gathered parameters, buffers, gradients on their way.

The costs of a model that is not sharded are measured; this adds what ``fully_shard`` allocates at
each moment. In the forward a unit's buffer stays until the next unit is gathered; in the backward
the unit below is gathered ahead. A gradient is whole until its unit has been reduced: a unit that
lies in a block is reduced when the backward leaves the block; the lowest block, and what is
gathered for the whole step, at the end of the backward. Where the order in which units run is not
known, the larger number is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from dynalora_optim._base.torch_private_fsdp import ShardedParameter, ShardedUnit
from dynalora_optim.allocation._costs import BlockCost, BlockUses, Costs, Use
from dynalora_optim.groups._blocks import Block
from dynalora_optim.memory._replica import Replica

# Small tensors of communication that another thread still holds when torch has let go of them.
IN_FLIGHT = 1024


class Sharding:
    """The units of a model, by where they lie.

    Args:
        replica: The copy of the model that was measured.
        blocks: The blocks of the copy.
        before: The parameters before the blocks of the copy.
    """

    def __init__(self, replica: Replica, blocks: Sequence[Block], before: Sequence[Tensor]) -> None:
        self._replica, self._units = replica, replica.units
        self._before = set(map(id, before))
        self._place = {
            id(module): place
            for place, block in enumerate(blocks)
            for module in block.module.modules()
        }
        self._inside: list[list[ShardedUnit]] = [[] for _ in blocks]
        self._small: list[ShardedUnit] = []  # gathered for one module outside of the blocks
        self._large: list[ShardedUnit] = []  # gathered for the whole step
        for unit in self._units:
            self._sort(unit)
        kept = (unit for unit in self._units if unit in self._large or not all(unit.frees))
        self._base = sum(unit.gathered for unit in kept) + IN_FLIGHT
        if all(parameter.device.type == "cpu" for parameter in replica.model.parameters()):
            # The thread of gloo may hold what it has gathered while the next is gathered already.
            self._base += _most(unit for unit in self._units if unit not in self._large)

    def _sort(self, unit: ShardedUnit) -> None:
        places = {self._block_of(module) for module in unit.modules}
        where = places.pop() if len(places) == 1 else None
        inside = (self._block_of(m) for module in unit.modules for m in module.modules())
        if where is not None:
            self._inside[where].append(unit)
        elif len(unit.modules) == 1 and all(place is None for place in inside):
            self._small.append(unit)
        else:
            self._large.append(unit)

    def _block_of(self, module: nn.Module) -> int | None:
        return self._place.get(id(self._replica.of(module)))

    def _block_with(self, parameter: ShardedParameter) -> int | None:
        return self._block_of(parameter.places[0][0])

    def added_to(self, costs: Costs, *, reduces: bool) -> Costs:
        """Return ``costs`` with what the units add to them.

        Args:
            costs: The costs of the model if it was not sharded.
            reduces: Whether every backward reduces the gradients; else whole ones accumulate.
        """
        self._reduces = reduces
        costs = replace(
            costs, blocks=tuple(map(self._block, range(len(costs.blocks)), costs.blocks))
        )
        outside = max((unit.gathered for unit in self._small), default=0)
        carried, buffers = self._carried(len(costs.blocks)), _most(self._small)
        ahead = max(carried, _most(u for u in self._large if u.frees[0]))
        head = replace(costs.head, forward=costs.head.forward + outside + carried + buffers)
        more = outside + max(ahead, buffers) + self._inputs(-1)
        head = _unreduced(head, lambda backward: backward + more)
        return replace(
            costs,
            head=head,
            prefix=costs.prefix and self._prefix(costs.prefix, outside + buffers),
            before=costs.before + self._base + outside + self._carried(0) + buffers,
            forward_base=costs.forward_base + self._base,
            backward_base=costs.backward_base + self._base,
            head_gradients=costs.head_gradients + self._outside(before=False),
            prefix_gradients=costs.prefix_gradients + self._outside(before=True),
            routes=tuple(self.added_to(route, reduces=reduces) for route in costs.routes),
        )

    def _block(self, block: int, cost: BlockCost) -> BlockCost:
        """Return the cost of a block with what gathering it and reducing its gradients takes."""
        x = max(use.input for role in (cost.lowest, cost.active, cost.idle) for use in _uses(role))
        units = self._inside[block]
        inner = sorted(unit.gathered for unit in units if all(unit.frees))
        own = sum(unit.gathered for unit in units[:1] if all(unit.frees))
        ahead = max((unit.ahead[0] for unit in units), default=0)
        buffer = _most(units) + ahead if units else self._carried(block)
        gathered = own + buffer
        if len(units) > 1:
            gathered += max(inner, default=0) + _most(units)
        # The former buffer is freed when the parameters have been copied out of the new one.
        arriving = max(self._carried(block), _most(units[1:])) + buffer + own if units else 0
        back = sum(inner) + max(_most(units), self._ahead(block)) + self._inputs(block)
        trained = [p for unit in units for p in unit.parameters if p.trains]
        reducing = self._ahead(block) + x + sum(p.gradient + p.reduced + p.share for p in trained)
        ending = sum(inner) + self._ahead(block) + sum(p.gradient for p in trained)
        ending += self._reducing_at_the_end()

        def forward(bytes_: int) -> int:
            return max(bytes_ + gathered, x + arriving)

        def role(uses: BlockUses, *others: int) -> BlockUses:
            def shifted(use: Use) -> Use:
                gathered = replace(use, forward=forward(use.forward))
                return _unreduced(gathered, lambda backward: max(backward + back, *others, 0))

            full, checkpointed = map(shifted, _uses(uses))
            return replace(uses, full=full, checkpointed=checkpointed)

        return BlockCost(
            lowest=role(cost.lowest, reducing, ending),
            active=role(cost.active, reducing),
            idle=role(cost.idle),
            below=forward(cost.below),
            gradients=cost.gradients + self._kept(block),
        )

    def _prefix(self, use: Use, gathered: int) -> Use:
        more, ending = gathered + self._inputs(-1), self._reducing_at_the_end()
        use = replace(use, forward=use.forward + gathered)
        return _unreduced(use, lambda backward: max(backward + more, ending))

    def _carried(self, block: int) -> int:
        """Return the bytes of the buffer that is still alive when ``block`` begins."""
        below = [units for units in self._inside[:block] if units]
        return _most(below[-1] if below else [*self._small, *self._large])

    def _ahead(self, block: int) -> int:
        """Return the bytes of the buffers that are filled ahead during the backward of a block."""
        units = self._inside[block]
        if not units:
            return 0
        below = [unit for inside in self._inside[:block] for unit in inside]
        nearest = self._inside[block - 1] if block else []
        asked = max(unit.ahead[1] for unit in units)
        return max(asked, _most(nearest or [*below, *self._small]))

    def _inputs(self, block: int) -> int:
        """Return the bytes of inputs of reduce-scatters of what lies above ``block``, if alive."""
        above = [unit for inside in self._inside[block + 1 :] for unit in inside]
        sizes = [
            unit.inputs * sum(p.reduced for p in unit.parameters if p.trains)
            for unit in (*above, *self._small)
        ]
        return max(sizes, default=0)

    def _reducing_at_the_end(self) -> int:
        """Return what reducing what is gathered for the whole step takes, once that is freed."""
        trained = (p for unit in self._large for p in unit.parameters if p.trains)
        freed = sum(unit.gathered for unit in self._large[:1] if unit.frees[1])
        return sum(p.reduced + p.share for p in trained) - freed

    def _kept(self, block: int) -> int:
        """Return by how much the gradients of a block that are kept differ from whole ones."""
        return sum(
            self._difference(parameter, unit)
            for unit in self._units
            for parameter in unit.parameters
            if self._block_with(parameter) == block
        )

    def _outside(self, *, before: bool) -> int:
        """Return the same for the parameters before, or after, the blocks."""
        return sum(
            self._difference(parameter, unit)
            for unit in self._units
            for parameter in unit.parameters
            if self._block_with(parameter) is None and self._is_before(parameter) is before
        )

    def _is_before(self, parameter: ShardedParameter) -> bool:
        module, name = parameter.places[0]
        return id(getattr(self._replica.of(module), name)) in self._before

    def _difference(self, parameter: ShardedParameter, unit: ShardedUnit) -> int:
        if not parameter.trains:
            return 0
        is_late = unit in self._large or not self._reduces
        whole = parameter.shape.numel() * parameter.dtype.itemsize
        return parameter.share + (parameter.gradient if is_late else 0) - whole


def _unreduced(use: Use, change: Callable[[int], int]) -> Use:
    """Change what a backward takes in which all gradients are alive until they are reduced."""
    return replace(use, spent=use.backward).in_backward(change)


def _uses(role: BlockUses) -> tuple[Use, Use]:
    return role.full, role.checkpointed


def _most(units: Iterable[ShardedUnit]) -> int:
    return max((unit.buffer for unit in units), default=0)
