"""What a step keeps alive beside one forward and its backward: the habits of the user's loop."""

from __future__ import annotations

from dataclasses import dataclass

from dynalora_optim.allocation._resident import NOTHING, Resident


@dataclass(frozen=True)
class Loop:
    """What is alive in a step in addition to the forward and backward at hand; in bytes.

    The defaults describe a loop that calls the model once per step, keeps only the loss, and begins
    each forward without gradients.

    Attributes:
        is_known: Whether a whole step of the loop was seen. Before that a plan holds as little as
            it can, so that other forwards of the first step fit too.
        carried: What earlier forwards hold for their backward.
        stale: What is alive of earlier steps until the forward is over, such as an output.
        standing: Whether the gradients of all that trains are alive from the forward on, as in
            gradient accumulation.
        keeps_output: Whether the model's output stays alive until the backward is over.
        update: The temporary tensors of the optimizer's step.
        later: What the further forwards before the backward need, for each lowest block; ``()`` if
            there are none.
        reference: The peak with all modules active and nothing checkpointed, of the whole step; 0
            for that of the forward and backward at hand.
        resident: What the process holds beside the step, for a budget on everything.
    """

    is_known: bool = True
    carried: int = 0
    stale: int = 0
    standing: bool = False
    keeps_output: bool = False
    update: int = 0
    later: tuple[int, ...] = ()
    reference: int = 0
    resident: Resident = NOTHING


ALONE = Loop()  # one forward and its backward, with nothing beside them
