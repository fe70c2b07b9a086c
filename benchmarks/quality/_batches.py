"""The order of the training rows, which is the same for every method."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, islice, repeat

from _shared import Batch
from torch.utils.data import default_collate


def length_grouped_batches(
    examples: list[Batch], *, batch_size: int, steps: int, seed: int
) -> Iterator[Batch]:
    """Yield ``steps`` batches of rows with similar lengths, so that there is little padding.

    In every epoch the rows are shuffled and divided into pools of 50 batches. The rows of a pool
    are sorted by length, and its batches are shuffled. The same seed gives the same order.

    Raises:
        ValueError: There are fewer examples than ``batch_size``.
    """
    if len(examples) < batch_size:
        raise ValueError(f"batch_size={batch_size} exceeds the {len(examples)} training rows")
    lengths = [int(example["attention_mask"].sum()) for example in examples]
    generator = random.Random(seed)

    def epoch() -> Iterator[list[int]]:
        order = generator.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), 50 * batch_size):
            pool = sorted(order[start : start + 50 * batch_size], key=lengths.__getitem__)
            whole = range(0, len(pool) - batch_size + 1, batch_size)
            batches = [pool[first : first + batch_size] for first in whole]
            yield from generator.sample(batches, len(batches))

    rows = islice(chain.from_iterable(epoch() for _ in repeat(None)), steps)
    return (default_collate([examples[i] for i in batch]) for batch in rows)
