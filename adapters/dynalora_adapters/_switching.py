"""Several adapters over one base model: which of them is active."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dynalora_adapters._injection import Injection, find_injection, injection_of, name_of, place
from dynalora_adapters._models import unwrap
from dynalora_adapters._sharded import is_sharded
from dynalora_adapters._timeline import Timeline
from dynalora_adapters._torch_private import node_in_backward, original


def set_adapter(model: nn.Module, name: str | None) -> AbstractContextManager[None]:
    """Make the adapter called ``name`` the active one; for None, let the model compute as its base.

    The parameters of the model are then those of this adapter. The others keep theirs, and their
    optimizers. In a ``with`` statement, the former adapter is active again afterwards.

    Example:
        >>> with set_adapter(model, None):  # doctest: +SKIP
        ...     reference = model(**batch)

    Args:
        model: A model adapted by ``inject`` or ``load_adapter``. It may be compiled.
        name: The name of an adapter of the model, or None.

    Returns:
        A context manager. You need not use it.

    Raises:
        ValueError: If there is no adapter of this name, the active one is merged, or the model is
            sharded, or wrapped in DistributedDataParallel. Then nothing has changed.
    """
    bare = unwrap(model)
    record = injection_of(bare)
    before = record.active
    wanted = None if name is None else name_of(record, name)
    if wanted != before:
        _check_can_switch(model, bare, record)
        switch(bare, wanted)
    return _Switched(bare, before)


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the active adapter; None if there is none."""
    record = find_injection(unwrap(model))
    return None if record is None else record.active


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the model's adapters, in the order in which they were added."""
    record = find_injection(unwrap(model))
    return [] if record is None else list(record.adapters)


class _Switched(AbstractContextManager[None]):
    """What ``set_adapter`` returns: leaving its context makes the former adapter active again."""

    def __init__(self, model: nn.Module, before: str | None) -> None:
        self._model = model
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        set_adapter(self._model, self._before)


def check_not_merged(record: Injection, wish: str) -> None:
    """Raise if the base weights hold the delta of an adapter, so that ``wish`` would be wrong."""
    merged = [name for name, adapter in record.adapters.items() if adapter.is_merged]
    if merged:
        raise ValueError(
            f"the base weights hold the delta of the adapter {merged[0]!r}, so that {wish} would "
            f"compute with it; call unmerge(model) first."
        )


def _check_can_switch(model: nn.Module, bare: nn.Module, record: Injection) -> None:
    check_not_merged(record, "another adapter")
    compiled = original(model)
    inner = model if compiled is None else compiled
    if inner is not bare:
        raise ValueError(
            f"model is wrapped in {type(inner).__name__}, which holds the parameters of the active "
            f"adapter only; switch first, then wrap the model."
        )
    if any(is_sharded(parameter) for parameter in bare.parameters()):
        raise ValueError(
            "model is sharded over processes, with the parameters of the active adapter only; "
            "switch first, then fully_shard(model)."
        )


def switch(model: nn.Module, name: str | None) -> None:
    """Make the adapter called ``name`` the active one, and refuse what it makes wrong.

    A checkpoint recomputes a forward with the modules that are in the model then. So each module
    that the switch has put there first looks whether the forward ran with the same adapter.
    """
    record = injection_of(model)
    bases = _places(record)
    place(model, name)
    record.timeline.note(repr(name))
    for handle in record.guards:
        handle.remove()
    new, guard = _places(record), _Guard(record.timeline, repr(name))
    placed = [new.get(base, base) for base in {**bases, **new}]
    record.guards = [module.register_forward_pre_hook(guard) for module in placed]


def _places(record: Injection) -> dict[nn.Module, nn.Module]:
    return {} if record.active is None else record.adapters[record.active].places()


class _Guard:
    """A forward pre-hook that raises if the forward that is recomputed ran with another adapter."""

    def __init__(self, timeline: Timeline[str], now: str) -> None:
        self._timeline = timeline
        self._now = now

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        node = node_in_backward()
        then = None if node is None else self._timeline.at(node)
        if then is not None and then != self._now:
            raise RuntimeError(
                f"a checkpoint recomputes a forward in which the adapter {then} was active, but "
                f"now it is {self._now}; call backward() before set_adapter(model, name), or make "
                f"{then} active again for it."
            )
