"""A frozen linear layer and its LoRA delta as one autograd function.

Written with ordinary operations, the two need many small kernels. Under autocast they also keep
copies for the backward pass. Here the product with B is added to the output of the base module in
the same operation, together with the scaling. Each gradient is one matrix product. Only the input x
and the product x A^T, which has r numbers per row, are kept for the backward pass; x is not kept if
it can be computed again from what autograd keeps anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._torch_private import unsafe_view
from dynalora_adapters._torch_private_recipes import recipe_of

_KEEPS_SUMS = hasattr(torch.ops.aten.mm, "dtype")  # from torch 2.8 on

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def lora_linear(
    base: Callable[[Tensor], Tensor], W: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: float
) -> Tensor:
    """Return base(x) + scaling B A x.

    Args:
        base: Computes x W^T + b, and returns a new tensor that nothing else refers to.
        W: (out, in), without gradient.
        x: (..., in).
        A: (rank, in), in the dtype of W or a wider one. It needs a gradient if B does. If x is in
            half precision, the products are too, as under autocast; the gradients have A's dtype.
        B: (out, rank), like A.
        scaling: The factor of B A.

    Returns:
        (..., out), in the dtype of the base's output. The sum is rounded to that dtype once.
    """
    return _sum(x, A, B, None, W, base, scaling)


def add_lora(out: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: float) -> Tensor:
    """Return out + scaling B A x, where ``out`` is what a base of any kind has computed from x.

    A quantised base differentiates itself. In ordinary operations, the delta would keep a copy of x
    in the dtype of A.
    """
    return _sum(x, A, B, out, None, None, scaling)


def _sum(  # noqa: PLR0917 - what the autograd function gets
    x: Tensor,
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    W: Tensor | None,
    base: Any,
    scaling: float,
) -> Tensor:
    """Return the sum, as a node of autograd only if something could ask for a gradient.

    Below the lowest active layer of a model nothing can, and a node takes as long as a kernel.
    """
    needy = x.requires_grad or A.requires_grad or B.requires_grad
    if torch.is_grad_enabled() and (needy or (out is not None and out.requires_grad)):
        total: Tensor = LoRAFunction.apply(x, A, B, out, (W, base, scaling))  # type: ignore[no-untyped-call]
        return total
    return _computed(x, A, B, out, base, scaling)[0]


def _computed(  # noqa: PLR0917 - as above
    x: Tensor, A: Tensor, B: Tensor, out: Tensor | None, base: Any, scaling: float
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return the sum, h = A x, and the dtype of h."""
    low = _autocast_dtype(x)
    dtype = low or product_dtype(x, A)
    seen = _cast(x, low) if low else x  # one cast, which the base and the adapter share
    rows = _rows(seen)
    # The base flattens a contiguous batch of sequences itself, so flattening it here changes
    # nothing. It may not flatten another input, and rounding could then differ.
    made = out
    if made is None:
        made = base(rows if x.dim() == 3 and seen.is_contiguous() else seen)
    s, fold = _scaling(scaling, A.dtype, dtype)
    h = F.linear(_cast(rows, dtype), _narrowed(A, dtype, fold))
    total = _add(_rows(made), h, _cast(B, dtype).t(), s=s, in_place=out is None)
    # "Unsafe": autograd refuses in-place changes of an ordinary view that is made in here.
    return unsafe_view(total, (*x.shape[:-1], total.shape[-1])), h, dtype


class LoRAFunction(torch.autograd.Function):
    """(x, A, B, out) -> base(x) + scaling B A x, with base(x) computed here if ``out`` is None."""

    @staticmethod
    def forward(  # noqa: PLR0917 - as of `_sum`
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, out: Tensor | None, frozen: tuple[Any, ...]
    ) -> Tensor:
        """Compute the sum. Keep x only if A needs a gradient, and h = A x only if B does."""
        W, base, scaling = frozen
        x_needed, A_needed, B_needed, _, _ = ctx.needs_input_grad
        total, h, dtype = _computed(x, A, B, out, base, scaling)
        ctx.hides_nothing = True  # unlike a reentrant checkpoint, it reaches its inputs only
        ctx.constants = scaling, dtype, x.shape, x.dtype, x.device.type
        recipe = recipe_of(x) if A_needed else None
        ctx.again = recipe and recipe.function
        kept_x = recipe.operands if recipe else [x if A_needed else None]
        ctx.save_for_backward(A, B, W if x_needed else None, h if B_needed else None, *kept_x)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and out, each in its own dtype."""
        of_out = g if ctx.needs_input_grad[3] else None
        if not _autocasts(ctx.constants[-1]):
            return *_gradients(ctx, g), of_out, None
        with torch.autocast(ctx.constants[-1], enabled=False):  # the forward chose the dtypes
            return *_gradients(ctx, g), of_out, None


def product_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """Return the dtype of the products with A and B: that of x in half precision, else A's.

    Weights in float32 that compute in half precision are what autocast does as well. Copies of x
    and of the output in float32 would take longer than the products themselves.
    """
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) else A.dtype


def _scaling(scaling: float, dtype: torch.dtype, low: torch.dtype) -> tuple[float, float]:
    """Return two factors: one for the products, and one for a weight as it is narrowed.

    One of them is 1. A product into a wider dtype cannot scale.
    """
    return (scaling, 1.0) if dtype == low else (1.0, scaling)


def _narrowed(weight: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Return ``factor * weight`` in another dtype, rounded once; ``weight`` if nothing changes."""
    if factor == 1:
        return _cast(weight, dtype)
    if weight.requires_grad and torch.is_grad_enabled():
        return (weight * factor).to(dtype)
    return torch.mul(weight, factor, out=torch.empty_like(weight, dtype=dtype))


def _add(out: Tensor, h: Tensor, bt: Tensor, *, s: float, in_place: bool) -> Tensor:
    """Return out + s h bt in the dtype of ``out``, rounded to it once."""
    if out.dtype == h.dtype:
        return out.addmm_(h, bt, alpha=s) if in_place else out.addmm(h, bt, alpha=s)
    wide = torch.promote_types(out.dtype, h.dtype)
    return _cast(_cast(out, wide).addmm(_cast(h, wide), _cast(bt, wide), alpha=s), out.dtype)


def _gradients(ctx: Any, g: Tensor) -> Gradients:
    """Differentiate out = x W^T + s h B^T with h = x A^T."""
    A, B, W, h, *kept_x = ctx.saved_tensors
    x = ctx.again(*kept_x) if ctx.again else kept_x[0]
    scaling, dtype, x_shape, x_dtype, _ = ctx.constants
    s, fold = _scaling(scaling, A.dtype, dtype)
    g = _rows(g)
    low = _cast(g, dtype)
    x_needed, A_needed, B_needed = ctx.needs_input_grad[:3]
    gx = gA = gB = None
    if B_needed:
        if torch.is_grad_enabled():  # so that gB can be differentiated by x and A
            h = F.linear(_cast(_rows(x), dtype), _narrowed(A, dtype, fold))
        gB = _product(low.t(), h, s=s, like=B)
    gh = low @ _narrowed(B, dtype, fold)  # without s; the next products multiply by s
    if A_needed:
        gA = _product(gh.t(), _cast(_rows(x), dtype), s=s, like=A)
    if x_needed:
        a = _cast(A, dtype)
        if W is None:  # of the delta alone
            gx = _product(gh, a, s=s, like=a[:1])
        else:
            gx = _cast(g @ _cast(W, g.dtype), dtype).addmm_(gh, a, alpha=s)
        gx = _shaped(_cast(gx, x_dtype), x_shape)
    return gx, gA, gB


def _product(left: Tensor, right: Tensor, *, s: float, like: Tensor) -> Tensor:
    """Return s left @ right in the dtype of ``like``, whose shape can be expanded to the result's.

    A sum over the rows of a batch is not rounded to half precision, if torch can do without.
    """
    if left.dtype == like.dtype:
        return torch.addmm(like, left, right, beta=0, alpha=s)  # one operation
    if left.is_cuda and _KEEPS_SUMS and not torch.is_grad_enabled():
        return torch.mm(left, right, out_dtype=like.dtype)
    return (left @ right).to(like.dtype)


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
    if not _autocasts(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, without a call of ``to`` if the dtype is the same."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


_can_autocast = functools.cache(torch.amp.is_autocast_available)


def _autocasts(device: str) -> bool:
    return _can_autocast(device) and torch.is_autocast_enabled(device)
