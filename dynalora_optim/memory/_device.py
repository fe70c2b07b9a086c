"""What a GPU can give to this process, and what is in use there."""

from __future__ import annotations

import torch

_RESERVE_SHARE = 20  # 1/20 of what the device gives stays free: rounding, fragments, kernels
_LEAST_RESERVE = 512 * 2**20
_GRAIN = 512  # CUDA's allocator rounds each tensor up to a multiple of so many bytes
_TENSORS = 64  # that a block has alive at a time beside its weights, about


def capacity(device: torch.device) -> int:
    """Return the bytes that a GPU can give: free ones and those that torch holds, less a reserve.

    The reserve is a twentieth, and at least 512 MiB.

    Raises:
        ValueError: The device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(
            f'Budget(total="device") needs a CUDA device, but the parameters are on '
            f'{device.type!r}; pass bytes, such as total="24GiB", or move the model first.'
        )
    free, _ = torch.cuda.mem_get_info(device)
    found = free + torch.cuda.memory_reserved(device)
    return found - max(found // _RESERVE_SHARE, _LEAST_RESERVE)


def in_use(device: torch.device) -> int:
    """Return the bytes of all tensors on a GPU, workspaces of products included; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    _touch(device)
    return torch.cuda.memory_allocated(device)


def grain(device: torch.device) -> int:
    """Return the bytes to a multiple of which the device's allocator rounds each tensor."""
    return _GRAIN if device.type == "cuda" else 1


def rounding(device: torch.device, blocks: int) -> int:
    """Return what rounding may add to the tensors of a step through so many blocks."""
    return (grain(device) - 1) * _TENSORS * (blocks + 2)  # what is before and after them, too


def _touch(device: torch.device) -> None:
    """Multiply matrices forward and backward, so that the workspaces for this exist."""
    with torch.enable_grad():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
            torch.addmm(x[0], x, x).sum().backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
