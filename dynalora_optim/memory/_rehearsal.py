"""How much memory a training step would take, found by running it on the meta device.

There tensors have shapes but no memory. The model, the optimizer and its hooks are those of
training, so that no separate model of the memory is needed, which could be wrong.
"""

from __future__ import annotations

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
from dynalora_optim._base.torch_private import fused_attention, tree_map
from dynalora_optim.allocation._context import Allocator, CostAware
from dynalora_optim.memory._meta import meta_copy
from dynalora_optim.memory._reads import answer, is_read
from dynalora_optim.memory._step import Batch, Loss, StepMemory, count_step
from dynalora_optim.update._pause import Pause

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
        """The names of the groups that are active now."""
        ...

    @property
    def module_groups(self) -> list[dict[str, Any]]:
        """The param groups, split by module group."""
        ...

    @property
    def allocator(self) -> Allocator:
        """The allocator, which chooses the active groups."""
        ...

    @property
    def pause(self) -> Pause:
        """What happens to the state of groups that pause."""
        ...

    def hold(self, groups: Collection[str]) -> None:
        """Make only these ``groups`` active, and never choose again."""
        ...


def estimate_memory(
    model: nn.Module,
    batch: Batch,
    make_optimizer: MakeOptimizer,
    *,
    loss: Loss | None = None,
    active: int | Collection[str] | None = None,
) -> StepMemory:
    """Return the memory that the largest training step will take, without allocating it.

    It runs steps on the meta device: the first step, and a step with all the optimizer state that
    can exist at one time. It tries three choices of active modules: the first ones, the last ones,
    and the ones with the most parameters. ``scaled_dot_product_attention`` counts as fused. Code
    that reads the value of a tensor (such as a mask) gets 1, which means that there is no padding.

    Args:
        model: A model on any device, also the meta device. A copy without its weights is used.
        batch: What the model is called with: keyword arguments, or a sequence of positional ones.
            Only shapes and dtypes count.
        make_optimizer: A function that builds the optimizer for the model that it is given.
        loss: A function of the model's output; by default its ``loss``, or the output itself.
        active: How many module groups are active at a time, besides those that always are, or the
            names of the active ones; by default as many as the optimizer starts with.

    Returns:
        The largest value of each category, and the largest peak. State offloaded to the host is not
        counted.

    Raises:
        ValueError: The allocator is a `Budget`, or the step cannot run on the meta device.

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
        for choice in _choices(make_optimizer(meta_copy(model)), active):
            yield from _rehearse(meta_copy(model), on_meta, make_optimizer, loss, choice)


def _largest(found: Iterable[StepMemory]) -> StepMemory:
    return StepMemory(*map(max, zip(*map(astuple, found), strict=True)))


def _rehearse(
    model: nn.Module,
    batch: Batch,
    make_optimizer: MakeOptimizer,
    loss: Loss | None,
    choice: Collection[str],
) -> Iterator[StepMemory]:
    """Yield the first step with this choice, and the second; if idle state is kept, a later one."""
    optimizer = make_optimizer(model)
    if isinstance(optimizer, Allocating):
        optimizer.hold(choice)

    def step() -> StepMemory:
        with _fused():
            return count_step(Rehearsal(meta=True), model.train(), batch, optimizer, loss)

    yield step()
    if isinstance(optimizer, Allocating) and optimizer.pause.state == "keep":
        optimizer.hold(optimizer.groups)
        step()
        optimizer.hold(choice)
    yield step()


def _choices(optimizer: Optimizer, active: int | Collection[str] | None) -> list[tuple[str, ...]]:
    """Return choices of groups, one of which takes the most memory; without a wrapper one, ()."""
    if not isinstance(optimizer, Allocating):
        return [()]
    if isinstance(optimizer.allocator, CostAware):
        raise ValueError(
            "estimate_memory() cannot know what a Budget will choose, but a Budget itself limits "
            "the peak; see DynamicAllocationOptimizer.memory_report(**batch)."
        )
    names = optimizer.groups
    if isinstance(active, Collection):
        if unknown := set(active) - set(names):
            raise ValueError(
                f"active={sorted(unknown)} are not names of module groups; pass some of {names}."
            )
        return [tuple(active)]
    count = len(optimizer.active_groups) if active is None else active
    sizes = dict.fromkeys(names, 0)
    for group in optimizer.module_groups:
        if group["name"] in sizes:
            sizes[group["name"]] += sum(map(tensor_bytes, group["params"]))
    largest = sorted(names, key=lambda name: -sizes[name])[:count]
    found = [names[:count], names[-count:], [name for name in names if name in largest]]
    return list(dict.fromkeys(map(tuple, found)))


class Rehearsal(LiveBytes):  # type: ignore[no-untyped-call]
    """Counts memory, and returns 1 (or True) if code reads a value of a meta tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if is_read(func) and args[0].is_meta:
            return answer(func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _fused() -> Iterator[None]:
    """Use fused attention on the meta device, which would otherwise store all attention scores."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        chosen = _fused_attention if query.is_meta else original
        return chosen(query, *args, **kwargs)

    # A torch function mode would not work: torch leaves it inside Python functions that call this.
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _fused_attention(  # noqa: PLR0917 - the signature of torch
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # does not change shapes
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # known from the shapes
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -1.0)
    return fused_attention(query, key, value, is_causal, attn_mask, scale)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Explain errors that come from the meta device.

    Raises:
        ValueError: It replaces the error that torch raised, and names a remedy.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        if "device type for autocast" in why:
            why += f" (transformers before 5.4 calls it; found {installed('transformers')})"
        raise ValueError(
            f"a step of {name} cannot run on the meta device: {why}. Only parameters and buffers "
            "are moved there, and no value of a tensor can be read there. Use measure_step(), "
            "which counts a real step."
        ) from error
