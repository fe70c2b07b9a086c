"""Random models in random loops on random budgets: how a case is drawn, and what must hold for it.

The soak (``soak.py``) and the Hypothesis property draw their cases here. A case is small: a model
of two or three narrow blocks, a few short rows, three steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from budgets import adapted, clear, costs_of, gradients, on_budget, shape
from tiny_models import Sizes, TinyModel, build
from torch import Tensor

from dynalora_optim import AllocationContext, Blocks, Budget, LiveBytes
from dynalora_optim.allocation._costs import Plan

FAMILIES = ("bert", "roberta", "llama", "gpt2", "encoder")
# Micro-batches per step, and forward passes before each backward pass.
LOOPS = ((1, 1), (1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2))
STEPS, WIDTH = 3, 32
# What a budget may ask for beyond the least that is counted: docs/budgets.md says by how much a
# predicted peak may be too high, such as by the mask of a padded batch. The constant counts once
# for each forward before a backward.
TOO_HIGH, SCALARS = 1.1, 2048


class Checked(Budget):
    """A budget each of whose selections must give every module a chance."""

    def select(self, context: AllocationContext) -> list[int]:
        assert min(self.probabilities(context)) > 0
        return super().select(context)


@dataclass(frozen=True)
class Case:
    """A model, a user's loop (what happens between two optimizer steps), and a budget.

    ``how``: our adapters ("ours"), those of "peft", or whole "blocks".
    """

    family: str
    how: str
    blocks: int
    accumulate: int
    calls: int
    keeps_output: bool
    zeroes_late: bool
    clips: bool
    evaluates: bool
    own_checkpoints: bool
    precision: str
    shapes: tuple[tuple[int, int], ...]
    memory: float
    seed: int

    @staticmethod
    def drawn(draw: random.Random) -> Case:
        """The case that these random numbers give."""
        accumulate, calls = draw.choice(LOOPS)
        flags = [draw.choice([False, True]) for _ in range(5)]
        precision = draw.choice(["float32", "float64", "autocast"])
        count = draw.choice([1, 1, 2, 3])
        shapes = [(draw.choice([1, 2, 4]), draw.choice([5, 8, 15, 16])) for _ in range(count)]
        return Case(
            draw.choice(FAMILIES),
            draw.choice(["ours", "peft"]),
            draw.randint(2, 3),
            accumulate,
            calls,
            *flags,
            precision=precision,
            shapes=tuple(shapes),
            memory=round(draw.uniform(0.4, 1.0), 3),
            seed=draw.randint(0, 9),
        )

    def model(self) -> TinyModel:
        sizes = Sizes(length=16, width=WIDTH, blocks=self.blocks)
        tiny = self._adapted(sizes)
        if self.own_checkpoints and self.family != "encoder":
            tiny.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.precision == "float64":
            tiny.model.double()
        return tiny

    def _adapted(self, sizes: Sizes) -> TinyModel:
        if self.how != "blocks":
            return adapted(self.family, self.how, sizes=sizes)
        tiny = build(self.family, 0, sizes)
        tiny.model.train()
        return tiny

    def optimizer(self, tiny: TinyModel, budget: Budget) -> Any:
        """An optimizer that chooses in every step, with random draws of the case's own."""
        options = {"groups": Blocks(outside="frozen")} if self.how == "blocks" else {}
        return on_budget(tiny, budget, period=1, seed=self.seed, **options)

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        for number in range(self.accumulate * self.calls):
            rows, length = self.shapes[(step + number) % len(self.shapes)]
            generator = torch.Generator().manual_seed(100 * step + number)
            ids = torch.randint(2, 60, (rows, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[-1, -1] = 0
            yield {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}

    def passes(self, tiny: TinyModel, step: int) -> None:
        """The forwards and backwards of one step."""
        batches, kept = self.batches(step), []
        for _ in range(self.accumulate):
            loss: Any = 0.0
            for _ in range(self.calls):
                autocasts = self.precision == "autocast"
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocasts):
                    output = tiny.model(**next(batches))
                loss = loss + output.loss
                kept += [output] if self.keeps_output else []
                del output
            if self.zeroes_late and self.accumulate == 1:
                clear(tiny)
            loss.backward()
            del loss
            kept.clear()

    def step(self, tiny: TinyModel, optimizer: Any, step: int) -> None:
        self.passes(tiny, step)
        if self.clips:
            torch.nn.utils.clip_grad_norm_(tiny.model.parameters(), 1.0)
        if optimizer:
            optimizer.step()
        if not self.zeroes_late or self.accumulate > 1:
            clear(tiny)

    def evaluate(self, tiny: TinyModel, step: int) -> None:
        """Evaluate between two steps; what that takes is no part of training."""
        with torch.no_grad():
            tiny.model.eval()(**next(self.batches(step)))
        tiny.model.train()

    def peaks(
        self,
        tiny: TinyModel,
        optimizer: Any,
        steps: int = STEPS,
        measured: list[tuple[int, int]] | None = None,
    ) -> list[int]:
        """The counted peak of each step; those of its measurements go to ``measured``.

        With each of these are the bytes that were alive when it began.
        """
        found = []
        with LiveBytes() as memory:
            if measured is not None:
                count_apart(optimizer, memory, measured)
            for step in range(steps):
                memory.restart()
                self.step(tiny, optimizer, step)
                found.append(memory.peak)
                if self.evaluates and optimizer:
                    self.evaluate(tiny, step)
        return found

    @property
    def grows(self) -> bool:
        """Whether forwards of several sizes share a backward: one may be larger than any before."""
        return self.calls > 1 and len(self.shapes) > 1

    @property
    def hidden_state(self) -> int:
        """The bytes of the largest hidden state."""
        largest = max(rows * length for rows, length in self.shapes)
        return largest * WIDTH * (8 if self.precision == "float64" else 4)

    def at_its_largest(self) -> Case:
        """The case with all batches as large as the largest, which a budget must expect."""
        rows, lengths = zip(*self.shapes, strict=True)
        return replace(self, shapes=((max(rows), max(lengths)),))


def count_apart(optimizer: Any, memory: LiveBytes, measured: list[tuple[int, int]]) -> None:
    """Count the peaks of measurements in ``measured``, not in those of the steps.

    A second call replaces the first one.
    """
    costing = optimizer._costing
    measure = partial(type(costing).measure, costing)

    def counted(*batch: Any) -> Any:
        alive, before = memory.live, memory.peak
        memory.peak = alive
        costs = measure(*batch)
        measured.append((alive, memory.peak))
        memory.peak = before
        return costs

    costing.measure = counted


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        kind: "held" or "refused".
        measuring: The most bytes alive while a batch was measured, as a share of the budget.
        again: Whether it was refused once and held at the next try: a forward larger than any so
            far found its memory taken by those before it, whose plans could not know of it.
    """

    kind: str
    measuring: float = 0.0
    again: bool = False


def check(case: Case) -> Outcome:
    """Run a case, and return what came of it.

    Raises:
        AssertionError: A step exceeds the limit, a module can never train, a gradient differs from
            that of the unshaped model, or the budget is refused although plans fit.
    """
    torch.manual_seed(0)
    unshaped, tiny = replace(case, own_checkpoints=False).model(), case.model()
    # Gradients of the step before may be alive, so the second step can be larger.
    whole = max(case.peaks(unshaped, None, 1 + max(len(case.shapes) - 1, case.zeroes_late)))
    limit = round(case.memory * whole)
    optimizer = case.optimizer(tiny, Checked(memory=limit, base="random"))
    try:
        measured: list[tuple[int, int]] = []
        refusal = ""
        for _ in range(1 + case.grows):
            try:
                found = case.peaks(tiny, optimizer, measured=measured)
                check_gradients(case, tiny, unshaped)
                break
            except ValueError as error:
                refusal = str(error)
                if "cannot hold a step" not in refusal or "pass at least memory=" not in refusal:
                    raise
                clear(tiny)
        else:
            check_refusal(case, limit, refusal)
            return Outcome("refused")
    finally:
        optimizer.close()
    assert max(found) <= limit, f"exceeded: {[round(peak / limit, 4) for peak in found]}"
    more = one_block(optimizer) + 2 * case.hidden_state
    for alive, peak in measured:
        assert peak <= max(limit, alive + more), (
            f"measuring: {peak} beyond {limit}, of which {alive} stood"
        )
    return Outcome("held", max(peak for _, peak in measured) / limit, again=bool(refusal))


def one_block(optimizer: Any) -> int:
    """The most bytes that one block takes by itself, in any role: measuring needs these, too."""
    most = 0
    for _, costs in optimizer._costing._shapes.entries:
        roles = (r for block in costs.blocks for r in (block.lowest, block.active, block.idle))
        uses = [use for role in roles for use in (role.full, role.checkpointed)]
        most = max(most, costs.forward_base + max(max(use.forward, use.backward) for use in uses))
    return most


def check_refusal(case: Case, limit: int, why: str) -> None:
    """No plan would have held: even with every block checkpointed, one block needs too much."""
    least = least_peak(case.at_its_largest())
    enough = least * TOO_HIGH + SCALARS * case.calls
    assert enough > limit, f"{least} of {limit} bytes would do, but: {why}"


def check_gradients(case: Case, tiny: TinyModel, unshaped: TinyModel) -> None:
    """One more step: each gradient is that of the unshaped model."""
    if case.precision != "float64":
        return
    for one in (tiny, unshaped):
        clear(one)
    unshaped.model.load_state_dict(tiny.model.state_dict())
    case.passes(tiny, STEPS)
    case.passes(unshaped, STEPS)
    found, want = gradients(tiny), gradients(unshaped)
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-12)


def least_peak(case: Case) -> int:
    """The counted peak of the most that one block needs alone, all above it checkpointed.

    If gradients are zeroed between the forward and the backward, they may count in both.
    """
    tiny, most = case.model(), 0
    optimizer = case.optimizer(tiny, Budget(memory=1 << 40))
    case.passes(tiny, 0)
    costs = costs_of(optimizer)
    for block in costs.lowest_blocks():
        plan = Plan(costs.pinned | {block}, frozenset(range(block, len(costs.blocks))))
        shape(optimizer, plan)
        clear(tiny)
        late = costs.gradients(plan) + costs.outer_gradients if case.zeroes_late else 0
        most = max(most, late + max(case.peaks(tiny, None, 1 + case.zeroes_late)))
    optimizer.close()
    return most
