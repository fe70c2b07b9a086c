"""Reading values of tensors that have none."""

from __future__ import annotations

from typing import Any

import torch

from dynalora_optim._base.torch_private import READ_SCALAR, TorchDispatchMode

_ATEN = torch.ops.aten
_READS = (READ_SCALAR, _ATEN.allclose.default, _ATEN.equal.default)


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


class ReadsMade(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which code that reads a value of a tensor gets an `answer`."""

    def __init__(self, *, padded: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._padded = padded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if is_read(func):
            return answer(func, args, padded=self._padded)
        return func(*args, **(kwargs or {}))
