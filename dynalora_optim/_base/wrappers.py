"""The user's own model within the wrappers of torch."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynalora_optim._base.torch_private import original


def bare(module: nn.Module) -> nn.Module:
    """Return the user's own model, without the wrappers of torch.compile and of data parallelism.

    Their names, such as ``module.``, do not become a part of the names of groups, so that a
    checkpoint does not depend on whether the model was wrapped.
    """
    while (inner := _unwrapped(module)) is not module:
        module = inner
    return module


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = module.module
        return inner
    return original(module)
