"""The state dict: torch's own, with the allocation as plain values in its param groups.

``torch.distributed.checkpoint`` keeps only ``state`` and plain values of ``param_groups``, so all
that decides the future stands there, under keys that begin with ``dynalora_``. The record, which is
history, stands beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dynalora_optim._param_groups import ParamGroup
from dynalora_optim._states import drop_placeholders

PREFIX = "dynalora_"


def pack(packed: dict[str, Any], values: Sequence[Mapping[str, Any]]) -> None:
    """Put ``values``, one mapping per param group, into torch's state dict ``packed``."""
    for group, extra in zip(packed["param_groups"], values, strict=True):
        group.update((PREFIX + key, value) for key, value in extra.items())


def unpack(
    packed: Mapping[str, Any], groups: Sequence[ParamGroup]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return torch's own state dict out of ``packed``, and the values that `pack` put there.

    Both are in the order of ``groups``; groups are matched by name.

    Raises:
        ValueError: ``packed`` is a plain optimizer's, or has other module groups.
    """
    saved = _matched(packed["param_groups"], groups)
    lean = drop_placeholders({**packed, "param_groups": saved})
    lean["param_groups"] = [
        {key: value for key, value in group.items() if not key.startswith(PREFIX)}
        for group in saved
    ]
    values = [
        {k.removeprefix(PREFIX): value for k, value in group.items() if k.startswith(PREFIX)}
        for group in saved
    ]
    return lean, values


def _matched(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[ParamGroup]
) -> list[Mapping[str, Any]]:
    if any(PREFIX + "steps" not in group for group in saved_groups):
        raise ValueError(
            "state_dict was not saved by a DynamicAllocationOptimizer: its param_groups lack "
            f"'{PREFIX}steps'. Load it into the wrapped optimizer before wrapping: its state is "
            "taken over."
        )
    saved, ours = _keyed(saved_groups), _keyed(groups)
    if saved.keys() != ours.keys():
        raise ValueError(
            "state_dict holds other module groups than this optimizer; "
            f"missing: {_names(ours.keys() - saved.keys())}; "
            f"unexpected: {_names(saved.keys() - ours.keys())}. Build the model and the "
            "optimizer with the settings that they were saved with."
        )
    return [saved[key] for key in ours]


def _keyed(groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Key groups by name and, where one name has several (split options), by their order."""
    keyed: dict[tuple[str, int], Mapping[str, Any]] = {}
    seen: Counter[str] = Counter()
    for group in groups:
        name = group["name"]
        keyed[name, seen[name]] = group
        seen[name] += 1
    return keyed


def _names(keys: set[tuple[str, int]]) -> str:
    return ", ".join(sorted({name for name, _ in keys})[:5]) or "none"
