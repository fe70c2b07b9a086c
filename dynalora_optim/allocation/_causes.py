"""What takes the memory beside the blocks, in words: for the refusal of a budget."""

from __future__ import annotations

from dynalora_optim.allocation._costs import Costs


def causes(costs: Costs, least: int) -> str:
    """Return sentences on what makes ``least`` bytes necessary; "" if the blocks alone do."""
    found = []
    if costs.loop.carried or costs.loop.later:
        found.append("Several forward passes before one backward pass share the memory.")
    if costs.loop.standing:
        found.append(
            "Gradients are alive in the forward pass (they accumulate, or zero_grad() follows it)."
        )
    highest = len(costs.blocks) - 1
    last = costs.after_blocks(costs.base(highest), highest)
    if 2 * last > least:
        found.append(
            f"What follows the blocks, with the loss, takes {last} bytes by itself; a loss in "
            "chunks takes less (linear_cross_entropy, chunk_loss)."
        )
    return "".join(f" {sentence}" for sentence in found)
