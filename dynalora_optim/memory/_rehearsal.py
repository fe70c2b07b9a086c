"""What a training step would take: the very step, rehearsed on the meta device.

There tensors have shapes but no memory, and everything else is what runs in training: the model,
the optimizer, its hooks. So nothing is modelled here that could deviate from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim._base.live_bytes import LiveBytes, tensor_bytes
from dynalora_optim._base.packages import installed
from dynalora_optim._base.torch_private import READ_SCALAR, fused_attention, tree_map
from dynalora_optim.allocation._context import Allocator, CostAware
from dynalora_optim.memory._step import Batch, Loss, StepMemory, count_step
from dynalora_optim.update._pause import Pause

_ATEN = torch.ops.aten
_ASKING = (READ_SCALAR, _ATEN.allclose.default, _ATEN.equal.default)

MakeOptimizer = Callable[[nn.Module], Optimizer]


@runtime_checkable
class Allocating(Protocol):
    """An optimizer that can be told which module groups are active."""

    @property
    def groups(self) -> list[str]:
        """The names of the allocated groups."""
        ...

    @property
    def active_groups(self) -> list[str]:
        """The names of those that are active now."""
        ...

    @property
    def allocator(self) -> Allocator:
        """Who chooses."""
        ...

    @property
    def pause(self) -> Pause:
        """What becomes of the state of groups that pause."""
        ...

    def hold(self, groups: Collection[str]) -> None:
        """Make just these ``groups`` active, and choose no others from here on."""
        ...


def estimate_memory(
    model: nn.Module,
    batch: Batch,
    make_optimizer: MakeOptimizer,
    *,
    loss: Loss | None = None,
    active: int | Collection[str] | None = None,
) -> StepMemory:
    """Return what the largest training step will take, without allocating it.

    It rehearses steps on the meta device: the first one, and one when all state is there that can
    have come together. Of the choices of active modules it takes the first ones, the last ones, and
    those of the most parameters. ``scaled_dot_product_attention`` counts as fused, and to whatever
    asks for a value (of a mask, say) the answer is 1: there is no padding.

    Args:
        model: On any device, the meta device among them. A copy is used, without its weights.
        batch: What the model is called with: keyword arguments, or a sequence of positional ones.
            Only shapes and dtypes count.
        make_optimizer: Builds the optimizer of the model that it is given.
        loss: The loss of what the model returns; by default its ``loss``, or the tensor itself.
        active: How many module groups are active at a time, besides those that always are, or the
            names of just those; by default as many as the optimizer begins with.

    Returns:
        Each category at its largest, and the largest peak. State offloaded to the host is not
        counted.

    Raises:
        ValueError: The optimizer keeps a `Budget`, or the step cannot be rehearsed.

    Example:
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     model = LlamaForCausalLM(config)
        >>> tokens = torch.zeros(1, 2048, dtype=torch.long)  # doctest: +SKIP
        >>> batch = {"input_ids": tokens, "labels": tokens}  # doctest: +SKIP
        >>> make = lambda model: badam(model, AdamW(model.parameters()))  # doctest: +SKIP
        >>> print(estimate_memory(model, batch, make))  # doctest: +SKIP
    """
    return _largest(_rehearsals(model, batch, make_optimizer, loss, active))


def _rehearsals(
    model: nn.Module,
    batch: Batch,
    make_optimizer: MakeOptimizer,
    loss: Loss | None,
    active: int | Collection[str] | None,
) -> Iterator[StepMemory]:
    batch = dict(batch) if isinstance(batch, Mapping) else tuple(batch)
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, batch)
    with _explained(type(model).__name__):
        for choice in _choices(make_optimizer(_meta_copy(model)), active):
            yield from _rehearse(_meta_copy(model), on_meta, make_optimizer, loss, choice)


def _largest(found: Iterable[StepMemory]) -> StepMemory:
    return StepMemory(*map(max, zip(*map(astuple, found), strict=True)))


def _rehearse(
    model: nn.Module,
    batch: Batch,
    make_optimizer: MakeOptimizer,
    loss: Loss | None,
    choice: Collection[str],
) -> Iterator[StepMemory]:
    """Yield the first step with this choice, and the second or, if idle state is kept, a later."""
    optimizer = make_optimizer(model)
    if isinstance(optimizer, Allocating):
        optimizer.hold(choice)

    def step() -> StepMemory:
        with _fused():
            return count_step(_Rehearsal(meta=True), model.train(), batch, optimizer, loss)

    yield step()
    if isinstance(optimizer, Allocating) and optimizer.pause.state == "keep":
        optimizer.hold(optimizer.groups)
        step()
        optimizer.hold(choice)
    yield step()


def _choices(optimizer: Optimizer, active: int | Collection[str] | None) -> list[tuple[str, ...]]:
    """The choices of module groups, one of which takes the most; one of none without a wrapper."""
    if not isinstance(optimizer, Allocating):
        return [()]
    if isinstance(optimizer.allocator, CostAware):
        raise ValueError(
            "estimate_memory() does not know what a Budget will choose, which itself keeps a peak; "
            "see DynamicAllocationOptimizer.memory_report(**batch)."
        )
    names = optimizer.groups
    if isinstance(active, Collection):
        if unknown := set(active) - set(names):
            raise ValueError(
                f"active={sorted(unknown)} names no module group; pass some of {names}."
            )
        return [tuple(active)]
    count = len(optimizer.active_groups) if active is None else active
    sizes = dict.fromkeys(names, 0)
    for group in optimizer.param_groups:
        if group["name"] in sizes:
            sizes[group["name"]] += sum(map(tensor_bytes, group["params"]))
    largest = sorted(names, key=lambda name: -sizes[name])[:count]
    found = [names[:count], names[-count:], [name for name in names if name in largest]]
    return list(dict.fromkeys(map(tuple, found)))


def _meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model without what its parameters and buffers hold; tied ones stay tied."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        on_meta = parameter.detach().to("meta")
        memo[id(parameter)] = nn.Parameter(on_meta, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


class _Rehearsal(LiveBytes):  # type: ignore[no-untyped-call]
    """Answers 1 (or True) to whatever asks for a value that the meta device does not hold."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func in _ASKING and args[0].is_meta:
            dtype = args[0].dtype if func is _ASKING[0] else torch.bool
            return torch.ones((), dtype=dtype).item()
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _fused() -> Iterator[None]:
    """Let attention on the meta device hold what it holds elsewhere; it would hold all scores."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chosen = _fused_attention if query.is_meta else original
        return chosen(query, *args, **kwargs)

    # No mode: torch leaves those in the functions of Python that call this one.
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _fused_attention(  # noqa: PLR0917 - torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # in no shape
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # as the shapes say
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -1.0)
    return fused_attention(query, key, value, is_causal, attn_mask, scale)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say what to do where the meta device is not enough.

    Raises:
        ValueError: In place of the error that torch raised.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        if "device type for autocast" in why:
            why += f" (transformers asks for that before 5.4; found {installed('transformers')})"
        raise ValueError(
            f"a step of {name} cannot be rehearsed on the meta device: {why}. Tensors that are "
            "neither parameters nor buffers stay where they are, and no value can be read; "
            "measure_step() counts a real step instead."
        ) from error
