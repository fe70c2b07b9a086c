"""The badam package, to compare with. It is optional: ``pip install --no-deps badam``."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from torch import nn
from torch.optim import Optimizer


def is_installed() -> bool:
    return importlib.util.find_spec("badam") is not None


def block_optimizer(
    optimizer: Optimizer, model: nn.Module, prefixes: list[list[str]] | None = None, **options: Any
) -> Any:
    """Wrap an optimizer with that of the package, without its output.

    The package prints the name of each block that it switches to, even if ``verbose`` is off, and
    it warns about float32 weights.
    """
    package: Any = importlib.import_module("badam")
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.BlockOptimizer(
            optimizer, list(model.named_parameters()), prefixes, verbose=0, **options
        )
