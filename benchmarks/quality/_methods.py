"""The methods of the sweep: what each adapts, and how its optimizer is built.

A method is a name, such as ``forward``. It may have options after an @, such as
``forward@active=4,period=10`` or ``budget-0.40@activation_warmup=0``. The options are those of
`DynamicAllocationOptimizer`; those of `Pause` (state, moments, and ``activation_warmup`` for its
warmup); those of `Budget` (memory, or total in its place, compute, base, floor); ``temperature`` of
a softmax draw; ``top=1/3`` to adapt only the top share of the blocks; ``always=1/6`` to keep the
top share of the blocks active in every step; ``targets=all-linear`` to put adapters into all linear
layers; and ``longer=1.25`` to train for that many times the task's steps, so that methods can be
compared at equal compute.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from _importances import ALLOCATORS, MEASURES
from _models import lora_targets
from _shared import head_modules
from torch import nn
from torch.optim import Optimizer

from dynalora_adapters import LoRAConfig, VeRAConfig, inject
from dynalora_optim import (
    Blocks,
    Budget,
    DynamicAllocationOptimizer,
    Ema,
    ImportanceTracker,
    Pause,
    badam,
    lisa,
)

LORA_RANK, VERA_RANK = 8, 128
PERIOD, WARM_UP = (
    20,
    10,
)  # steps between reallocations; steps of warm-up after a pause

# The learning rate of the adapted parameters, divided by that of the head. All methods share the
# latter. VeRA trains scales, which need a larger rate. Pretrained weights need a smaller one.
SCALES = {"lora": 1.0, "vera": 10.0, "bitfit": 1.0, "full": 0.05}


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        adapts: One of `SCALES`, or ``"lora-peft"``, ``"vera-peft"`` for the adapters of peft.
        allocation: Options of `DynamicAllocationOptimizer`; None for the plain optimizer.
        top: The share of the blocks, counted from the top, that get adapters or, with ``adapts``
            ``"full"``, train. Below 1, nothing outside the blocks and the head trains.
        targets: ``"all-linear"``, or None for the query and value projections.
        preset: `lisa` or `badam`, used in place of `DynamicAllocationOptimizer`.
        longer: The number of steps, as a multiple of the task's.
        checkpointed: Recompute every block in the backward pass, by the model's own switch.
    """

    adapts: str
    allocation: Mapping[str, Any] | None = None
    top: float = 1.0
    targets: str | None = None
    preset: Callable[..., DynamicAllocationOptimizer] | None = None
    longer: float = 1.0
    checkpointed: bool = False

    @property
    def scale(self) -> float:
        """Return the learning rate of the adapted parameters, divided by that of the head."""
        return SCALES[self.adapts.removesuffix("-peft")]


def _dynamic(adapts: str = "lora", **options: Any) -> Method:
    usual = {"period": PERIOD, "activation_warmup": WARM_UP}
    share = {} if "memory" in options else {"active": 2 / 3}  # a Budget decides this itself
    return Method(adapts, {**share, **usual, **options})


def _blocks(**options: Any) -> Method:
    """Return a method that trains whole blocks, chosen by a `Budget`, and the head."""
    groups = Blocks(outside="frozen")
    return Method("full", {"period": PERIOD, "groups": groups, "heads": True, **options})


def _decrease(allocator: Any) -> Method:
    return _dynamic(importance="decrease", allocator=allocator)


METHODS: dict[str, Method] = {
    "full": Method("full"),
    "bitfit": Method("bitfit"),
    "lora": Method("lora"),
    "lora-peft": Method("lora-peft"),
    "static": Method("lora", top=1 / 3),
    "random": _dynamic(allocator="random"),
    "shuffled": _dynamic(allocator="shuffled"),
    "forward": _dynamic(importance="forward"),
    "gradient": _dynamic(importance="gradient"),
    "decrease": _decrease("stochastic"),
    "bandit": _decrease("bandit"),
    "grass": _dynamic(importance="rms", allocator="softmax"),
    "magma": _dynamic(importance="alignment", allocator="softmax"),
    "vera": Method("vera"),
    "vera-peft": Method("vera-peft"),
    "dynavera": _dynamic("vera", importance="forward"),
    "lora-checkpointed": Method("lora", checkpointed=True),
    "budget-0.15": _dynamic(memory=0.15, compute=0.6),
    "budget-0.30": _dynamic(memory=0.30, compute=0.6),
    "budget-0.40": _dynamic(memory=0.40, compute=0.6),
    "budget-0.75": _dynamic(memory=0.75, compute=1.0),
    "lisa": Method("full", {"layers": 2, "period": PERIOD}, preset=lisa),
    "badam": Method("full", {"period": PERIOD}, preset=badam),
    "top-blocks": Method("full", top=1 / 3),
    "blocks-0.30": _blocks(memory=0.30, compute=0.6),
}


def method(name: str) -> Method:
    """Return the method of this name, with the options that follow an @.

    Raises:
        ValueError: There is no such method or option.
    """
    base, _, options = name.partition("@")
    if base not in METHODS:
        raise ValueError(f"there is no method {base!r}; choose from {[*METHODS]}")
    found = METHODS[base]
    given = dict(map(_option, filter(None, options.split(","))))
    of_method = ("top", "targets", "longer")
    found = replace(found, **{key: given.pop(key) for key in of_method if key in given})
    if found.targets not in (None, "all-linear"):
        raise ValueError(f"{name!r}: targets= must be all-linear")
    if given and found.allocation is None:
        raise ValueError(
            f"{base} makes no choices, so {name!r} may only set {', '.join(of_method)}"
        )
    usual = {**(found.allocation or {})}
    if "total" in given:
        usual.pop("memory", None)  # a budget has one of both
    return replace(found, allocation={**usual, **given}) if usual else found


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (equals and key.isidentifier()):
        raise ValueError(f"{text!r} is not an option such as active=4")
    if re.fullmatch(r"\d+/\d+", value):
        over, under = map(int, value.split("/"))
        return key, over / under
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def adapt(model: nn.Module, chosen: Method) -> nn.Module:
    """Prepare the parameters that a method trains. Return the model; peft may wrap it."""
    kind, heads = chosen.adapts, new_heads(model)
    if chosen.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if kind == "full":
        if chosen.top < 1:
            _freeze_below(model, chosen.top, heads)
        return model
    if kind == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.split(".")[0] in heads)
        return model
    targets = top_targets(model, chosen)
    if kind == "lora":
        config = LoRAConfig(rank=LORA_RANK, alpha=2 * LORA_RANK, targets=targets, trainable=heads)
        return inject(model, config)
    if kind == "vera":
        return inject(model, VeRAConfig(rank=VERA_RANK, targets=targets, trainable=heads))
    return _adapted_by_peft(model, kind, targets, heads)


def _adapted_by_peft(
    model: nn.Module, kind: str, targets: str | list[str], heads: list[str]
) -> nn.Module:
    import peft

    common = {"target_modules": targets, "modules_to_save": heads}
    config: Any
    if kind == "lora-peft":
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, **common)
    else:
        config = peft.VeraConfig(r=VERA_RANK, projection_prng_key=0, **common)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def top_targets(model: nn.Module, chosen: Method) -> str | list[str]:
    """Return the layers to adapt. Below ``top=1`` they are full names in the top blocks."""
    named = chosen.targets or lora_targets(model)
    if chosen.top >= 1:
        return named
    in_top = _in_top(model, chosen.top)
    return [
        name
        for name, module in model.named_modules()
        if in_top(name)
        and (isinstance(module, nn.Linear) if chosen.targets else name.rpartition(".")[2] in named)
    ]


def _freeze_below(model: nn.Module, top: float, heads: list[str]) -> None:
    """Freeze all parameters except those of the heads and of the top share of the blocks."""
    in_top = _in_top(model, top)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in heads or in_top(name))


def _in_top(model: nn.Module, top: float) -> Callable[[str], bool]:
    """Return whether a name belongs to the top share of the blocks."""

    def block(name: str) -> int:
        place = re.search(r"\.(\d+)\.", name)
        return int(place[1]) if place else -1

    blocks = 1 + max(block(name) for name, _ in model.named_modules())
    lowest = blocks - max(1, round(top * blocks))
    return lambda name: block(name) >= lowest


def _top_blocks(model: nn.Module, share: float) -> list[str]:
    """Return the names of the top share of the blocks."""
    if not share:
        return []
    in_top = _in_top(model, share)
    named = [name for name, _ in model.named_modules() if re.search(r"\.\d+$", name)]
    return [name for name in named if in_top(f"{name}.")]


def build(model: nn.Module, chosen: Method, *, lr: float, seed: int) -> Optimizer:
    """Return the optimizer of a method over an adapted model.

    Args:
        model: The model that `adapt` returned.
        chosen: The method.
        lr: The rate of the head. Adapted parameters have ``chosen.scale`` times this rate.
        seed: The seed of the allocation.
    """
    heads = head_names(model)
    adapted: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if name.startswith(tuple(heads)) else adapted).append(parameter)
    groups = [{"params": adapted, "lr": lr * chosen.scale}, {"params": head, "lr": lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    if chosen.allocation is None:
        return optimizer
    options = {"seed": seed, **_allocation(chosen.allocation)}
    if options.pop("heads", False):
        options["always_active"] = [*heads, *_top_blocks(model, options.pop("always", 0.0))]
    if chosen.preset is not None:
        return chosen.preset(model, optimizer, always_active=heads, **options)
    return DynamicAllocationOptimizer(optimizer, model, **options)


def head_names(model: nn.Module) -> list[str]:
    """Return the dotted paths of the heads. The model may be a peft model."""
    inner = getattr(model, "base_model", None)
    if type(model).__name__.startswith("Peft"):
        return [f"base_model.model.{name}" for name in new_heads(inner.model)]  # type: ignore[union-attr]
    return new_heads(model)


def new_heads(model: nn.Module) -> list[str]:
    """Return the names of the heads that start from random weights: a language model has none."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    return head_modules(model) if outputs is None else []


def _allocation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace names by the objects that they stand for."""
    plain = dict(options)
    of_budget = ("memory", "total", "compute", "base", "floor")
    if shares := {key: plain.pop(key) for key in of_budget if key in plain}:
        plain["allocator"] = Budget(**shares)
    of_pause = {"activation_warmup": "warmup", "state": "state", "moments": "moments"}
    if pause := {name: plain.pop(key) for key, name in of_pause.items() if key in plain}:
        plain["pause"] = Pause(**pause)
    allocator, importance = plain.get("allocator"), plain.get("importance")
    if allocator in ALLOCATORS:
        temperature = {"temperature": plain.pop("temperature")} if "temperature" in plain else {}
        plain["allocator"] = ALLOCATORS[allocator](**temperature)
    if importance in MEASURES:
        plain["importance"] = ImportanceTracker(MEASURES[importance](), window=Ema(0.9), probe=True)
    return plain
