"""What the process holds beside a forward and its backward: for a budget on everything.

State that exists only while its parameter trains grows with what is active. It is in proportion to
the bytes of the gradients: AdamW keeps two numbers for each. So the search needs no further number
for each partial plan (`_search`); the proportion is that of the block in which it is the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

UNIT = 2**16  # rates are whole numbers of bytes for so many bytes of gradients


@dataclass(frozen=True)
class Resident:
    """What is alive in every step, whichever modules train; in bytes.

    Attributes:
        capacity: What the device can give to this process, less a reserve; 0 if it is not known.
        weights: Parameters, with what belongs to quantised ones.
        buffers: Buffers that share no memory with parameters.
        masters: Float32 copies of weights that always train.
        state: The rest of the optimizer's state that stays on the device, at its largest.
        idle: The part of ``state`` that belongs to modules that may be inactive.
        batch: The batches of the forwards that precede a backward.
        other: What else is alive on the device: other models, say. 0 where it cannot be seen.
        active: The bytes of state and copies that exist only while their parameter trains, for
            each ``UNIT`` bytes of its gradient.
        copies: The part of ``active`` that is float32 copies.
        update: The temporary bytes of the optimizer's update, for each ``UNIT`` bytes of gradients
            in the blocks.
        outer_update: The temporary bytes of the update of what trains outside the blocks.
        most_update: The temporary bytes of an update of everything together; 0 if not known.
    """

    capacity: int = 0
    weights: int = 0
    buffers: int = 0
    masters: int = 0
    state: int = 0
    idle: int = 0
    batch: int = 0
    other: int = 0
    active: int = 0
    copies: int = 0
    update: int = 0
    outer_update: int = 0
    most_update: int = 0

    @property
    def beside(self) -> int:
        """The bytes that are alive whichever modules train."""
        return self.weights + self.buffers + self.masters + self.state + self.batch + self.other

    def parts(self, gradients: int) -> dict[str, int]:
        """Return what is alive in each step beside it, by name; 0 for a part that is not there.

        Args:
            gradients: The bytes of the gradients of the blocks that train.
        """
        copies = self.copies_of(gradients)
        return {
            "weights": self.weights,
            "buffers": self.buffers,
            "float32 copies": self.masters + copies,
            "optimizer state": self.state + self.of_active(gradients) - copies,
            "batch": self.batch,
            "other tensors on the device": self.other,
        }

    def of_active(self, gradients: int) -> int:
        """Return the bytes of state and copies of blocks whose gradients have so many bytes."""
        return -(-gradients * self.active // UNIT)

    def copies_of(self, gradients: int) -> int:
        """Return the bytes of float32 copies of blocks whose gradients have so many bytes."""
        return -(-gradients * self.copies // UNIT)

    def temporary(self, gradients: int) -> int:
        """Return the temporary bytes of an update of blocks whose gradients have so many bytes."""
        found = self.outer_update - (-gradients * self.update // UNIT)
        return min(found, self.most_update or found)

    def merged(self, other: Resident) -> Resident:
        """Return what holds on two ranks: the larger of each part, on the smaller device."""
        names = [field.name for field in fields(self)]
        both = {name: max(getattr(self, name), getattr(other, name)) for name in names}
        capacities = [one.capacity for one in (self, other) if one.capacity]
        return replace(self, **{**both, "capacity": min(capacities, default=0)})


NOTHING = Resident()  # a budget on the step alone counts nothing of it


def rate(part: int, gradients: int) -> int:
    """Return how many bytes ``part`` is for each ``UNIT`` bytes of ``gradients``, rounded up."""
    return math.ceil(part * UNIT / gradients) if gradients else 0
