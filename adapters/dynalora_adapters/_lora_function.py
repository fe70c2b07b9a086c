"""A frozen linear layer and its LoRA delta as one autograd function.

Written with ordinary operations, the two need many small kernels. Under autocast they also keep
copies for the backward pass. Here the product with B is added to the output of the base module in
the same operation, together with the scaling. Each gradient is one matrix product. Only the input x
and the product x A^T, which has r numbers per row, are kept for the backward pass; x is not kept if
it can be computed again from what autograd keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._recipes import recipe_of
from dynalora_adapters._torch_private import unsafe_view

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
    """(x, A, B, out) -> base(x) + scaling B A x; see ``lora_linear``. ``out`` is base(x) or None."""

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
        h = F.linear(_cast(rows, dtype), _cast(A, dtype))
        total = _cast(_rows(made), dtype)
        is_ours = out is None or out.dtype != dtype
        add = total.addmm_ if is_ours else total.addmm
        total = add(h, _cast(B, dtype).t(), alpha=scaling)
        recipe = recipe_of(x) if A_needed else None
        ctx.again = recipe and recipe.function
        kept_x = recipe.operands if recipe else [x if A_needed else None]
        ctx.save_for_backward(A, B, W if x_needed else None, h if B_needed else None, *kept_x)
        # "Unsafe": autograd refuses in-place changes of an ordinary view that is made in here.
        shape = (*x.shape[:-1], len(B))
        return unsafe_view(_cast(total, made.dtype), shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and out, each in its own dtype."""
        of_out = g if ctx.needs_input_grad[3] else None
        if not _autocasts(ctx.constants[-1]):
            return *_gradients(ctx, g), of_out, None, None, None
        with torch.autocast(ctx.constants[-1], enabled=False):  # the forward chose the dtypes
            return *_gradients(ctx, g), of_out, None, None, None


def _gradients(ctx: Any, g: Tensor) -> Gradients:
    """Differentiate out = x W^T + s h B^T with h = x A^T, row by row."""
    A, B, W, h, *kept_x = ctx.saved_tensors
    x = ctx.again(*kept_x) if ctx.again else kept_x[0]
    x_needed, A_needed, B_needed = ctx.needs_input_grad[:3]
    s, dtype, x_shape, x_dtype, _ = ctx.constants
    a, b, g = _cast(A, dtype), _cast(B, dtype), _rows(g)
    wide = _cast(g, dtype)
    gx = gA = gB = None
    if B_needed:
        if torch.is_grad_enabled():  # so that gB can be differentiated by x and A
            h = F.linear(_cast(_rows(x), dtype), a)
        gB = _cast(_scaled_product(s, wide.t(), h, like=b), B.dtype)
    gh = wide @ b  # the gradient of h divided by s; the next products multiply by s
    if A_needed:
        gA = _cast(_scaled_product(s, gh.t(), _cast(_rows(x), dtype), like=a), A.dtype)
    if x_needed:
        if W is None:  # of the delta alone
            gx = _scaled_product(s, gh, a, like=a[:1])
        else:
            gx = _cast(g @ _cast(W, g.dtype), dtype).addmm_(gh, a, alpha=s)
        gx = _shaped(_cast(gx, x_dtype), x_shape)
    return gx, gA, gB


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
