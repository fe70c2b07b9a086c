"""Every private name of torch that this package uses, and what happens if one is missing.

torch may rename or remove a private name in any release. So each one is used only here, in a
function that says what it is for and what happens without it. No other file of the package uses a
private name of torch; a test checks this. ``docs/versions.md`` lists the versions that are tested.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

ORIGINAL = "_orig_mod"  # where torch.compile(module) keeps the module; it appears in names too


def runs_eagerly() -> bool:
    """Whether operations run at once, with ordinary reverse-mode autograd only.

    If so, an autograd function of our own can be used. Compilers and tracers work better with
    ordinary operations, and functorch and forward mode would need additional rules. False if torch
    cannot tell all of this (before 2.8 it does not say whether functorch transforms are active).
    False is always correct, and a little slower.
    """
    try:
        return not (
            torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        )
    except AttributeError:
        return False


def is_fake(tensor: object) -> bool:
    """Whether a tensor without data stands for an ordinary one; False if torch lacks such tensors.

    Memory is counted with such tensors where a model is sharded.
    """
    module = sys.modules.get("torch._subclasses.fake_tensor")  # absent: nobody has made one
    return module is not None and type(tensor) is getattr(module, "FakeTensor", None)


def next_node() -> int:
    """Return the number that autograd gives to the next node that this thread makes.

    If torch lacks ``_get_sequence_nr``: 0; `node_in_backward` then returns None.
    """
    ask = getattr(torch._C._autograd, "_get_sequence_nr", None)
    return 0 if ask is None else int(ask())


def node_in_backward() -> int | None:
    """Return the number of the node whose backward runs now; None outside a backward pass.

    If torch lacks one of these names: None.
    """
    ask = getattr(torch._C, "_current_autograd_node", None)
    node = ask() if ask else None
    if node is None or not hasattr(torch._C._autograd, "_get_sequence_nr"):
        return None
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else int(number())


def saving_is_watched() -> bool:
    """Whether hooks see the tensors that autograd saves now, such as those of a checkpoint.

    If torch lacks ``_top_saved_tensors_default_hooks``: True, which is always correct.
    """
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(True) is not None


def is_watched(module: nn.Module) -> bool:
    """Whether the module has a hook, or a global hook for all modules exists.

    True if torch cannot tell: then the module is called in the ordinary way.
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

    If torch lacks its undocumented ``is_lazy``, only lazy parameters are found, not lazy buffers.
    """
    ask = getattr(nn.parameter, "is_lazy", None)
    return isinstance(tensor, nn.UninitializedParameter) if ask is None else bool(ask(tensor))


def unsafe_view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View a tensor to which there is no other reference. The result may be changed in place.

    If torch lacks ``_unsafe_view``, the tensor is copied.
    """
    view = getattr(torch.ops.aten, "_unsafe_view", None)
    out: Tensor = tensor.reshape(shape).clone() if view is None else view(tensor, shape)
    return out


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that ``module`` itself has under this name, None if there is none.

    A buffer, a plain tensor in its place, and the weight of a parametrization do not count.
    """
    found = getattr(module, "_parameters", {}).get(name)
    return found if isinstance(found, nn.Parameter) else None


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and submodules of ``module``. A submodule with two names appears twice.

    If torch lacks ``_modules``, it appears once, under its first name.
    """
    named = getattr(module, "_modules", None)
    items = module.named_children() if named is None else named.items()
    return [(name, child) for name, child in items if child is not None]


def original(module: nn.Module) -> nn.Module | None:
    """Return the module inside a result of ``torch.compile(module)``; None for other modules.

    If torch renames the attribute, a compiled module is treated as an ordinary module.
    """
    found: nn.Module | None = getattr(module, ORIGINAL, None)
    return found


def plain_name(name: str) -> str:
    """Return a dotted path without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != ORIGINAL)
