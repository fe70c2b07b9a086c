"""Which blocks of the model hold which module group."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dynalora_optim.groups._blocks import Block
from dynalora_optim.groups._module_group import ModuleGroup


@dataclass(frozen=True)
class BlockLayout:
    """The blocks that hold the allocated groups, by their positions.

    Attributes:
        blocks: How many blocks there are.
        places: For each group, the blocks that hold its parameters.
        pinned: The blocks that always train, whichever groups are active.
    """

    blocks: int
    places: Mapping[str, frozenset[int]]
    pinned: frozenset[int]

    def idle(self, active: Collection[str]) -> frozenset[int]:
        """Return the blocks in which nothing trains while only these groups are ``active``."""
        busy = self.pinned.union(*(self.places[name] for name in active))
        return frozenset(range(self.blocks)) - busy

    @staticmethod
    def of(groups: Sequence[ModuleGroup], blocks: Sequence[Block]) -> BlockLayout:
        """Return the layout of the allocated ``groups`` over ``blocks``."""
        owners = {id(p): group.name for group in groups for p in group.parameters()}
        places: dict[str, set[int]] = {group.name: set() for group in groups}
        pinned = set()
        for position, block in enumerate(blocks):
            for parameter in block.module.parameters():
                if id(parameter) in owners:
                    places[owners[id(parameter)]].add(position)
                elif parameter.requires_grad:
                    pinned.add(position)
        found = {name: frozenset(positions) for name, positions in places.items()}
        return BlockLayout(len(blocks), found, frozenset(pinned))


def blocks_of(groups: Iterable[ModuleGroup], blocks: Sequence[Block]) -> list[int | None]:
    """Return, for each group, the position of the block that holds all its modules.

    It is None for a group whose modules lie in no block.

    Raises:
        ValueError: A group lies partly in one block and partly elsewhere.
    """
    owner = {id(module): i for i, block in enumerate(blocks) for module in block.module.modules()}
    return [_one_place(group, owner) for group in groups]


def _one_place(group: ModuleGroup, owner: Mapping[int, int]) -> int | None:
    places = {owner.get(id(module)) for module in group.modules}
    if len(places) > 1:
        raise ValueError(
            f"group {group.name!r} spans several blocks (tied weights, or a rule that joins them), "
            "so no block can be idle without the others. Use an allocator without a memory budget, "
            "such as 'discounted', or groups that lie within one block each."
        )
    return places.pop()
