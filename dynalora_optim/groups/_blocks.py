"""The repeated blocks of a model: the units in which a backward pass is cut and recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Block:
    """One of the model's repeated blocks; ``name`` is its dotted path."""

    name: str
    module: nn.Module


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the model's repeated blocks in forward order; none if it has none.

    They are the items of the longest ``ModuleList`` of two or more modules of one class that lies
    in no other such list (the experts of a block are not blocks).

    Raises:
        ValueError: The list holds one module twice.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if not inner and _repeats(module):
            lists[name] = module
    if not lists:
        return []
    name = max(lists, key=lambda name: len(lists[name]))
    blocks = [Block(f"{name}.{i}", module) for i, module in enumerate(lists[name])]
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise ValueError(
            f"{name} holds one block several times: its passes cannot be told apart. Use neither a "
            "Budget nor groups='blocks' with this model."
        )
    return blocks


def model_blocks(model: nn.Module, *, must: bool) -> list[Block]:
    """Return the model's blocks; none where it has none, or such as cannot be told apart.

    Args:
        model: The adapted model.
        must: Whether something needs them.

    Raises:
        ValueError: With ``must``: there are none.
    """
    try:
        blocks = find_blocks(model)
    except ValueError:
        if must:
            raise
        return []
    if must and not blocks:
        raise ValueError(
            f"found no repeated blocks in {type(model).__name__}, which a Budget and "
            "checkpoint_idle=True need: no ModuleList of two or more modules of one class. Use an "
            "allocator without a memory budget, such as 'discounted'."
        )
    return blocks


def _repeats(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1 and len({*map(type, module)}) == 1


def outside(model: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """Yield the modules of ``model`` that lie in no block."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    return (module for module in model.modules() if id(module) not in inside)
