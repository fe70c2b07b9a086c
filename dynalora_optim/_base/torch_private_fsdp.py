"""The private names of torch that describe what ``fully_shard`` (FSDP2) does to a model.

See ``torch_private.py``. They are read only: nothing of FSDP2 is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim._base.torch_private import _private, held_locally
from dynalora_optim._base.torch_private_hooks import forward_hooks, forward_pre_hooks

_FEATURE = "a Budget under fully_shard"


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of which each rank holds a part; sizes are those of all ranks together.

    Attributes:
        places: The modules that have it, each with the attribute's name.
        shape: The shape of the whole parameter.
        dtype: The dtype of the gathered parameter, in which the forward computes.
        trains: Whether it requires a gradient.
        gathered: The bytes of the gathered parameter.
        gradient: The bytes of its gradient before it is reduced, in the larger of the two dtypes.
        reduced: The bytes of its part of the input of a reduce-scatter.
        share: The bytes of the gradient that this rank keeps, and those of the output of the
            reduce-scatter if that has another dtype.
    """

    places: tuple[tuple[nn.Module, str], ...]
    shape: torch.Size
    dtype: torch.dtype
    trains: bool
    gathered: int
    gradient: int
    reduced: int
    share: int


@dataclass(frozen=True)
class ShardedUnit:
    """Modules whose parameters are gathered together.

    Attributes:
        modules: The modules on which ``fully_shard`` was called.
        parameters: Their parameters, without those of units inside of them.
        buffer: The bytes that gathering takes until the parameters are copied out of them.
        frees: Whether the gathered parameters are freed after the forward, and after the backward,
            of the unit.
        reduces: Whether a backward reduces the gradients; else each rank keeps whole ones.
        inputs: The inputs of reduce-scatters that are kept at one time.
        ahead: The units that the user lets it gather ahead, in the forward and in the backward.
        casts: The dtype to which the unit casts its inputs, and the dtype of its outputs.
    """

    modules: tuple[nn.Module, ...]
    parameters: tuple[ShardedParameter, ...]
    buffer: int
    frees: tuple[bool, bool]
    reduces: bool
    inputs: int
    ahead: tuple[int, int]
    casts: tuple[torch.dtype | None, torch.dtype | None]

    @property
    def gathered(self) -> int:
        """The bytes of the gathered parameters."""
        return sum(parameter.gathered for parameter in self.parameters)


def is_unit(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on ``module``."""
    return hasattr(module, "set_requires_gradient_sync")


def class_before(module: nn.Module) -> type[nn.Module]:
    """Return the class that ``module`` had before ``fully_shard`` gave it one of its own."""
    return type(module).__mro__[2] if is_unit(module) else type(module)


def units(model: nn.Module) -> list[ShardedUnit]:
    """Return the units of ``model``, each before those inside of it."""
    states = _states(model)
    return [_unit(state, group) for state in states for group in _groups(state)]


def things_of_units(model: nn.Module) -> Iterator[object]:
    """Yield the objects that tie modules to FSDP2: their states, and the hooks of these."""
    for state in _states(model):
        yield state
        for module in state._modules:
            hooks = chain(forward_pre_hooks(module).values(), forward_hooks(module).values())
            yield from (hook for hook in hooks if _is_of(hook, state))


def _is_of(hook: Any, state: Any) -> bool:
    while hook is not None:
        if getattr(hook, "__self__", None) is state:
            return True
        hook = getattr(hook, "__wrapped__", None)  # a unit of several modules wraps its hooks
    return False


def fake_mode() -> Any:
    """Return a context in which tensors have a shape, a dtype and a device, but no data."""
    module = _private(torch, "_subclasses", feature=_FEATURE)
    return module.FakeTensorMode()


def is_fake(thing: object) -> bool:
    """Return whether ``thing`` is a tensor of a `fake_mode`; False if torch has no such tensors."""
    return isinstance(thing, getattr(getattr(torch, "_subclasses", None), "FakeTensor", ()))


def unusual(model: nn.Module) -> str | None:
    """Return what a parameter is that is sharded in a way of its own; None if there is none."""
    for state in _states(model):
        for parameter in (p for group in _groups(state) for p in group.fsdp_params):
            local = held_locally(parameter.sharded_param)
            if parameter.is_dtensor:
                return "also divided by tensor parallelism"
            if type(local) not in (Tensor, nn.Parameter):
                return f"a {type(local).__name__}"
    return None


def is_units_node(node: Any) -> bool:
    """Return whether FSDP2 has put ``node`` into the graph, to know when a backward is over."""
    return type(node).__name__ == "RegisterPostBackwardFunctionBackward"


def reduces_gradients(model: nn.Module) -> bool:
    """Return whether the next backward reduces the gradients of every unit of ``model``."""
    return all(group.reduce_grads for state in _states(model) for group in _groups(state))


def has_gradients(model: nn.Module) -> bool:
    """Return whether a sharded parameter has a gradient, whole or reduced."""
    return any(
        gradient is not None
        for state in _states(model)
        for group in _groups(state)
        for parameter in group.fsdp_params
        for gradient in (
            parameter.sharded_param.grad,
            parameter.unsharded_accumulated_grad,
            getattr(getattr(parameter, "_unsharded_param", None), "grad", None),
        )
    )


def _states(model: nn.Module) -> list[Any]:
    found = (module._get_fsdp_state() for module in model.modules() if is_unit(module))  # type: ignore[operator]
    return list({id(state): state for state in found}.values())


def _groups(state: Any) -> list[Any]:
    found = getattr(state, "_fsdp_param_groups", None)
    if found is None:  # before torch 2.12 there was one at most
        one = _private(state, "_fsdp_param_group", feature=_FEATURE)
        found = [] if one is None else [one]
    return list(found)


def _unit(state: Any, group: Any) -> ShardedUnit:
    policy = group.mp_policy
    ahead = tuple(
        sum(_buffer(other) for target in targets for other in _groups(target))
        for targets in (state._states_to_forward_prefetch, state._states_to_backward_prefetch)
    )
    casts = policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype
    return ShardedUnit(
        modules=tuple(group.modules),
        parameters=tuple(map(_parameter, group.fsdp_params)),
        buffer=_buffer(group),
        frees=(group.post_forward_mesh_info is not None, group.reshard_after_backward),
        reduces=group.reduce_grads,
        inputs=getattr(group, "reduce_scatter_max_input_buffers", 1),
        ahead=(ahead[0], ahead[1]),
        casts=casts,
    )


def _parameter(parameter: Any) -> ShardedParameter:
    sharded, policy, where = parameter.sharded_param, parameter.mp_policy, parameter._module_info
    dtype = (policy.param_dtype if sharded.dtype.is_floating_point else None) or sharded.dtype
    ranks = _ranks(parameter)
    count = parameter.padded_sharded_param_size.numel() * ranks
    reduce_dtype = policy.reduce_dtype or dtype
    share = count // ranks * sharded.dtype.itemsize
    is_cast = reduce_dtype != sharded.dtype
    joins = 1 + (parameter.fsdp_placement.dim != 0)  # then the parts are joined in a copy first
    return ShardedParameter(
        places=(
            (where.module, where.param_name),
            *zip(where.shared_modules, where.shared_param_names, strict=True),
        ),
        shape=sharded.shape,
        dtype=dtype,
        trains=sharded.requires_grad,
        gathered=count * dtype.itemsize,
        gradient=sharded.numel() * max(dtype.itemsize, reduce_dtype.itemsize),
        reduced=joins * count * reduce_dtype.itemsize,
        share=share + is_cast * count // ranks * reduce_dtype.itemsize,
    )


def _buffer(group: Any) -> int:
    """Return the bytes of the buffers of one gathering."""
    size = 0
    for parameter in group.fsdp_params:
        found = _parameter(parameter)
        is_copied = found.dtype != parameter.sharded_param.dtype or parameter.offload_to_cpu
        joins = 1 + (parameter.fsdp_placement.dim != 0)
        size += found.gathered * joins + is_copied * (found.gathered // _ranks(parameter))
    return size


def _ranks(parameter: Any) -> int:
    return int(getattr(parameter.mesh_info, "shard_mesh_size", 1))
