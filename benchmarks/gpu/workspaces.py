"""Measure memory outside of tensors: the bytes that operations allocate inside themselves.

A `Budget` counts the tensors that operations return. Memory that a kernel allocates for itself (the
backward of attention, cuBLAS, a fused update) is seen only by the allocator. Each row runs one
operation and gives both numbers. *Hidden* is the difference, for forward and backward separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu._apart import Row, Values
from gpu._steps import peak_above
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynalora_optim import LiveBytes, linear_cross_entropy


@dataclass(frozen=True)
class Heads:
    """The shape of an attention with grouped queries, as in Llama 3."""

    rows: int
    length: int
    queries: int
    keys: int
    size: int


SHAPES = {
    "1B, 2 x 2048": Heads(2, 2048, 32, 8, 64),
    "1B, 2 x 4096": Heads(2, 4096, 32, 8, 64),
    "8B, 2 x 2048": Heads(2, 2048, 32, 8, 128),
}
SMALL = {"small": Heads(1, 16, 4, 2, 8)}
BACKENDS = {
    "as chosen": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
OPTIMIZERS = {"fused": {"fused": True}, "foreach": {"foreach": True}}


def passes(forward: Callable[[], Tensor], leaves: Sequence[Tensor], device: str) -> Values:
    """Run forward and backward twice. Return the memory of the second time, above what existed.

    In the first time, memory is allocated that is never freed, such as cuBLAS's workspaces.
    """
    kept_before = torch.cuda.memory_allocated() if device == "cuda" else 0
    torch.autograd.grad(forward().sum(), leaves)
    kept = torch.cuda.memory_allocated() - kept_before if device == "cuda" else 0
    values: Values = {"kept_after_the_first": kept}
    with LiveBytes() as memory:
        with peak_above(device) as first:
            output = forward()
        counted = memory.peak
        gradient = torch.ones_like(output)
        held = memory.live
        memory.restart()
        with peak_above(device) as second:
            torch.autograd.grad(output, leaves, gradient)
        counted_backward = memory.peak - held
    values |= {"forward_counted": counted, "backward_counted": counted_backward}
    if device == "cuda":
        values |= {
            "forward_requested": first.requested,
            "backward_requested": second.requested,
            "forward_hidden": first.requested - counted,
            "backward_hidden": second.requested - counted_backward,
            "backward_rounding": second.allocated - second.requested,
        }
    return values


def attention(heads: Heads, masked: bool, device: str) -> Values:
    """Run causal attention, with ``is_causal`` or with a mask, with each available kernel."""

    def leaf(number: int) -> Tensor:
        shape = (heads.rows, number, heads.length, heads.size)
        return torch.randn(shape, dtype=torch.bfloat16, device=device).requires_grad_()

    query, key, value = leaf(heads.queries), leaf(heads.keys), leaf(heads.keys)
    mask = None
    if masked:
        mask = torch.ones(1, 1, heads.length, heads.length, dtype=torch.bool, device=device).tril()

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=not masked, enable_gqa=True
        )

    values: Values = {}
    for name, backend in BACKENDS.items():
        chosen = nullcontext() if backend is None else sdpa_kernel(backend)
        try:
            with chosen:
                found = passes(forward, (query, key, value), device)
        except RuntimeError as problem:  # no kernel for this shape or mask
            values[name] = str(problem).splitlines()[0]
        else:
            values |= {f"{name}: {kind}": size for kind, size in found.items()}
    return values


def product(size: int, device: str) -> Values:
    """Run a matrix product. The memory that cuBLAS keeps is seen in the first backward."""
    x = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    weight = torch.randn(size, size, dtype=torch.bfloat16, device=device).requires_grad_()
    return passes(lambda: x @ weight, [weight], device)


def loss(tokens: int, vocabulary: int, device: str) -> Values:
    """Run the loss of transformers: logits in float32, then the cross entropy."""
    dtype = torch.bfloat16
    logits = torch.randn(tokens, vocabulary, dtype=dtype, device=device).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=device)
    return passes(lambda: F.cross_entropy(logits.float(), labels), [logits], device)


def loss_in_chunks(tokens: int, vocabulary: int, device: str) -> Values:
    """Run head and loss in chunks of 256 rows, with the width of Llama-3.2-1B."""
    width = 2048 if device == "cuda" else 16
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=device).requires_grad_()
    head = torch.randn(vocabulary, width, dtype=torch.bfloat16, device=device)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    return passes(lambda: linear_cross_entropy(hidden, head, labels), [hidden], device)


def update(how: str, size: int, device: str) -> Values:
    """Take a step of AdamW. It needs temporary memory in addition to its state."""
    parameters = [torch.zeros(size, size, device=device).requires_grad_() for _ in range(16)]
    options: dict[str, Any] = OPTIMIZERS[how]
    optimizer = torch.optim.AdamW(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with LiveBytes() as memory, peak_above(device) as peak:
        optimizer.step()
    of_parameters = sum(p.numel() * p.element_size() for p in parameters)
    return {"parameters": of_parameters, "counted": memory.peak, "requested": peak.requested}


def rows(*, dry_run: bool) -> list[Row]:
    """Return all rows."""
    device = "cpu" if dry_run else "cuda"
    size, tokens, vocabulary = (16, 8, 32) if dry_run else (2048, 4096, 128256)
    shapes = SMALL if dry_run else SHAPES
    found = [
        Row(f"attention {shape}{', masked' * masked}", partial(attention, heads, masked, device))
        for shape, heads in shapes.items()
        for masked in (False, True)
    ]
    found += [
        Row("a product", partial(product, size, device)),
        Row("the loss", partial(loss, tokens, vocabulary, device)),
        Row("the loss in chunks", partial(loss_in_chunks, tokens, vocabulary, device)),
    ]
    found += [Row(f"AdamW, {how}", partial(update, how, size, device)) for how in OPTIMIZERS]
    return found
