"""Finding tensors in the arguments and the output of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)


def replaced(tree: Any, old: Tensor, new: Tensor) -> Any:
    """Return ``tree`` with the tensor ``old`` replaced by ``new``."""
    if tree is old:
        return new
    if type(tree) is dict:
        return {key: replaced(item, old, new) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(replaced(item, old, new) for item in tree)
    return tree


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states given to a block: its first floating-point argument."""
    found = tensors((args, kwargs))
    return next((tensor for tensor in found if tensor.is_floating_point()), None)


def elements(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of elements of all tensors that the model is called with."""
    return sum(tensor.numel() for tensor in tensors((args, kwargs)))


def trainable_leaves(x: Tensor) -> list[Tensor]:
    """Return the parameters that a gradient of ``x`` would reach."""
    return [leaf for leaf in leaves(x) if isinstance(leaf, nn.Parameter)]


def leaves(x: Tensor) -> list[Tensor]:
    """Return the leaves that a gradient of ``x`` would reach; ``x`` itself if it is one."""
    if x.is_leaf:
        return [x] if x.requires_grad else []
    found = (getattr(node, "variable", None) for node in nodes(x))
    return [leaf for leaf in found if leaf is not None]


def nodes(x: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph of ``x``, from the last one on."""
    seen: set[Any] = set()
    waiting = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [parent for parent, _ in node.next_functions]
