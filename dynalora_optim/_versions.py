"""The facts for an issue report: the installed versions, and the optimizers in use."""

from __future__ import annotations

import platform
import sys
from typing import TextIO

import torch

from dynalora_optim._base.claims import owners
from dynalora_optim._base.packages import installed
from dynalora_optim._optimizer import DynamicAllocationOptimizer

_PACKAGES = ("dynalora-optim", "torch", "transformers", "peft", "accelerate", "safetensors")


def show_versions(file: TextIO | None = None) -> None:
    """Print the versions of Python, torch and related packages, the GPUs, and optimizers in use.

    Paste the output into an issue report. Optional packages are looked up, not imported. For each
    `DynamicAllocationOptimizer` that drives a model now, one line shows the wrapped optimizer, the
    number of module groups and the options.

    Args:
        file: Where to print; by default the standard output.

    Example:
        >>> import dynalora_optim
        >>> dynalora_optim.show_versions()  # doctest: +SKIP
        python        3.11.7 on Linux-x86_64
        dynalora-optim 0.1.0
        torch         2.13.0+cpu
        ...
    """
    rows = [("python", f"{platform.python_version()} on {platform.system()}-{platform.machine()}")]
    rows += [(name, installed(name)) for name in _PACKAGES]
    rows += [("CUDA", torch.version.cuda or "this torch is built without")]
    rows += [("device", name) for name in _devices()]
    rows += [("optimizer", text) for text in sorted(map(_driven, _in_charge()))]
    for name, value in rows:
        print(f"{name:<15} {value}", file=file or sys.stdout)


def _devices() -> list[str]:
    """Return the name of each GPU; if there is none, "cpu"."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(number) for number in range(count)] or ["cpu"]


def _in_charge() -> list[DynamicAllocationOptimizer]:
    return [owner for owner in owners() if isinstance(owner, DynamicAllocationOptimizer)]


def _driven(optimizer: DynamicAllocationOptimizer) -> str:
    """Return one line about ``optimizer``, without names from the user's model."""
    seed, active, _, allocator, schedule, *_ = optimizer._allocation.settings()
    return f"{optimizer!r}, {active=}, allocator={allocator}, period={schedule}, {seed=}"
