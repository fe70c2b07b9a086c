"""Every private name of torch that this package uses, and what happens if one is missing.

torch may rename or remove a private name in any release. Each name is used here once (names of
autograd, of hooks and of FSDP2: in the files ``torch_private_*.py``), in a function that says what
it is for. If a name is missing, there are two cases:

* There is a replacement: the function uses it, and its docstring says what is then different.
* There is none: the function raises a RuntimeError that names the torch version found, and its
  docstring does not mention the case.

``docs/versions.md`` lists the tested versions. A test finds private names in any other file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:  # a base class whose subclasses can be defined, but not created

        class TorchDispatchMode:
            """A replacement for torch's class of this name if torch has none."""

            def __init__(self) -> None:
                raise _missing("LiveBytes", "torch.utils._python_dispatch.TorchDispatchMode")


__all__ = ["TorchDispatchMode"]
ORIGINAL = "_orig_mod"  # the attribute in which torch.compile(module) keeps the module
COMPILED_CALL = "_compiled_call_impl"  # the attribute in which module.compile() keeps its code


def _missing(feature: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"{feature} needs {name}, a private name that torch {torch.__version__} does not have; "
        "install a version of torch from the table in docs/versions.md."
    )


def _private(owner: Any, name: str, *, feature: str) -> Any:
    """Return ``owner.name``, or raise the error that names the feature and the version."""
    try:
        return getattr(owner, name)
    except AttributeError:
        path = getattr(owner, "__name__", None) or type(owner).__name__
        raise _missing(feature, f"{path}.{name}") from None


# --- Modules. Each of these names has been an attribute of nn.Module since torch 1.0.


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict that holds the parameters of ``module``, without those of its submodules.

    ``setattr`` accepts only a Parameter or None; a forward also works with a Tensor in this dict.
    """
    try:
        return module._parameters
    except AttributeError:
        raise _missing("pausing a module", "Module._parameters") from None


def set_parameter_slots(module: nn.Module, slots: dict[str, Any]) -> None:
    """Make ``slots`` the dict that holds the parameters of ``module``; see `parameter_slots`."""
    vars(module)["_parameters"] = slots


def has_child(module: nn.Module, name: str) -> bool:
    """Return whether ``module`` has a submodule of this name; a second name for one counts too.

    If torch lacks ``_modules``: whether the attribute is a module; a property then counts too.
    """
    children = getattr(module, "_modules", None)
    if children is None:
        return isinstance(getattr(module, name, None), nn.Module)
    return name in children


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a forward in training mode changes running statistics of ``module``.

    If torch lacks ``_NormBase``: whether it has a buffer named ``running_mean``.
    """
    base = getattr(nn.modules.batchnorm, "_NormBase", None)
    if base is None:
        return any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))
    return isinstance(module, base)


# --- torch.compile. If torch renames these attributes, a compiled module counts as a plain one.


def original(module: nn.Module) -> nn.Module:
    """Return the module that was given to ``torch.compile``; a plain module is returned as is."""
    found: nn.Module = getattr(module, ORIGINAL, module)
    return found


def plain_name(name: str) -> str:
    """Return a dotted path without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != ORIGINAL)


# --- Storages and operations, for LiveBytes.


def storage_key(tensor: Tensor | torch.UntypedStorage) -> int:
    """Return a number that identifies the tensor's storage while that exists; views share it.

    If torch lacks ``_cdata``: the storage's address. This is 0 for every tensor of the meta device,
    so that all would count as one: for these the function raises.
    """
    storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else tensor
    key: int | None = getattr(storage, "_cdata", None)
    if key is not None:
        return key
    if tensor.device.type == "meta":
        raise _missing("counting tensors of the meta device", "UntypedStorage._cdata")
    return storage.data_ptr()


def held_locally(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this rank holds; any other tensor is returned as is.

    If torch lacks ``_local_tensor``: a DTensor too, which then counts with its size on all ranks.
    """
    return getattr(tensor, "_local_tensor", tensor)


def packet_of(operation: Any) -> Any:
    """Return the operation without its overload, as ``torch.utils.flop_counter`` knows it.

    If torch lacks ``_overloadpacket``: the operation itself; its FLOPs are then not counted.
    """
    return getattr(operation, "_overloadpacket", operation)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return ``tree`` with ``function`` applied to each leaf of its nested containers."""
    return _pytree("tree_map")(function, tree)


def _pytree(name: str) -> Callable[..., Any]:
    module = _private(torch.utils, "_pytree", feature="counting memory")
    return _private(module, name, feature="counting memory")  # type: ignore[no-any-return]


def without_modes() -> AbstractContextManager[object]:
    """Return a context in which operations are those of tensors with data, in a dispatch mode.

    The replacement does nothing: in a mode of fake tensors, torch then raises its own error.
    """
    module = getattr(torch.utils, "_python_dispatch", None)
    found = getattr(module, "_disable_current_modes", nullcontext)
    return found()


# What is dispatched when Python reads a value. None if torch lacks it: torch then raises its own
# error if a model reads a value on the meta device.
READ_SCALAR = getattr(getattr(torch.ops.aten, "_local_scalar_dense", None), "default", None)


# The product of experts' weights with the rows that each gets. None if torch lacks it: then nothing
# calls it.
GROUPED_PRODUCT: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


# The position of the query among the arguments of each fused attention of torch. An operation that
# torch lacks is left out, because nothing can call it.
QUERY_POSITIONS = {
    getattr(torch.ops.aten, name): position
    for kind in (*map("scaled_dot_product_{}".format, ("flash", "efficient", "cudnn")), "cudnn")
    for suffix, position in (("", 0), ("_backward", 1))
    if hasattr(torch.ops.aten, name := f"_{kind}_attention{suffix}")
}


def fused_attention(  # noqa: PLR0917 - the order that torch uses
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Return the attention from a kernel that does not store scores; also for the meta device.

    Raises:
        RuntimeError: torch lacks this kernel, or is too old to run it for grouped queries.
    """
    if key.shape[1] != query.shape[1] and torch.__version__ < "2.9":  # compared as versions
        raise RuntimeError(
            f"grouped-query attention on meta needs torch 2.9 or newer, found {torch.__version__}"
        )
    kernel = _private(
        torch.ops.aten,
        "_scaled_dot_product_flash_attention_for_cpu",
        feature="rehearsing attention on the meta device",
    )
    output: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


# --- Arithmetic on lists of tensors: one kernel for all. If torch lacks it: one for each tensor.


def add_all(left: Sequence[Tensor], right: Sequence[Tensor], *, alpha: float = 1) -> list[Tensor]:
    """Return a + alpha * b for each pair (a, b)."""
    return _on_all("add", left, right, alpha=alpha)


def distances(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Return |a - b| for each pair (a, b)."""
    return _on_all("abs", _on_all("sub", left, right))


def scale_all(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Return factor * a for each tensor a."""
    if foreach := getattr(torch, "_foreach_mul", None):
        return list(foreach(tensors, factor))
    return [tensor.mul(factor) for tensor in tensors]


def _on_all(operation: str, *lists: Sequence[Tensor], **options: float) -> list[Tensor]:
    if foreach := getattr(torch, f"_foreach_{operation}", None):
        return list(foreach(*lists, **options))
    return [getattr(torch, operation)(*items, **options) for items in zip(*lists, strict=True)]


# --- DistributedDataParallel.


def active_ddp() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward runs now; None if there is none."""
    owner, name = DistributedDataParallel, "_get_active_ddp_module"
    found: DistributedDataParallel | None = _private(owner, name, feature=owner.__name__)()
    return found


def parameters_reduced(ddp: DistributedDataParallel) -> int:
    """Return how many parameters ``ddp`` averages over the ranks."""
    data = _private(ddp, "_get_ddp_logging_data", feature="DistributedDataParallel")()
    return int(data["num_parameter_tensors"])


# --- Optimizers and their schedulers.


def share_step_hooks(new: torch.optim.Optimizer, old: torch.optim.Optimizer) -> None:
    """Make ``new`` use the step hooks of ``old``, including those that are added later."""
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(new, name, _private(old, name, feature="wrapping an optimizer"))


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell a scheduler of ``optimizer`` that an update was made; else it warns of its own step."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def state_hooks(optimizer: torch.optim.Optimizer, when: str) -> list[Callable[..., Any]]:
    """Return the user's hooks of one kind, such as "state_dict_pre"; none if torch renames them."""
    return list(getattr(optimizer, f"_optimizer_{when}_hooks", {}).values())


def has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a user has put another ``step`` in the place of that of the class.

    A scheduler puts one there too, which calls the one that it has found. If torch changes how it
    marks this: True for an optimizer that has a scheduler; its step hooks then run twice.
    """
    step = vars(optimizer).get("step")
    if hasattr(step, "_wrapped_by_lr_sched"):
        step = getattr(step, "__wrapped__", None)
    return step is not None and step is not type(optimizer).step


def version_of(tensor: Tensor) -> int:
    """Return how often the tensor was changed in place; 0 if it is one that does not count."""
    return 0 if tensor.is_inference() else tensor._version
