"""A frozen linear layer and its LoRA delta as one autograd function.

Written with ordinary operations, the two need many small kernels. Under autocast they also keep
copies for the backward pass. Here the product with B is added to the output of the base module in
the same operation, together with the scaling. Each gradient is one matrix product. Only the input x
and the product x A^T, which has r numbers per row, are kept for the backward pass; x is not kept if
it can be computed again from what autograd keeps anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._torch_private import unsafe_view
from dynalora_adapters._torch_private_recipes import recipe_of

_LARGEST_COPY = 2**26  # bytes

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def lora_linear(
    base: nn.Module, W: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: float
) -> Tensor:
    """Return base(x) + scaling B A x.

    Args:
        base: Computes x W^T + b, and returns a new tensor that nothing else refers to.
        W: (out, in), without gradient.
        x: (..., in).
        A: (rank, in), in the dtype of W or a wider one. It needs a gradient if B does.
        B: (out, rank), like A.
        scaling: The factor of B A.

    Returns:
        (..., out), in the dtype of the base's output. The sum is rounded to that dtype once.
    """
    out: Tensor = LoRAFunction.apply(x, A, B, None, W, base, scaling)  # type: ignore[no-untyped-call]
    return out


def add_lora(out: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: float) -> Tensor:
    """Return out + scaling B A x, where ``out`` is what a base of any kind has computed from x.

    A quantised base differentiates itself. In ordinary operations, the delta would keep a copy of x
    in the dtype of A.
    """
    total: Tensor = LoRAFunction.apply(x, A, B, out, None, None, scaling)  # type: ignore[no-untyped-call]
    return total


class LoRAFunction(torch.autograd.Function):
    """(x, A, B, out) -> base(x) + scaling B A x, with base(x) computed here if ``out`` is None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, out: Tensor | None, *frozen: Any
    ) -> Tensor:
        """Compute the sum. Keep x only if A needs a gradient, and h = A x only if B does."""
        W, base, scaling = frozen
        x_needed, A_needed, B_needed = ctx.needs_input_grad[:3]
        low = _autocast_dtype(x)
        dtype = low or A.dtype
        ctx.hides_nothing = True  # unlike a reentrant checkpoint, it reaches its inputs only
        ctx.constants = scaling, dtype, x.shape, x.dtype, x.device.type
        seen = _cast(x, low or x.dtype)  # one cast, which the base and the adapter share
        rows = _rows(seen)
        # The base flattens a contiguous batch of sequences itself, so flattening it here changes
        # nothing. It may not flatten another input, and rounding could then differ.
        made = out
        if made is None:
            made = base(rows if x.dim() == 3 and seen.is_contiguous() else seen)
        h, total = _sum(
            *(rows, _rows(made), _cast(A, dtype), _cast(B, dtype)), s=scaling, in_place=out is None
        )
        recipe = recipe_of(x) if A_needed else None
        ctx.again = recipe and recipe.function
        kept_x = recipe.operands if recipe else [x if A_needed else None]
        ctx.save_for_backward(A, B, W if x_needed else None, h if B_needed else None, *kept_x)
        # "Unsafe": autograd refuses in-place changes of an ordinary view that is made in here.
        shape = (*x.shape[:-1], len(B))
        return unsafe_view(total, shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and out, each in its own dtype."""
        of_out = g if ctx.needs_input_grad[3] else None
        if not _autocasts(ctx.constants[-1]):
            return *_gradients(ctx, g), of_out, None, None, None
        with torch.autocast(ctx.constants[-1], enabled=False):  # the forward chose the dtypes
            return *_gradients(ctx, g), of_out, None, None, None


def _sum(
    x: Tensor, out: Tensor, a: Tensor, b: Tensor, *, s: float, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Return h = x a^T and out + s h b^T, in the dtypes of a and of ``out``."""
    pieces = _pieces(len(x), [x.dtype, out.dtype], a, b)
    if len(pieces) == 1:
        h, wide = F.linear(_cast(x, a.dtype), a), _cast(out, a.dtype)
        add = wide.addmm_ if in_place or wide is not out else wide.addmm
        return h, _cast(add(h, b.t(), alpha=s), out.dtype)
    h, total = (
        x.new_empty(len(x), len(a), dtype=a.dtype),
        out if in_place else out.new_empty(out.shape),
    )
    for piece in pieces:
        h[piece], total[piece] = _sum(x[piece], out[piece], a, b, s=s, in_place=False)
    return h, total


def _gradients(ctx: Any, g: Tensor) -> Gradients:
    """Differentiate out = x W^T + s h B^T with h = x A^T, row by row."""
    A, B, W, h, *kept_x = ctx.saved_tensors
    x = ctx.again(*kept_x) if ctx.again else kept_x[0]
    s, dtype, x_shape, x_dtype, _ = ctx.constants
    a, b, g = _cast(A, dtype), _cast(B, dtype), _rows(g)
    rows = None if x is None else _rows(x)
    needed = ctx.needs_input_grad[:3]
    pieces = _pieces(len(g), [g.dtype, x_dtype], a, b)
    if len(pieces) == 1 or torch.is_grad_enabled():
        gx, gA, gB = _of_rows(needed, g, (rows, h), (a, b, W), s=s)
        gx = None if gx is None else _cast(gx, x_dtype)
    else:
        gx = g.new_empty(len(g), a.shape[1], dtype=x_dtype) if needed[0] else None
        gA = gB = None
        for piece in pieces:
            kept = [None if t is None else t[piece] for t in (rows, h)]
            part, *more = _of_rows(needed, g[piece], kept, (a, b, W), s=s)
            if gx is not None and part is not None:
                gx[piece] = part
            gA, gB = map(_added, (gA, gB), more)
    return (
        None if gx is None else _shaped(gx, x_shape),
        None if gA is None else _cast(gA, A.dtype),
        None if gB is None else _cast(gB, B.dtype),
    )


def _of_rows(
    needed: tuple[bool, bool, bool],
    g: Tensor,
    kept: Sequence[Any],
    frozen: tuple[Tensor, Tensor, Tensor | None],
    *,
    s: float,
) -> Gradients:
    """Return the gradients of these rows of x, and what they add to those of a and b."""
    (x, h), (a, b, W) = kept, frozen
    dtype, wide = a.dtype, _cast(g, a.dtype)
    gx = ga = gb = None
    if needed[2]:
        if torch.is_grad_enabled():  # so that gb can be differentiated by x and a
            h = F.linear(_cast(x, dtype), a)
        gb = _scaled_product(s, wide.t(), h, like=b)
    gh = wide @ b  # the gradient of h divided by s; the next products multiply by s
    if needed[1]:
        ga = _scaled_product(s, gh.t(), _cast(x, dtype), like=a)
    if needed[0]:
        if W is None:  # of the delta alone
            gx = _scaled_product(s, gh, a, like=a[:1])
        else:
            gx = _cast(g @ _cast(W, g.dtype), dtype).addmm_(gh, a, alpha=s)
    return gx, ga, gb


def _pieces(rows: int, given: list[torch.dtype], a: Tensor, b: Tensor) -> list[slice]:
    """Divide rows so that a copy of them in the dtype of a wider adapter takes at most 64 MiB."""
    width = max(a.shape[1], len(b)) * a.element_size()
    step = max(1, _LARGEST_COPY // width) if any(dtype != a.dtype for dtype in given) else rows
    return [slice(first, first + step) for first in range(0, rows, step or 1)] or [slice(None)]


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)


def _scaled_product(s: float, left: Tensor, right: Tensor, *, like: Tensor) -> Tensor:
    """Return s left @ right in one operation. ``like`` only has a shape that can be expanded."""
    return torch.addmm(like, left, right, beta=0, alpha=s)


def _rows(tensor: Tensor) -> Tensor:
    """View (..., n) as (rows, n). Batched gradients do not work with ``flatten``."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows if rows.dim() == len(shape) else rows.view(shape)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes a product of x; None if it does not cast x."""
    device = x.device.type
    if x.dtype == torch.float64 or not _autocasts(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, without a call of ``to`` if the dtype is the same."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
