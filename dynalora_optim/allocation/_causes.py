"""What takes the memory, and what would lower it, in words: for the refusal of a budget."""

from __future__ import annotations

import math

from dynalora_optim.allocation._amounts import DEVICE, in_words
from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._resident import Resident

_GIB = 2**30
_MUCH = 3  # a part that is a third of the whole is worth a remedy


def total_limit(total: int | str, resident: Resident) -> int:
    """Return what is left of ``total`` for the step, and for the state of what is active.

    Raises:
        ValueError: Nobody has counted what the process holds.
    """
    if not resident.weights:
        raise ValueError(
            f"Budget(total={total!r}) does not know what the process holds beside the step. An "
            "allocator that wraps a Budget must have its attribute total; or pass memory=."
        )
    return (resident.capacity if isinstance(total, str) else total) - resident.beside


def too_small(amount: str, costs: Costs, least: int, what: str) -> str:
    """Return the message of a budget of this ``amount``, if a step needs ``least`` bytes."""
    refusal = (
        f"Budget({amount}) cannot hold a step that trains {what}, even with every block "
        "checkpointed; pass at least "
    )
    if costs.loop.resident.weights:
        return refusal + _total_too_small(amount, costs, least)
    whole = costs.whole_peak
    return (
        f"{refusal}memory={math.ceil(least / whole * 1000) / 1000} or "
        f"{least} bytes ({least / _GIB:.2f} GiB) for a batch of {costs.batch} elements. "
        f"All modules together take {whole / _GIB:.2f} GiB.{causes(costs, least)}"
    )


def _total_too_small(amount: str, costs: Costs, least: int) -> str:
    resident = costs.loop.resident
    total = resident.beside + least
    device = f"; the device gives {in_words(resident.capacity)}" if DEVICE in amount else ""
    return (
        f"total={total} ({in_words(total)}){device}. Of these, {_parts(costs, least)}."
        f"{causes(costs, least)}{_remedies(resident, total)}"
    )


def _parts(costs: Costs, least: int) -> str:
    resident = costs.loop.resident
    others = [costs.blocks[b].gradients for b in costs.trainable - costs.pinned]
    trained = sum(costs.blocks[b].gradients for b in costs.pinned) + min(others, default=0)
    state = resident.of_active(trained)
    parts = {**resident.parts(trained), "gradients": trained + costs.outer_gradients}
    step = least - state - trained - costs.outer_gradients
    named = [f"{name} {in_words(size)}" for name, size in parts.items() if size]
    return ", ".join([*named, f"and the rest of the step {in_words(max(step, 0))}"])


def _remedies(resident: Resident, total: int) -> str:
    found = ["fewer or shorter rows in a batch"]
    if resident.idle:
        found.append(
            f'pause="offload" or "drop", which takes the state of idle modules from the device '
            f"(up to {in_words(resident.idle)})"
        )
    if resident.weights * _MUCH > total:
        found.append("frozen weights in 4 bits")
    return f" What lowers it: {'; '.join(found)}."


def causes(costs: Costs, least: int) -> str:
    """Return sentences on what makes ``least`` bytes necessary; "" if the blocks alone do."""
    found = []
    if costs.loop.carried or costs.loop.followers:
        found.append("Several forward passes before one backward pass share the memory.")
    if costs.loop.standing:
        found.append(
            "Gradients are alive in the forward pass (they accumulate, or zero_grad() follows it)."
        )
    highest = len(costs.blocks) - 1
    last = max(costs.after_blocks(costs.base(highest)))
    if 2 * last > least:
        found.append(
            f"What follows the blocks, with the loss, takes {last} bytes by itself; a loss in "
            "chunks takes less (linear_cross_entropy, chunk_loss)."
        )
    return "".join(f" {sentence}" for sentence in found)
