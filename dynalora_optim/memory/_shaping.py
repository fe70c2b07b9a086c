"""Ending the backward graph at the blocks, and measuring what they cost."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.collectives import is_fully_sharded, world_size
from dynalora_optim._base.trees import hidden_states, replaced, trainable_leaves
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.groups._blocks import Block, find_blocks, outside
from dynalora_optim.groups._groups import ModuleGroup
from dynalora_optim.memory._block_profiler import Profiler
from dynalora_optim.switching._freezing import Freezer, checkpoints_itself, is_compiled

logger = logging.getLogger(__name__)

_ASKS_FOR_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")


class Shaper:
    """Knows the blocks of a model: cuts the graph below them, measures them.

    Args:
        model: The adapted model.
        groups: The allocated groups.
        has_budget: Whether a budget will be kept, so that every block must be understood.
        checkpoint_idle: Whether idle blocks will be recomputed without one.

    Raises:
        ValueError: With either: the model has no blocks. With a budget: a group lies in several,
            or idle blocks are to be recomputed in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ModuleGroup],
        *,
        has_budget: bool,
        checkpoint_idle: bool = False,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile was given
        self._has_budget = has_budget
        self._handles: list[RemovableHandle] = []
        self._caching: list[Any] = []
        self._recomputes = has_budget or checkpoint_idle
        if has_budget and checkpoint_idle:
            raise ValueError(
                "checkpoint_idle=True does not go with a Budget, which itself decides what to "
                "recompute; leave it out."
            )
        self.blocks: list[Block] = _blocks(model, must=self._recomputes)
        if has_budget:
            self._check(groups)

    def _check(self, groups: Sequence[ModuleGroup]) -> None:
        if any(map(is_fully_sharded, self.model.modules())):
            raise ValueError(
                "Budget and memory_report() run the blocks one by one to measure them, which a "
                "model under fully_shard (FSDP2) does not allow; use an allocator without a memory "
                "budget, such as 'discounted', or DistributedDataParallel."
            )
        for group in groups:
            block_of(group, self.blocks)
        for block in self.blocks:
            if hasattr(block.module, "_orig_mod"):
                raise ValueError(
                    f"Budget: {block.name} is wrapped by torch.compile, so that it cannot be "
                    "measured; compile the block itself, in place: block.compile()."
                )
            if checkpoints_itself(block.module) and _is_reentrant(block.module):
                raise ValueError(
                    f"Budget: {block.name} is checkpointed with use_reentrant=True, which keeps "
                    "the backward pass from ending at a block; enable gradient checkpointing with "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}, or not at all.'
                )

    def attach(self, driver: BeforeForward) -> None:
        """Set the hooks. With a budget ``driver`` is told of each training forward before it runs.

        The hooks do not own the driver, and a copy of the model is not driven.
        """
        self.close()
        if self.blocks:
            rest = list(outside(self.model, self.blocks))
            cut = _InputCut([block.module for block in self.blocks], rest)
            first = self.blocks[0].module
            self._handles.append(first.register_forward_pre_hook(cut, with_kwargs=True))
        if self._has_budget:
            hook = _Announce(driver)
            self._handles.append(
                self.model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            )
        if self._recomputes:
            self._caching = _caching_configs(self.model)
            for config in self._caching:
                config.use_cache = False

    def measure(
        self,
        groups: Sequence[ModuleGroup],
        freezer: Freezer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Costs:
        """Return what every choice among ``groups`` costs for this batch.

        The flags that ``freezer`` set are lost; the caller sets them anew.

        Raises:
            ValueError: The model has no blocks, or not such as can be told apart.
        """
        self.blocks = self.blocks or _blocks(self.model, must=True)
        self._check(groups)
        places = [block_of(group, self.blocks) for group in groups]
        members = [
            [group for group, place in zip(groups, places, strict=True) if place == position]
            for position in range(len(self.blocks))
        ]
        freezer.clear(groups)
        profiler = Profiler(self.model, self.blocks, members, freezer)
        with self._uncompiled():
            costs = profiler.measure(args, kwargs, group_blocks=places)
        self._check_prefix(groups, profiler.prefix_parameters)
        return costs

    def _uncompiled(self) -> AbstractContextManager[object]:
        """What runs in here runs block by block and operation by operation."""
        if any(is_compiled(block.module) for block in self.blocks):
            eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
            return eager
        return nullcontext()  # the other would import all that compiling needs

    def _check_prefix(self, groups: Sequence[ModuleGroup], prefix: Iterable[Tensor]) -> None:
        before = {id(parameter) for parameter in prefix}
        for group in groups:
            if any(id(parameter) in before for parameter in group.parameters()):
                raise ValueError(
                    f"Budget: group {group.name!r} runs before the blocks, so that no gradient "
                    f"could stop at one while it is active. Leave it out of the adapter's targets, "
                    f"or pass always_active=[{group.name!r}] and train it at that price."
                )

    def gated(self, groups: Iterable[ModuleGroup], chosen: Collection[str]) -> set[str]:
        """Return the groups that compiled code takes a gradient for, inactive ones too.

        With a budget that is all but the blocks that are compiled by themselves and idle as a
        whole: there are at most four kinds of code then, and an idle block costs what it does in
        eager mode. DDP waits for all parameters, so that it must have all.
        """
        if not self._has_budget or world_size() > 1:
            return {group.name for group in groups}
        names = {group.name: block_of(group, self.blocks) for group in groups}
        compiled = {i for i, block in enumerate(self.blocks) if is_compiled(block.module)}
        idle = compiled - {names[name] for name in chosen}
        return {name for name, block in names.items() if block not in idle}

    def idle_blocks(self, idle: Iterable[ModuleGroup]) -> list[nn.Module]:
        """Return the blocks in which nothing trains while these groups are ``idle``."""
        resting = {parameter for group in idle for parameter in group.parameters()}
        blocks = (block.module for block in self.blocks)
        return [
            block
            for block in blocks
            if all(p in resting for p in block.parameters() if p.requires_grad)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for config in self._caching:
            config.use_cache = True
        self._handles, self._caching = [], []


class BeforeForward(Protocol):
    """What is told of a forward pass before it runs."""

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to be called so."""
        ...


class _Announce:
    """Pre-hook of the model: tells the driver, without owning it, and alone in this process."""

    def __init__(self, driver: BeforeForward | None = None) -> None:
        self._driver = weakref.ref(driver) if driver else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # nothing can be measured within; the first step says so
        driver = self._driver() if self._driver else None
        if driver and module.training and torch.is_grad_enabled():
            driver.before_forward(args, kwargs)

    def __reduce__(self) -> tuple[type[_Announce], tuple[()]]:
        return _Announce, ()


class _InputCut:
    """Pre-hook of the first block: takes no gradient to embeddings that do not train.

    ``enable_input_require_grads``, which transformers and peft call for gradient checkpointing,
    would run the backward pass through every block, whichever are active.
    """

    def __init__(self, blocks: Sequence[nn.Module], rest: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._rest = rest
        self._has_warned = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        x = hidden_states(args, kwargs)
        if x is None or not x.requires_grad or torch.compiler.is_compiling():
            return None
        if trainable_leaves(x) or not self._is_forced():
            return None
        if any(checkpoints_itself(b) and _is_reentrant(b) for b in self._blocks):
            self._warn(
                "cannot be undone, because reentrant checkpoints need it: the backward pass "
                'goes through every block. Pass {"use_reentrant": False} to save it.'
            )
            return None
        self._warn(
            "is undone: it would take the backward pass through every block, whichever are "
            "active. Non-reentrant checkpoints do without it."
        )
        return replaced((args, kwargs), x, x.detach())  # type: ignore[no-any-return]

    def _is_forced(self) -> bool:
        hooks = (hook for module in self._rest for hook in module._forward_hooks.values())
        return any(getattr(hook, "__name__", "") in _ASKS_FOR_GRADIENTS for hook in hooks)

    def _warn(self, fate: str) -> None:
        if not self._has_warned:
            logger.warning("enable_input_require_grads() of the model %s", fate)
        self._has_warned = True


def _blocks(model: nn.Module, *, must: bool) -> list[Block]:
    try:
        blocks = find_blocks(model)
    except ValueError:
        if must:
            raise
        return []
    if must and not blocks:
        raise ValueError(
            f"found no repeated blocks in {type(model).__name__}, which a Budget and "
            "checkpoint_idle=True need: no ModuleList of two or more modules of one class. Use an "
            "allocator without a memory budget, such as 'discounted'."
        )
    return blocks


def block_of(group: ModuleGroup, blocks: Sequence[Block]) -> int | None:
    """Return the position of the block that holds all modules of ``group``; None if none does.

    Raises:
        ValueError: The group lies partly in one block and partly elsewhere.
    """
    owner = {id(module): i for i, block in enumerate(blocks) for module in block.module.modules()}
    places = {owner.get(id(module)) for module in group.modules}
    if len(places) > 1:
        raise ValueError(
            f"group {group.name!r} spans several blocks (tied weights, or a rule that joins them), "
            "so no block can be idle without the others. Use an allocator without a memory budget, "
            "such as 'discounted', or groups that lie within one block each."
        )
    return places.pop()


def _is_reentrant(block: nn.Module) -> bool:
    function = getattr(block, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.keywords.get("use_reentrant") is True


def _caching_configs(model: nn.Module) -> list[Any]:
    """Return the configs that make a training forward hold every block's keys and values."""
    configs = (getattr(module, "config", None) for module in model.modules())
    caching = {id(c): c for c in configs if getattr(c, "use_cache", False) is True}
    return list(caching.values())
