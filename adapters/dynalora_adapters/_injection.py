"""The adapters of a model by name, and which of them is in place.

The model holds the modules of one adapter at a time. Those of the others wait outside of it, over
the same base modules. So the parameters and the names of the model are those of the active adapter,
and whatever works with a model of one adapter works with one of several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn
from torch.utils.hooks import RemovableHandle

from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import replace_modules, require_adapters
from dynalora_adapters._timeline import Timeline

_RECORD = "_dynalora_injection"  # an attribute of the adapted model


@dataclass(frozen=True)
class Adapter:
    """The modules of one adapter.

    Attributes:
        config: The configuration that it was made from.
        layers: Its layers.
        copies: Each trainable module of the base, and this adapter's own copy of it. Empty if the
            adapter trains the modules of the base themselves.
        embeddings: Keys in the adapter's file of embeddings that a file has replaced. They must be
            saved again.
    """

    config: AdapterConfig
    layers: tuple[AdapterLinear, ...]
    copies: tuple[tuple[nn.Module, nn.Module], ...] = ()
    embeddings: frozenset[str] = frozenset()

    @property
    def is_merged(self) -> bool:
        """Whether a base weight holds a delta of this adapter."""
        return any(layer.merged for layer in self.layers)

    @property
    def trains_base(self) -> bool:
        """Whether parts of the base itself are trained, or were replaced by a file."""
        in_place = bool(self.config.trainable) and not self.copies
        return in_place or self.config.bias != "none" or bool(self.embeddings)

    def places(self) -> dict[nn.Module, nn.Module]:
        """Return this adapter's module for each module of the base that it takes the place of."""
        return {**{layer.base_layer: layer for layer in self.layers}, **dict(self.copies)}


@dataclass
class Injection:
    """What ``inject`` stores on the model.

    Attributes:
        required_grad: The former ``requires_grad`` of every base parameter, by name.
        repacks: Which quantised layers may repack their weight for evaluation, by name.
        nested_tensor: The former ``use_nested_tensor`` of the transformer encoders, by name.
        adapters: The adapters by name.
        active: The name of the one that is in place; None if the model is the plain one now.
        timeline: Which one was in place when a forward ran.
        guards: The hooks that the last switch has set.
    """

    required_grad: dict[str, bool]
    repacks: dict[str, bool]
    nested_tensor: dict[str, bool] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    timeline: Timeline[str] = field(default_factory=Timeline)
    guards: list[RemovableHandle] = field(default_factory=list)


def find_injection(model: nn.Module) -> Injection | None:
    """Return what ``inject`` stored on ``model``; None if it was not adapted."""
    return getattr(model, _RECORD, None)


def begin_injection(model: nn.Module, record: Injection) -> None:
    """Store ``record`` on a model that is about to be adapted."""
    setattr(model, _RECORD, record)


def end_injection(model: nn.Module) -> Injection | None:
    """Forget what ``inject`` stored, and return it."""
    record: Injection | None = model.__dict__.pop(_RECORD, None)
    return record


def injection_of(model: nn.Module) -> Injection:
    """Return what ``inject`` stored on an adapted model."""
    record = find_injection(model)
    if record is None:
        raise ValueError(
            f"model ({type(model).__name__}) was not itself passed to inject(model, config); "
            f"pass the module that was given to inject, not a part of it or a module around it."
        )
    return record


def name_of(record: Injection, name: str | None) -> str:
    """Return ``name``, or that of the active adapter for None.

    Raises:
        ValueError: If there is no adapter of this name, or none is active.
    """
    known = ", ".join(map(repr, record.adapters))
    if name is None:
        if record.active is None:
            raise ValueError(
                f"no adapter of the model is active; name one of {known}, or call "
                f"set_adapter(model, name) first."
            )
        return record.active
    if name not in record.adapters:
        raise ValueError(f"name={name!r} is no adapter of the model; pass one of {known}.")
    return name


def active_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Return the layers of the active adapter by name.

    Raises:
        ValueError: If the model has no adapters, or none of them is active.
    """
    record = find_injection(model)
    if record is not None:
        name_of(record, None)
    return require_adapters(model)


def active_adapter_of(model: nn.Module) -> Adapter:
    """Return the adapter of ``model`` that is in place."""
    record = injection_of(model)
    return record.adapters[name_of(record, None)]


def note_embeddings(model: nn.Module, keys: frozenset[str]) -> None:
    """Store which embeddings a file has replaced for the active adapter."""
    record, adapter = injection_of(model), active_adapter_of(model)
    embeddings = adapter.embeddings | keys
    record.adapters[name_of(record, None)] = replace(adapter, embeddings=embeddings)


def place(model: nn.Module, name: str | None) -> None:
    """Put the modules of this adapter into the model; those of the base for None.

    Raises:
        ValueError: If a module of the base was replaced meanwhile. Then nothing has changed.
    """
    record = injection_of(model)
    former = {} if record.active is None else record.adapters[record.active].places()
    new = {} if name is None else record.adapters[name].places()
    bases = {own: base for base, own in former.items()}
    found = _held(model, bases)
    if missing := [base for base in new if base not in found]:
        raise ValueError(
            f"name={name!r} adapts {len(missing)} modules that the model no longer holds, such as "
            f"a {type(missing[0]).__name__}; call remove(model), then adapt the model again."
        )
    _replace(model, bases)  # at first, because a module of one may hold a base of the other
    _replace(model, new)
    record.active = name


def _held(model: nn.Module, instead: Mapping[nn.Module, nn.Module]) -> set[nn.Module]:
    """Return the modules that the model would hold with other modules ``instead`` of some."""
    found: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        module = instead.get(module, module)
        if module not in found:
            found.add(module)
            waiting += module.children()
    return found


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules; those that come in get the mode and, if adapters, the device of the base."""
    for old, own in new.items():
        if own.training is not old.training:
            own.train(old.training)
        if isinstance(own, AdapterLinear):
            own.follow_base()
    replace_modules(model, new)


@contextmanager
def placed(model: nn.Module, name: str | None) -> Iterator[None]:
    """Put an adapter into the model for the time of this context, in which nothing is computed."""
    before = injection_of(model).active
    if name == before:
        yield
        return
    place(model, name)
    try:
        yield
    finally:
        place(model, before)
