"""What maps hidden states to logits: whether it is a plain product, and whether it goes by rows."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynalora_optim._base.torch_private_fsdp import is_fake
from dynalora_optim._base.torch_private_hooks import forward_hooks, forward_pre_hooks
from dynalora_optim._base.trees import has_data

_TRIED: WeakKeyDictionary[nn.Module, tuple[object, str | None]] = WeakKeyDictionary()


class WithoutHooks(nn.Module):
    """Calls a module without its hooks, which have seen the model's own call of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Tensor) -> Tensor:
        """Return what the module's forward returns."""
        out: Tensor = self.module.forward(rows)
        return out


def is_plain(head: nn.Module) -> bool:
    """Whether calling ``head`` does nothing but multiply with its dense weight."""
    return (
        type(head) is nn.Linear
        and (type(head.weight) in (Tensor, nn.Parameter) or is_fake(head.weight))
        and "forward" not in vars(head)  # as accelerate replaces it
        and not forward_hooks(head)
        and not forward_pre_hooks(head)
    )


def mixing(head: nn.Module, hidden: Tensor) -> str | None:
    """Return why the logits of some rows cannot be had without those of the others, or None.

    A plain linear layer is believed. Any other module is tried with three rows, once for each kind
    of its parts, in its mode and in evaluation. Buffers and random numbers stay as they are.

    Args:
        head: Maps (..., features) to (..., classes).
        hidden: What it gets. Only its features, dtype and device count.
    """
    head = head.module if isinstance(head, WithoutHooks) else head
    # On the meta device, or while something traces it, there are no numbers to compare.
    if is_plain(head) or not has_data(hidden) or torch.compiler.is_compiling():
        return None
    kind = (head.training, tuple(type(part) for part in head.modules()))
    if _TRIED.get(head, (None, None))[0] != kind:
        row = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        _TRIED[head] = kind, _try(head, row)
    return _TRIED[head][1]


@torch.no_grad()
def _try(head: nn.Module, row: Tensor) -> str | None:
    first = torch.stack([row, row.flip(-1) + 1, -2 * row])
    others = torch.stack([row, row.flip(-1) - 3, 5 * row])
    training = [part for part in head.modules() if part.training]
    try:
        if not _are_near(_called(head, first)[0], _called(head, others)[0]):
            return "maps several rows together"
        head.eval()  # without dropout, whose mask has places
        if not _are_near(_called(head, first)[[2, 0, 1]], _called(head, first.roll(1, 0))):
            return "maps a row by its place among others"
    except Exception as error:
        return f"cannot be called with rows, (rows, features): {error}"
    finally:
        for part in training:
            part.training = True
    return None


def _called(head: nn.Module, rows: Tensor) -> Tensor:
    """Return the logits; each call has the same random numbers, and changes copies of buffers."""
    whole, device = WithoutHooks(head), rows.device
    copies = {name: buffer.clone() for name, buffer in whole.named_buffers()}
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        out: Tensor = torch.func.functional_call(whole, copies, (rows,))
    return out


def _are_near(left: Tensor, right: Tensor) -> bool:
    difference, scale = (left - right).abs().max(), left.abs().max()
    return not difference > torch.finfo(left.dtype).eps ** 0.5 * scale  # nan: nothing is known
