"""The loss of all rows, chunk by chunk, as one autograd function.

The gradients are formed in the forward pass, while a chunk's logits exist; so nothing of the size
of the logits is kept. The backward pass only multiplies them with the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_optim._base.torch_private import version_of


class PlainHead:
    """The head is a weight and a bias: each gradient is one product, added up in place."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def prepare(self, needed: list[bool], dtype: torch.dtype | None) -> None:
        """Cast the weights once for all chunks, where autocast would cast them for each."""
        self._needed = needed
        self._cast = [p if dtype is None else p.to(dtype) for p in self.parameters.values()]
        self._dtype = dtype

    def logits(self, rows: Tensor) -> Tensor:
        """Return (rows, classes), which nothing else refers to."""
        self._rows = rows if self._dtype is None else rows.to(self._dtype)
        return F.linear(self._rows, *self._cast)

    def add_gradients(self, g: Tensor, sums: list[Tensor | None]) -> Tensor | None:
        """Add the parameters' gradients to ``sums``; return the rows' own, if it is needed."""
        rows, weight, *bias = self._needed
        if weight:
            sums[0] = _add_product(sums[0], g.t(), self._rows)
        if any(bias):
            sums[1] = _add(sums[1], g.sum(0, dtype=sum_dtype(g.dtype)))
        return g @ self._cast[0] if rows else None


class ModuleHead:
    """The head is a function of single rows, such as a linear layer with an adapter.

    Each chunk gets a graph of its own. The parameters are replaced by copies that share their
    memory: hooks on a parameter must see its whole gradient, not that of each chunk.
    """

    def __init__(self, head: nn.Module) -> None:
        self._head = head
        self.parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}

    def prepare(self, needed: list[bool], dtype: torch.dtype | None) -> None:
        """Make the copies. Autocast casts within the head."""
        self._needed = needed
        named = zip(self.parameters.items(), needed[1:], strict=True)
        self._copies = {name: p.detach().requires_grad_(need) for (name, p), need in named}

    def logits(self, rows: Tensor) -> Tensor:
        """Return (rows, classes). Nothing may change it: the graph may need it."""
        self._rows = rows.detach().requires_grad_(self._needed[0])
        with torch.set_grad_enabled(any(self._needed)):
            out: Tensor = torch.func.functional_call(self._head, self._copies, (self._rows,))
        self._out = out
        return out.detach()

    def add_gradients(self, g: Tensor, sums: list[Tensor | None]) -> Tensor | None:
        """Add the parameters' gradients to ``sums``; return the rows' own, if it is needed."""
        out = self._out
        del self._out
        if not out.requires_grad:
            return None
        leaves = [self._rows, *self._copies.values()]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, g, allow_unused=True))
        row, *rest = [next(found) if need else None for need in self._needed]
        for i, new in enumerate(rest):  # None: an inactive adapter, which the head has detached
            sums[i] = sums[i] if new is None else _add(sums[i], new)
        return row


@dataclass(frozen=True)
class Task:
    """What `ChunkedLoss` computes.

    Attributes:
        head: What maps rows to logits.
        transform: A function of the logits, row by row, or None.
        labels: The class of each row, (rows,), int64.
        ignore_index: A row with this label has the loss 0 and no gradient.
        smoothing: The share of the target that is spread evenly over all classes.
        chunk: Rows per chunk.
        each: Return the loss of every row instead of their sum.
        differentiable: Whether gradients are recorded at all.
    """

    head: PlainHead | ModuleHead
    transform: Callable[[Tensor], Tensor] | None
    labels: Tensor
    ignore_index: int
    smoothing: float
    chunk: int
    each: bool
    differentiable: bool


class ChunkedLoss(torch.autograd.Function):
    """(hidden, *parameters of the head) -> the loss that a `Task` describes."""

    @staticmethod
    def forward(ctx: Any, task: Task, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """Compute the loss, and the gradients of hidden and parameters that are needed."""
        needed = [task.differentiable and need for need in ctx.needs_input_grad[1:]]
        task.head.prepare(needed, autocast_dtype(hidden))
        losses = hidden.new_empty(len(hidden), dtype=sum_dtype(hidden.dtype))
        gradient = torch.empty_like(hidden) if needed[0] else None
        sums: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), task.chunk):
            rows = slice(start, start + task.chunk)
            losses[rows], row = _one_chunk(task, hidden[rows], task.labels[rows], needed, sums)
            if gradient is not None:
                gradient[rows] = 0 if row is None else row
        ctx.each, ctx.dtypes = task.each, [p.dtype for p in parameters]
        ctx.save_for_backward(gradient, *sums)
        return losses if task.each else losses.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the gradients with that of the loss; sums are rounded only after that."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, and linear_cross_entropy has "
                "none: its gradients are formed in the forward pass; use cross_entropy."
            )
        gradient, *sums = ctx.saved_tensors
        by_row = g.unsqueeze(-1) if ctx.each else g
        scaled = None if gradient is None else (gradient * by_row).to(gradient.dtype)
        rest = [
            None if total is None else (total * g).to(dtype)
            for total, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return None, scaled, *rest


def _one_chunk(
    task: Task, rows: Tensor, labels: Tensor, needed: list[bool], sums: list[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each row and the gradient of the rows; add those of parameters."""
    logits = task.head.logits(rows)
    final = logits
    if task.transform is not None:
        with torch.set_grad_enabled(any(needed)):
            final = task.transform(logits.requires_grad_(any(needed)))
    dtype = final.dtype
    # Changed in place from here on. A copy, unless it is ours alone.
    ours = final is logits and isinstance(task.head, PlainHead)
    wide = final.detach().to(sum_dtype(dtype), copy=not ours)
    if final is logits or not any(needed):
        del logits, final
    losses = _rows_loss(wide, labels.to(wide.device), task, gradient=any(needed))
    if not any(needed):
        return losses, None
    g = wide.to(dtype)
    del wide
    if task.transform is not None:
        (g,) = torch.autograd.grad(final, logits, g)
        del logits, final
    return losses, task.head.add_gradients(g, sums)


def _rows_loss(wide: Tensor, labels: Tensor, task: Task, *, gradient: bool) -> Tensor:
    """Return the losses of these rows; ``wide``, their logits, becomes the gradient of their sum.

    Everything happens in place, so that a chunk takes one tensor of the size of its logits.
    """
    kept = labels != task.ignore_index
    if labels.device.type == "cpu":  # elsewhere it would have to wait for the device
        _check_range(labels[kept], wide.shape[-1])
    chosen = labels.where(kept, 0).unsqueeze(-1)
    share = task.smoothing
    wide.sub_(wide.amax(-1, keepdim=True))
    loss = wide.gather(-1, chosen).squeeze(-1).mul_(share - 1)
    if share:
        loss.sub_(wide.mean(-1), alpha=share)
    total = wide.exp_().sum(-1)
    loss.add_(total.log())
    if gradient:  # softmax - (1 - share) one-hot - share / classes, and 0 where ignored
        counts = kept.to(wide.dtype).unsqueeze(-1)
        wide.mul_(counts / total.unsqueeze(-1))
        wide.scatter_add_(-1, chosen, counts * (share - 1))
        if share:
            wide.sub_(counts, alpha=share / wide.shape[-1])
    return loss.masked_fill_(~kept, 0)


def _check_range(labels: Tensor, classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"labels has {int(wrong[0])}, but the head has {classes} classes; pass labels from "
            f"0 to {classes - 1}, and ignore_index for rows that do not count."
        )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes products of x; None if it does not."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def versions(head: nn.Module) -> list[object]:
    """Return a value that is another one after ``head`` was changed.

    Changes are those of a parameter, and those of a flag or a name in a module of the head, such as
    which adapter is in use.
    """
    flags = [
        (name, repr(value))
        for module in head.modules()
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, (bool, int, float, str, list, tuple, set))
    ]
    return [*((id(p), version_of(p)) for p in head.parameters() if not p.is_meta), *flags]


def check_unchanged(head: nn.Module, before: list[object]) -> None:
    """Raise if ``head`` is another one than when `versions` returned ``before``."""
    if versions(head) != before:
        raise RuntimeError(
            "these logits were not computed so far, and the head has changed since the forward: "
            "its weights, or which adapter is in use; ask for output.logits before "
            "optimizer.step(), and before you disable an adapter."
        )


def _add(total: Tensor | None, new: Tensor) -> Tensor:
    return new.to(sum_dtype(new.dtype)) if total is None else total.add_(new)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add a product of matrices; in float32 without a tensor for the product itself."""
    if total is None or total.dtype != left.dtype:
        return _add(total, left @ right)
    return torch.addmm(total, left, right, out=total)  # counters of FLOPs do not see addmm_
