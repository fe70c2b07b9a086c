"""Measuring a mixture of experts in the routing that takes the most memory.

What an expert takes grows with the tokens that it gets, and the tokens of a later batch may be
divided in another way. Over all experts the sum of tokens is constant, but not the temporary
tensors of the one that runs. So blocks are measured with all tokens at the same few experts. If
more experts get tokens, a block holds more of what each of them takes in any case, such as weights
that autocast has cast; so it is measured with even numbers of tokens, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynalora_optim._base.live_bytes import uncounted
from dynalora_optim._base.torch_private import TorchDispatchMode
from dynalora_optim.allocation._costs import Use

_ATEN = torch.ops.aten
_CHOICES = (_ATEN.topk.default, _ATEN.argmax.default)


class Routing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which whatever chooses among scores chooses the first ones, or all in turn.

    Attributes:
        choices: How often something was chosen since this was set to 0.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choices = 0
        self._is_even = False

    @contextmanager
    def even(self) -> Iterator[None]:
        """Enter a context in which all are chosen in turn."""
        self._is_even = True
        try:
            yield
        finally:
            self._is_even = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        dim = _dimension(func, args)
        if dim is None:
            return result
        self.choices += 1
        best, found = result if func is _ATEN.topk.default else (None, result)
        # Not written into what was found: that may have no data.
        like = {"dtype": found.dtype, "device": found.device}
        shape, found, result = tuple(found.shape), None, None
        found = torch.empty(shape, **like)
        with uncounted():
            whole = found if _keeps(func, args) else found.unsqueeze(dim)
            self._choose(args[0].shape[dim], whole.movedim(dim, -1))
        return found if best is None else (best, found)

    def _choose(self, classes: int, found: Tensor) -> None:
        """Write positions among so many ``classes`` into ``found``, (..., positions)."""
        count = found.shape[-1]
        rows = found.numel() // count if count else 0
        first = torch.arange(rows, device=found.device) * (count * self._is_even)
        chosen = first[:, None] + torch.arange(count, device=found.device)
        found.copy_((chosen % classes).view(found.shape))


def _dimension(func: Any, args: Any) -> int | None:
    """Return along which dimension ``func`` chooses; None if it does not choose."""
    if func not in _CHOICES or args[0].ndim == 0:
        return None
    if func is _ATEN.topk.default:
        return args[2] if len(args) > 2 else -1
    return args[1] if len(args) > 1 else None  # without one, a position in the whole tensor


def _keeps(func: Any, args: Any) -> bool:
    """Whether the result has the dimension along which is chosen."""
    return func is _ATEN.topk.default or (len(args) > 2 and args[2])


def worst(few: Use, even: Use, gradients: int) -> Use:
    """Return what any division of tokens takes at the most.

    Args:
        few: What is taken if a few experts get all tokens.
        even: What is taken if all experts get some.
        gradients: The bytes of gradients that come only with ``even``.
    """
    more = max(even.held - few.held, 0)
    return replace(
        few,
        forward=max(even.forward, few.forward + more),
        held=few.held + more,
        backward=max(even.backward, few.backward + more + gradients),
        spent=max(even.spent, few.spent + more),
        flops=max(few.flops, even.flops),
        input=max(few.input, even.input),
    )
