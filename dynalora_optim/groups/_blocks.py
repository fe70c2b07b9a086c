"""The repeated blocks of a model: a backward pass can end at a block, and recompute blocks."""

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
    """Return the model's repeated blocks in forward order; an empty list if it has none.

    The blocks are the items of one ``ModuleList`` of two or more modules of one class: the longest
    such list that is not inside another one (so that the experts of a block are not blocks).

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
            f"{name} holds one block several times, so its passes cannot be distinguished. Use "
            "neither a Budget nor groups='blocks' with this model."
        )
    return blocks


def model_blocks(model: nn.Module, *, must: bool) -> list[Block]:
    """Return the model's blocks; an empty list if it has none, or holds one several times.

    Args:
        model: The adapted model.
        must: Whether blocks are required.

    Raises:
        ValueError: Blocks are required, but there are none, or one is held several times.
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
