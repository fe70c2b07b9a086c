"""Every private name of torch that this package touches, and what happens where one is missing.

torch may rename or remove a private name in any release. Each stands here once, behind a function
that says what it is for and what is done without it. No other file of the package reads a private
name of torch; a test holds that. ``docs/versions.md`` has the versions that are tested.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

ORIGINAL = "_orig_mod"  # where torch.compile(module) keeps the module; also a part of names


def runs_eagerly() -> bool:
    """Whether operations run as they are called, with reverse-mode autograd and nothing else.

    Compilers and tracers do better with the operations themselves, and functorch and forward mode
    would need rules of their own. Where torch cannot tell all of that (before 2.8 it does not say
    whether functorch transforms are active): False, which is right everywhere and a little slower.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        return not (
            torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        )
    except AttributeError:
        return False


def is_watched(module: nn.Module) -> bool:
    """Whether any hook, the module's own or a global one, sees what goes through the module.

    Where torch cannot tell: True, so that the module is called as it is.
    """
    try:
        forward = module._forward_pre_hooks or module._forward_hooks
        backward = module._backward_pre_hooks or module._backward_hooks
        everywhere = torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    except AttributeError:
        return True
    return bool(forward or backward or everywhere)


def is_lazy(tensor: object) -> bool:
    """Whether this is a parameter or buffer whose shape is not known yet.

    Where torch lacks its undocumented ``is_lazy``: whether it is a parameter of that kind.
    """
    ask = getattr(nn.parameter, "is_lazy", None)
    return isinstance(tensor, nn.UninitializedParameter) if ask is None else bool(ask(tensor))


def unsafe_view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View a tensor that nobody else holds; autograd lets the result be changed in place.

    Where torch lacks ``_unsafe_view``: a copy, in a pass over memory.
    """
    view = getattr(torch.ops.aten, "_unsafe_view", None)
    out: Tensor = tensor.reshape(shape).clone() if view is None else view(tensor, shape)
    return out


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that ``module`` itself holds under this name; None for anything else.

    A buffer, a tensor that stands in, and the weight of a parametrization are none.
    """
    found = getattr(module, "_parameters", {}).get(name)
    return found if isinstance(found, nn.Parameter) else None


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the submodules of ``module`` by name, one that has two names under both.

    Where torch lacks ``_modules``: under its first name only.
    """
    named = getattr(module, "_modules", None)
    items = module.named_children() if named is None else named.items()
    return [(name, child) for name, child in items if child is not None]


def original(module: nn.Module) -> nn.Module | None:
    """Return what ``torch.compile(module)`` was given, None if it did not make this module.

    Where torch names it otherwise, a compiled module counts as a plain one.
    """
    found: nn.Module | None = getattr(module, ORIGINAL, None)
    return found


def plain_name(name: str) -> str:
    """Return a dotted path without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != ORIGINAL)
