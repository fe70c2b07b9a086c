"""A frozen linear layer and its LoRA delta as one step of autograd.

Composed of ordinary operations the two cost many small kernels and, under autocast, copies kept
for the backward. Here B is accumulated into the base's own output with the scaling folded in, each
gradient is one product, and what is kept is the input as it came and the r numbers a row of x A^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._torch_private import unsafe_view

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def lora_linear(
    base: nn.Module, W: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: float
) -> Tensor:
    """Return base(x) + scaling B A x.

    Args:
        base: Computes x W^T + b, and returns a tensor of its own that it keeps nowhere.
        W: (out, in), without gradient.
        x: (..., in).
        A: (rank, in), in the dtype that W has, or in a wider one. It has a gradient if B has.
        B: (out, rank), like A.
        scaling: What B A is multiplied by.

    Returns:
        (..., out), in the dtype of the base's output. The sum is rounded to it once.
    """
    out: Tensor = LoRAFunction.apply(x, A, B, W, base, scaling)  # type: ignore[no-untyped-call]
    return out


class LoRAFunction(torch.autograd.Function):
    """(x, A, B) -> base(x) + scaling B A x; see ``lora_linear``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, *frozen: Any) -> Tensor:
        """Compute the sum, keeping x only if A needs a gradient, and h = A x only if B does."""
        W, base, scaling = frozen
        x_needed, A_needed, B_needed = ctx.needs_input_grad[:3]
        low = _autocast_dtype(x)
        dtype = low or A.dtype
        ctx.constants = scaling, dtype, x.shape, x.dtype, x.device.type
        seen = _cast(x, low or x.dtype)  # once, not once by the base and once by the adapter
        rows = _rows(seen)
        # A contiguous batch of sequences is flattened by the base itself. Any other input goes
        # there as it is: a base that does not flatten it may round differently.
        out = base(rows if x.dim() == 3 and seen.is_contiguous() else seen)
        h = F.linear(_cast(rows, dtype), _cast(A, dtype))
        total = _cast(_rows(out), dtype).addmm_(h, _cast(B, dtype).t(), alpha=scaling)
        ctx.save_for_backward(
            x if A_needed else None, A, B, W if x_needed else None, h if B_needed else None
        )
        # "Unsafe", since autograd would let nobody change a view made in here in place.
        shape = (*x.shape[:-1], len(B))
        return unsafe_view(_cast(total, out.dtype), shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B, each in its own dtype."""
        if not _autocasts(ctx.constants[-1]):
            return *_gradients(ctx, g), None, None, None
        with torch.autocast(ctx.constants[-1], enabled=False):  # the forward chose the dtypes
            return *_gradients(ctx, g), None, None, None


def _gradients(ctx: Any, g: Tensor) -> Gradients:
    """Differentiate out = x W^T + s h B^T with h = x A^T, row by row."""
    x, A, B, W, h = ctx.saved_tensors
    x_needed, A_needed, B_needed = ctx.needs_input_grad[:3]
    s, dtype, x_shape, x_dtype, _ = ctx.constants
    a, b, g = _cast(A, dtype), _cast(B, dtype), _rows(g)
    wide = _cast(g, dtype)
    gx = gA = gB = None
    if B_needed:
        if torch.is_grad_enabled():  # a gradient of gB is to reach x and A
            h = F.linear(_cast(_rows(x), dtype), a)
        gB = _cast(_scaled_product(s, wide.t(), h, like=b), B.dtype)
    gh = wide @ b  # the gradient of h over s, which the next products multiply by
    if A_needed:
        gA = _cast(_scaled_product(s, gh.t(), _cast(_rows(x), dtype), like=a), A.dtype)
    if x_needed:
        gx = _cast(g @ _cast(W, g.dtype), dtype).addmm_(gh, a, alpha=s)
        gx = _shaped(_cast(gx, x_dtype), x_shape)
    return gx, gA, gB


def _scaled_product(s: float, left: Tensor, right: Tensor, *, like: Tensor) -> Tensor:
    """Return s left @ right in one operation; of ``like`` only the shape counts."""
    return torch.addmm(like, left, right, beta=0, alpha=s)


def _rows(tensor: Tensor) -> Tensor:
    """View (..., n) as (rows, n); not by flatten, which batched gradients cannot pass through."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows if rows.dim() == len(shape) else rows.view(shape)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast would compute a product of x in, None where it would leave x alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not _autocasts(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, without the price of asking where nothing is to be done."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
