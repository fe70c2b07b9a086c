"""The state dict: torch's own, with the allocation as plain values in its param groups.

``torch.distributed.checkpoint`` keeps only ``state`` and plain values of ``param_groups``, so all
that decides the future stands there, under keys that begin with ``dynalora_``. The record, which is
history, stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynalora_optim._allocation import Allocation
from dynalora_optim._importance import ImportanceTracker
from dynalora_optim._param_groups import ParamGroup
from dynalora_optim._states import MARK, add_placeholders, drop_placeholders

PREFIX = "dynalora_"


def pack(
    packed: dict[str, Any],
    groups: list[ParamGroup],
    state: Mapping[Tensor, Any],
    allocation: Allocation,
    tracker: ImportanceTracker,
) -> dict[str, Any]:
    """Complete torch's state dict ``packed`` and return it."""
    add_placeholders(packed, groups, state)
    scores = tracker.state_dict()
    for group in packed["param_groups"]:
        name = group["name"]
        values = {
            **allocation.clock_state(),
            **allocation.group_state(name),
            **scores.get(name, {}),
        }
        group.update((PREFIX + key, value) for key, value in values.items())
    packed["record"] = allocation.record.state_dict()
    return packed


def unpack(packed: Mapping[str, Any], groups: Sequence[ParamGroup]) -> dict[str, Any]:
    """Return torch's own state dict out of ``packed``, its param groups in the order of ``groups``.

    Raises:
        ValueError: ``packed`` is a plain optimizer's, or has other module groups.
    """
    saved_groups = packed["param_groups"]
    if any(PREFIX + "steps" not in group for group in saved_groups):
        raise ValueError(
            "state_dict was not saved by a DynamicAllocationOptimizer: its param_groups lack "
            f"'{PREFIX}steps'. Load it into the wrapped optimizer before wrapping: its state is "
            "taken over."
        )
    saved = _keyed(saved_groups)
    ours = _keyed(groups)
    if saved.keys() != ours.keys():
        raise ValueError(
            "state_dict holds other module groups than this optimizer; "
            f"missing: {_names(ours.keys() - saved.keys())}; "
            f"unexpected: {_names(saved.keys() - ours.keys())}. Build the model and the "
            "optimizer with the settings that they were saved with."
        )
    lean = drop_placeholders({**packed, "param_groups": [saved[key] for key in ours]})
    lean["param_groups"] = [
        {key: value for key, value in group.items() if not key.startswith(PREFIX)}
        for group in lean["param_groups"]
    ]
    return lean


def restore(packed: Mapping[str, Any], allocation: Allocation, tracker: ImportanceTracker) -> None:
    """Put the allocation and the scores back as ``packed`` has them."""
    values = {
        group["name"]: {
            key.removeprefix(PREFIX): value
            for key, value in group.items()
            if key.startswith(PREFIX) and key != MARK
        }
        for group in packed["param_groups"]
    }
    clock = next(iter(values.values()))
    allocation.load_state(clock, values, packed.get("record", []))
    tracker.load_state_dict({name: one for name, one in values.items() if "score" in one})


def _keyed(groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Key groups by name and, where one name has several (split options), by their order."""
    keyed: dict[tuple[str, int], Mapping[str, Any]] = {}
    for group in groups:
        name = group["name"]
        keyed[name, sum(other == name for other, _ in keyed)] = group
    return keyed


def _names(keys: set[tuple[str, int]]) -> str:
    return ", ".join(sorted({name for name, _ in keys})[:5]) or "none"
