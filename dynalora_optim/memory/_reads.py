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


def answer(func: Any, args: Any) -> object:
    """Return 1 (or True) for a read of ``args[0]``: of a mask it means that nothing is padded."""
    dtype = args[0].dtype if func is READ_SCALAR else torch.bool
    return torch.ones((), dtype=dtype, device="cpu").item()


class ReadsOnes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which code that reads a value of a tensor gets 1, or True."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return answer(func, args) if is_read(func) else func(*args, **(kwargs or {}))
