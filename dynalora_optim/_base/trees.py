"""Finding tensors in the arguments and the output of a module."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for item in _items(tree):
            yield from tensors(item)


def has_data(tensor: Tensor) -> bool:
    """Return whether ``tensor`` has numbers of its own: no fake, no meta, no class of its own."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _items(tree: Any) -> Iterable[Any]:
    if isinstance(tree, Mapping):
        return tree.values()
    if isinstance(tree, (list, tuple)):
        return tree
    if is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in fields(tree)]
    return ()


def replaced(tree: Any, old: Tensor, new: Tensor) -> Any:
    """Return ``tree`` with the tensor ``old`` replaced by ``new``; ``tree`` itself is unchanged."""
    if tree is old:
        return new
    if not any(tensor is old for tensor in tensors(tree)):
        return tree
    if isinstance(tree, MutableMapping):
        changed = copy.copy(tree)  # also of a class of its own, such as a ModelOutput
        for key, item in tree.items():
            changed[key] = replaced(item, old, new)
        return changed
    items = [replaced(item, old, new) for item in _items(tree)]
    if hasattr(tree, "_fields"):  # a named tuple
        return type(tree)(*items)
    if isinstance(tree, (list, tuple)):
        return type(tree)(items)
    changed = copy.copy(tree)
    for field, item in zip(fields(tree), items, strict=True):
        object.__setattr__(changed, field.name, item)  # also of a frozen dataclass
    return changed


def first_tensor(output: Any) -> Tensor:
    """Return the first floating-point tensor in a module's output, which may be nested.

    Raises:
        ValueError: There is none.
    """
    if type(output) is Tensor and output.is_floating_point():
        return output
    if not isinstance(output, Tensor) and hasattr(output, "__torch_function__"):
        return output  # type: ignore[no-any-return] # such as logits that are made when asked for
    found = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
    if not found:
        raise ValueError(
            f"a module returned {type(output).__name__} without a floating-point tensor, so that "
            "it can be neither scored nor measured; leave it out of the groups."
        )
    return found[0]


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
    return nodes_below([x.grad_fn])


def nodes_below(first: Iterable[Any]) -> Iterator[Any]:
    """Yield these nodes of a graph and all that their gradients reach."""
    seen: set[Any] = set()
    waiting = [*first]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [parent for parent, _ in node.next_functions]
