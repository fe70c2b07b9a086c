"""Reading values of tensors that have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynalora_optim._base.torch_private import (
    GROUPED_PRODUCT,
    READ_SCALAR,
    TorchDispatchMode,
    tree_map,
    without_modes,
)
from dynalora_optim._base.trees import has_data, tensors

_ATEN = torch.ops.aten
_READS = (READ_SCALAR, _ATEN.allclose.default, _ATEN.equal.default)
_LIMIT = 2**20  # elements of a tensor whose numbers are known


def is_read(func: Any) -> bool:
    """Return whether ``func`` returns a value to Python instead of a tensor."""
    return func in _READS


def answer(func: Any, args: Any, *, padded: bool = False) -> object:
    """Return 1 (or True) for a read of ``args[0]``: of a mask it means that nothing is padded.

    With ``padded`` the answer is False where a truth value is read.
    """
    dtype = args[0].dtype if func is READ_SCALAR else torch.bool
    if dtype == torch.bool:
        return not padded
    return 1.0 if dtype.is_floating_point else 1


class KnownNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that computes with fake tensors, and with plain ones where all numbers are known.

    Code reads the values of masks, lengths and positions: is anything padded, how long is the
    longest row, which tokens are an image's. These come from the batch, so the small tensors of a
    batch, and what is made of them alone, have data. All else is fake. Where a value is read that
    is not known, such as one of hidden states, code gets an `answer`.

    Args:
        fake: Returns a fake tensor of the same shape.
        padded: What code finds that looks into a mask which is too large to be known.
    """

    def __init__(self, fake: Callable[[Tensor], Tensor], *, padded: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self._padded = padded

    def argument(self, tensor: Tensor) -> Tensor:
        """Return a copy of an argument of the model if its numbers are to be known, or a fake."""
        with without_modes():
            if has_data(tensor) and tensor.numel() <= _LIMIT and not tensor.requires_grad:
                return tensor.detach().clone()
            return self._fake(tensor).requires_grad_(tensor.requires_grad)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if all(map(has_data, tensors((args, kwargs)))):
            return self._known(func, args, kwargs)
        if is_read(func):
            return answer(func, args, padded=self._padded)
        if args and has_data(args[0]) and str(func.overloadpacket).endswith("_"):
            # A plain tensor is changed in place by numbers that are not known. It stays plain.
            return self._known(func, *tree_map(_zeros, (args, kwargs)))
        if func is _ATEN.index.Tensor:
            args = (args[0], self._positions(args[1]))
        out = kwargs.get("out")
        args, kwargs = tree_map(self._faked, (args, kwargs))
        if func is GROUPED_PRODUCT and args[0].dtype != torch.bfloat16:
            return _grouped_product(args, kwargs)
        result = func(*args, **kwargs)
        # What is written into a tensor that was given has no memory of its own.
        return out if isinstance(out, Tensor) else result

    def _known(self, func: Any, args: Any, kwargs: Any) -> Any:
        with without_modes():
            result = func(*args, **kwargs)
        large = any(tensor.numel() > _LIMIT for tensor in tensors(result))
        return tree_map(self._faked, result) if large else result

    def _positions(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return indices in which masks have become positions, of which a fake has no number."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and has_data(index) and index.dtype == torch.bool:
                with without_modes():
                    found += index.nonzero(as_tuple=True)
            else:
                found.append(index)
        return found

    def _faked(self, leaf: Any) -> Any:
        return self._fake(leaf) if isinstance(leaf, Tensor) and has_data(leaf) else leaf


def _grouped_product(args: Any, kwargs: Any) -> Tensor:
    """Return the product of fakes of any dtype; torch knows its shape in bfloat16 only."""
    left, right, *rest = args
    product: Tensor = GROUPED_PRODUCT(left.bfloat16(), right.bfloat16(), *rest, **kwargs)
    return product.to(left.dtype)


def _zeros(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or has_data(leaf):
        return leaf
    with without_modes():
        return torch.zeros(tuple(leaf.shape), dtype=leaf.dtype, device=leaf.device)
