"""Every private name of torch that this package touches, and what happens where one is missing.

torch may rename or remove a private name in any release. Each stands here once, behind a function
that says what it is for. Where a name is missing there are two outcomes:

* There is another way: the function takes it, and its docstring says what is then different.
* There is none: the function, whose docstring says nothing of it, raises a RuntimeError that names
  the torch version found.

``docs/versions.md`` has the versions that are tested. No other file of the package reads a private
name of torch; a test holds that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:  # a base class that can be inherited from, and says so when it is used

        class TorchDispatchMode:
            """What stands for torch's class of this name where torch has none."""

            def __init__(self) -> None:
                raise _missing("LiveBytes", "torch.utils._python_dispatch.TorchDispatchMode")


__all__ = ["TorchDispatchMode"]

ORIGINAL = "_orig_mod"  # where torch.compile(module) keeps the module; also a part of names
COMPILED_CALL = "_compiled_call_impl"  # where module.compile() puts its code


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


# --- Modules. Each has been an attribute of nn.Module since torch 1.0.


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict in which ``module`` itself holds its own parameters.

    ``setattr`` takes only a Parameter or None; a forward can also run on a tensor that stands here.
    """
    slots: dict[str, nn.Parameter | None] = _private(
        module, "_parameters", feature="pausing a module"
    )
    return slots


def has_child(module: nn.Module, name: str) -> bool:
    """Return whether ``module`` has a submodule of this name; an alias counts too.

    Where torch lacks ``_modules``: whether the attribute is a module, properties included.
    """
    children = getattr(module, "_modules", None)
    if children is None:
        return isinstance(getattr(module, name, None), nn.Module)
    return name in children


def forward_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """Return the forward hooks of ``module``, which may be removed from the mapping.

    Where torch lacks it: none, so that hooks of others are not found, and a copy keeps its own.
    """
    return getattr(module, "_forward_hooks", {})


def forward_pre_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """Return the forward pre-hooks of ``module``; as `forward_hooks` does."""
    return getattr(module, "_forward_pre_hooks", {})


def prepend_forward_hook(
    module: nn.Module, hook: Callable[..., Any], *, always_call: bool = False
) -> RemovableHandle:
    """Register a forward hook that runs before those that ``module`` has.

    The mapping is filled anew in its new order. torch.compile finds a hook by its place in the
    order of insertion, which ``prepend=True`` does not change: torch 2.11 and older look for the
    attributes of one hook in another.
    """
    handle = module.register_forward_hook(hook, prepend=True, always_call=always_call)
    hooks = forward_hooks(module)
    in_order = list(hooks.items())
    hooks.clear()
    hooks.update(in_order)
    return handle


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a forward in training changes running statistics of ``module``.

    Where torch lacks ``_NormBase``: whether it has a buffer named ``running_mean``.
    """
    base = getattr(nn.modules.batchnorm, "_NormBase", None)
    if base is None:
        return any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))
    return isinstance(module, base)


# --- torch.compile. Where torch names these otherwise, a compiled module counts as a plain one.


def original(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile(module)`` was given, or the module itself."""
    found: nn.Module = getattr(module, ORIGINAL, module)
    return found


def is_wrapped_by_compile(module: nn.Module) -> bool:
    """Return whether the module came from ``torch.compile(module)``."""
    return hasattr(module, ORIGINAL)


def plain_name(name: str) -> str:
    """Return a dotted path without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != ORIGINAL)


# --- Autograd.


def in_backward() -> bool:
    """Return whether this thread is in a backward pass, as a checkpoint's recomputation is."""
    task = _private(torch._C, "_current_graph_task_id", feature="scoring a forward pass")
    return bool(task() != -1)


def version_of(tensor: Tensor) -> int:
    """Return how often ``tensor`` was written to in place.

    Where torch lacks ``_version``: 0, so that only a change of the sum shows a write.
    """
    return int(getattr(tensor, "_version", 0))


# --- Storages and operations, which LiveBytes counts.


def storage_key(tensor: Tensor) -> int:
    """Return a number of the tensor's storage: the same for all its views, while it is alive.

    Where torch lacks ``_cdata``: its address, which is 0 for all tensors of the meta device. Those
    would count as one, so that `estimate_memory` would find too little.
    """
    storage = tensor.untyped_storage()
    key = getattr(storage, "_cdata", None)
    if key is None and tensor.device.type == "meta":
        raise _missing("counting tensors of the meta device", "UntypedStorage._cdata")
    return int(storage.data_ptr() if key is None else key)


def packet_of(operation: Any) -> Any:
    """Return the operation without its overload, as ``torch.utils.flop_counter`` knows it.

    Where torch lacks ``_overloadpacket``: the operation itself, whose FLOPs are then not counted.
    """
    return getattr(operation, "_overloadpacket", operation)


def tree_leaves(tree: Any) -> Iterable[Any]:
    """Return what nested containers hold, of every kind that torch knows."""
    return _pytree("tree_iter")(tree)  # type: ignore[no-any-return]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return ``tree`` with ``function`` of each thing that its nested containers hold."""
    return _pytree("tree_map")(function, tree)


def _pytree(name: str) -> Callable[..., Any]:
    module = _private(torch.utils, "_pytree", feature="counting memory")
    return _private(module, name, feature="counting memory")  # type: ignore[no-any-return]


# What is dispatched where Python reads a value. Where torch has no such operation: None, and for a
# model that reads a value on the meta device torch raises an error of its own.
READ_SCALAR = getattr(getattr(torch.ops.aten, "_local_scalar_dense", None), "default", None)


# Where the query stands among the arguments of torch's fused attentions. One that torch lacks is
# left out: nothing can call it.
QUERY_POSITIONS = {
    getattr(torch.ops.aten, name): position
    for kind in ("flash", "efficient", "cudnn")
    for suffix, position in (("", 0), ("_backward", 1))
    if hasattr(torch.ops.aten, name := f"_scaled_dot_product_{kind}_attention{suffix}")
}


def fused_attention(  # noqa: PLR0917 - torch's own order
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Return the attention by a kernel that keeps no scores, on the meta device too.

    Raises:
        RuntimeError: torch has no such kernel, or on the meta device none for grouped queries.
    """
    if key.shape[1] != query.shape[1] and torch.__version__ < "2.9":  # by number
        raise RuntimeError(
            f"grouped-query attention needs torch 2.9 there, found {torch.__version__}"
        )
    kernel = _private(
        torch.ops.aten,
        "_scaled_dot_product_flash_attention_for_cpu",
        feature="rehearsing attention on the meta device",
    )
    output: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


# --- Arithmetic on lists of tensors: one kernel for all. Without it, one for each tensor.


def add_all(left: Sequence[Tensor], right: Sequence[Tensor], *, alpha: float = 1) -> list[Tensor]:
    """Return a + alpha b for each pair."""
    if foreach := getattr(torch, "_foreach_add", None):
        return list(foreach(left, right, alpha=alpha))
    return [a.add(b, alpha=alpha) for a, b in zip(left, right, strict=True)]


def distances(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Return |a - b| for each pair."""
    subtract, absolute = (getattr(torch, f"_foreach_{name}", None) for name in ("sub", "abs"))
    if subtract and absolute:
        return list(absolute(subtract(left, right)))
    return [a.sub(b).abs() for a, b in zip(left, right, strict=True)]


def scale_all(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Return factor a for each tensor."""
    if foreach := getattr(torch, "_foreach_mul", None):
        return list(foreach(tensors, factor))
    return [a.mul(factor) for a in tensors]


# --- DistributedDataParallel.


def active_ddp() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward runs now, if one does."""
    ask = _private(
        DistributedDataParallel, "_get_active_ddp_module", feature="DistributedDataParallel"
    )
    found: DistributedDataParallel | None = ask()
    return found


def parameters_reduced(ddp: DistributedDataParallel) -> int:
    """Return how many parameters ``ddp`` averages over the ranks."""
    ask = _private(ddp, "_get_ddp_logging_data", feature="DistributedDataParallel")
    return int(ask()["num_parameter_tensors"])


# --- Optimizers and their schedulers.


def share_step_hooks(new: torch.optim.Optimizer, old: torch.optim.Optimizer) -> None:
    """Let the step hooks of ``old`` fire with those of ``new``, now and when more are added."""
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(new, name, _private(old, name, feature="wrapping an optimizer"))


def has_scheduler(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a learning-rate scheduler was built on ``optimizer``.

    Where torch marks it otherwise: False, so that such an optimizer is not refused.
    """
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")
