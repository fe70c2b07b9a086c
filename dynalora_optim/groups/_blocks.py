"""The repeated blocks of a model: a backward pass can end at a block, and recompute blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

_ENOUGH = 0.3  # the share of the list with the most trained tensors, for it to be much
_List = (nn.ModuleList, nn.Sequential)
_Uncalled = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """One of the model's repeated blocks; ``name`` is its dotted path."""

    name: str
    module: nn.Module


def find_blocks(model: nn.Module, members: Collection[nn.Module] = ()) -> list[Block]:
    """Return the model's repeated blocks, list by list; an empty list if it has none.

    The blocks are the items of each ``ModuleList`` or ``Sequential`` of two or more modules of one
    class that is not inside another one (so that the experts of a block are not blocks), and in
    which much trains (tensors are counted) or one of the ``members`` lies. A ``ModuleList`` may mix
    a few classes, as do models with two kinds of layers (attention, and Mamba or cross-attention).
    So an encoder and a decoder, or a tower for images and one for text, are two lists. They come in
    the order of the model's definition, which need not be the order in which they run. Of a list of
    lists, whose items are never called, the inner lists count.

    Raises:
        ValueError: A list holds one module twice.
    """
    lists: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in model.named_modules():
        is_inner = any(not outer or name.startswith(f"{outer}.") for outer in lists)
        if not is_inner and isinstance(module, _List) and _repeats(module):
            lists[name] = module
    if not lists:
        return []
    trained, inside = {name: _trained(found) for name, found in lists.items()}, {*members}
    enough = max(1, _ENOUGH * max(trained.values()))
    chosen = [
        name
        for name, found in lists.items()
        if trained[name] >= enough or not inside.isdisjoint(found.modules())
    ]
    chosen = chosen or [max(lists, key=lambda name: len(lists[name]))]
    return [block for name in chosen for block in _items(name, lists[name])]


def _items(name: str, found: nn.ModuleList | nn.Sequential) -> list[Block]:
    prefix = f"{name}." if name else ""
    blocks = [Block(prefix + key, module) for key, module in found.named_children()]
    if len(blocks) < len(found):
        raise ValueError(
            f"{name or 'the model'} holds one block several times, so its passes cannot be "
            "distinguished. Use neither a Budget nor groups='blocks' with this model."
        )
    return blocks


def in_lists(blocks: Sequence[Block]) -> list[list[Block]]:
    """Return the blocks of each list, such as an encoder's and a decoder's, by their parents."""
    lists: dict[str, list[Block]] = {}
    for block in blocks:
        lists.setdefault(block.name.rpartition(".")[0], []).append(block)
    return list(lists.values())


def model_blocks(
    model: nn.Module, *, must: bool, members: Collection[nn.Module] = ()
) -> list[Block]:
    """Return the model's blocks; an empty list if it has none, or holds one several times.

    Args:
        model: The adapted model.
        must: Whether blocks are required.
        members: Modules whose blocks are wanted in any case; see `find_blocks`.

    Raises:
        ValueError: Blocks are required, but there are none, or one is held several times.
    """
    try:
        blocks = find_blocks(model, members)
    except ValueError:
        if must:
            raise
        return []
    if must and not blocks:
        raise ValueError(
            f"found no repeated blocks in {type(model).__name__}, which a Budget and "
            "checkpoint_idle=True need: no ModuleList or Sequential of two or more modules of one "
            "class, or of a few. Use an allocator without a memory budget, such as 'discounted'."
        )
    return blocks


def _repeats(module: nn.ModuleList | nn.Sequential) -> bool:
    has_parameters = any(True for _ in module.parameters())
    are_called = not any(isinstance(item, _Uncalled) for item in module)
    return len(module) > 1 and _is_alike(module) and has_parameters and are_called


def _is_alike(found: nn.ModuleList | nn.Sequential) -> bool:
    """Return whether the items are of one class, or composed layers of a few classes."""
    kinds = {*map(type, found)}
    if len(kinds) == 1:
        return True
    composed = all(any(True for _ in item.children()) for item in found)
    return isinstance(found, nn.ModuleList) and composed and 2 * len(kinds) <= len(found)


def _trained(module: nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in module.parameters())


def outside(model: nn.Module, blocks: Sequence[Block]) -> Iterator[nn.Module]:
    """Yield the modules of ``model`` that lie in no block."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    return (module for module in model.modules() if id(module) not in inside)
