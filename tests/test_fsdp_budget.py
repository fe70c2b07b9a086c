"""A `Budget` under FSDP2: the choices and losses of DDP, and no step beyond the limit on any rank.

The peaks are counted on each rank, gathered parameters and buffers of collectives included.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import returned_on_ranks
from test_fsdp import BF16_REDUCED_IN_32, Unflagged, full
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import ToyModel, batch, same, weights, wrapped

from dynalora_optim import Budget, DynamicAllocationOptimizer, LiveBytes
from dynalora_optim.memory._sharding import IN_FLIGHT

pytestmark = pytest.mark.distributed
STEPS, BLOCKS, ROWS, FEATURES = 8, 8, 256, 16
BUDGET = Budget(memory=0.4, compute=0.6)
# A prediction may be too high: by two hidden states of these models, and twice their output.
SLACK = 2048 + 8 * ROWS * 2 * (FEATURES + 3) + IN_FLIGHT


class Wide(ToyModel):
    """Blocks whose activations take much more than their weights."""

    def __init__(self, kind: str = "flagged") -> None:
        super().__init__(layers=BLOCKS, features=FEATURES)
        for block in self.layers:
            if kind == "unflagged":
                adapter = Unflagged(FEATURES)
                adapter.load_state_dict(block[0].state_dict())
                block[0] = adapter
            for _ in range(4):
                block.append(nn.Linear(FEATURES, FEATURES).requires_grad_(False))
                block.append(nn.GELU())


def sharded(units: str = "blocks", model: nn.Module | None = None, **options: Any) -> Wide:
    model = model or Wide("unflagged" if units == "adapters" else "flagged")
    for block in model.layers if units != "whole" else ():
        if units == "adapters":
            fully_shard(block[0], **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)


def rows(step: int, rank: int, count: int = ROWS) -> Tensor:
    return batch(2 * step + rank, count, FEATURES)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def whole_peak(model: nn.Module, x: Tensor) -> int:
    """The counted peak of a step in which everything trains; the first one makes what is kept."""
    for _ in range(2):
        model.zero_grad()
        with LiveBytes() as memory:
            loss_of(model, x).backward()
    model.zero_grad()
    return memory.peak


class Run:
    """What a run has done on one rank."""

    def __init__(self, model: nn.Module, budget: Any = BUDGET, **options: Any) -> None:
        self.model = model
        bare = getattr(model, "module", model)
        self.optimizer = wrapped(bare, lr=0.02, allocator=budget, period=1, **options)
        self.losses: list[float] = []
        self.peaks: list[int] = []

    def step(self, *batches: Tensor) -> None:
        """Take a step with a backward for each of these batches."""
        for x in batches:
            with LiveBytes() as memory:
                loss = loss_of(self.model, x)
                loss.backward()
                self.losses.append(float(loss.detach()))
                del loss
            self.peaks.append(memory.peak)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def limit(self) -> int:
        return self.optimizer.allocator.limit(self.optimizer._allocation.costs)

    def result(self) -> dict[str, Any]:
        chosen = [entry.chosen for entry in self.optimizer.record]
        costs = self.optimizer._allocation.costs
        whole = costs.peak(costs.all_active)
        report = {"chosen": chosen, "losses": self.losses, "peaks": self.peaks[1:]}
        return {**report, "limit": self.limit, "whole": whole}


class Replay:
    """Chooses the groups, by their positions, that another run has chosen."""

    uses_active = False

    def __init__(self, chosen: list[list[int]]) -> None:
        self._chosen = chosen

    def select(self, context: Any) -> list[int]:
        return self._chosen[context.reallocation]

    @classmethod
    def of(cls, optimizer: DynamicAllocationOptimizer) -> Replay:
        places = {name: place for place, name in enumerate(optimizer.groups)}
        return cls([[places[name] for name in entry.chosen] for entry in optimizer.record])


def run(rank: int, model: nn.Module, budget: Any = BUDGET) -> Run:
    found = Run(model, budget)
    dtype = next(model.parameters()).dtype
    for step in range(STEPS):
        found.step(rows(step, rank).to(dtype))
    return found


def like_ddp(rank: int, units: str) -> dict[str, Any]:
    """Train in float64 like DDP with the same choices; say what DDP would have chosen."""
    kind = "unflagged" if units == "adapters" else "flagged"
    found = run(rank, sharded(units, Wide(kind).double()))
    result = found.result()
    twin = run(rank, DistributedDataParallel(Wide(kind).double()), Replay.of(found.optimizer))
    budgeted = run(rank, DistributedDataParallel(Wide(kind).double()))
    return {
        **result,
        "weights": full(found.model),
        "twin losses": twin.losses,
        "twin weights": weights(twin.model.module),
        "ddp": [entry.chosen for entry in budgeted.optimizer.record],
        "counted": whole_peak(sharded(units, Wide(kind).double()), rows(0, rank).double()),
    }


def prefetching(model: Wide) -> Wide:
    """Let each block gather its neighbour ahead, as a user may ask for."""
    for block, following in itertools.pairwise(model.layers):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    return model


SETTINGS: dict[str, Callable[[], Wide]] = {
    "mixed precision": lambda: sharded(**BF16_REDUCED_IN_32),
    "kept after the forward": lambda: sharded(reshard_after_forward=False),
    "gathered ahead": lambda: prefetching(sharded()),
}


def set_otherwise(rank: int, case: str) -> dict[str, Any]:
    found = run(rank, SETTINGS[case]())
    return {**found.result(), "counted": whole_peak(SETTINGS[case](), rows(0, rank))}


def unsynchronised(rank: int) -> dict[str, Any]:
    """Two micro-batches, the first without a reduction: whole gradients wait on every rank."""
    found = Run(sharded())
    for step in range(STEPS):
        for micro in range(2):
            found.model.set_requires_gradient_sync(micro == 1)
            with LiveBytes() as memory:
                loss_of(found.model, rows(2 * step + micro, rank)).backward()
            found.peaks.append(memory.peak)
        found.optimizer.step()
        found.optimizer.zero_grad()
    meter = found.optimizer._costing._meter
    return {**found.result(), "reduces": meter.reduces}


def unequal_rows(rank: int) -> dict[str, Any]:
    """Rank 1 has three times the rows, and then so many that no plan holds them."""
    found = Run(sharded(), Budget(memory=0.75))
    for step in range(STEPS):
        found.step(rows(step, rank, ROWS * (1 + 2 * rank)))
    limit = found.limit
    bounded = Run(sharded(), Budget(memory=limit))
    bounded.step(rows(0, rank))
    said = []
    for step, count in enumerate((ROWS, 8 * ROWS, ROWS // 2), start=1):
        try:
            bounded.step(rows(step, rank, count if rank else ROWS))
        except ValueError as error:
            said.append((step, str(error)))
    return {**found.result(), "said": said, "bounded": bounded.peaks, "bound": limit}


def growing(rank: int, *, shards: bool) -> dict[str, Any]:
    """Two forwards before a backward; then the second one of rank 1 is larger than any before."""
    limit = 600_000
    model = sharded() if shards else DistributedDataParallel(Wide())
    found = Run(model, Budget(memory=limit))
    optimizer, small = found.optimizer, rows(0, rank, ROWS // 8)
    active = []

    def step(*batches: Tensor) -> int:
        with LiveBytes() as memory:
            losses = []
            for x in batches:
                losses.append(loss_of(found.model, x))
                active.append(len(optimizer.active_groups))
            sum(losses).backward()
            losses.clear()
        optimizer.step()
        optimizer.zero_grad()
        return memory.peak

    while len(optimizer.record) < 2 or len(optimizer.active_groups) < BLOCKS:
        step(small, small)
    peak = step(small, rows(1, rank, 2 * ROWS if rank else ROWS // 8))
    changed = active[-2:]
    step(small, small)
    found_weights = full(found.model) if shards else weights(found.model.module)
    return {"active": changed, "peak": peak, "limit": limit, "weights": found_weights}


def refused_by_ddp(rank: int) -> dict[str, Any]:
    """Rank 1 has a batch that no plan holds; then both go on."""
    found = Run(DistributedDataParallel(Wide()), Budget(memory=0.5))
    found.step(rows(0, rank))
    bounded = Run(DistributedDataParallel(Wide()), Budget(memory=2 * found.limit))
    said = []
    for step, count in enumerate((ROWS, 2 * ROWS, 32 * ROWS, ROWS)):
        try:
            bounded.step(rows(step, rank, count if rank else ROWS))
        except ValueError as error:
            said.append((step, str(error)))
    return {"said": said, "losses": bounded.losses, "weights": weights(bounded.model.module)}


class Fragile(Wide):
    """Its forward cannot run with an odd number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 2:
            raise KeyError("an odd number of rows")
        return super().forward(x)


def failing(rank: int) -> dict[str, Any]:
    """Measuring fails on rank 1 alone, once before anything was measured and once later."""
    found = Run(sharded(model=Fragile()))
    said = []
    for step, count in enumerate((ROWS + 1, ROWS, ROWS + 3, ROWS)):
        before = [module.active for module in found.model.modules() if hasattr(module, "active")]
        try:
            found.step(rows(step, rank, count if rank else ROWS))
        except (KeyError, ValueError) as error:
            after = [module.active for module in found.model.modules() if hasattr(module, "active")]
            said.append((step, type(error).__name__, str(error), before == after))
    return {"said": said, "losses": found.losses}


@contextlib.contextmanager
def counted_gathers():
    """Count the all-gathers of parameters, whichever of torch's functions starts them."""
    names = [n for n in ("all_gather_into_tensor", "all_gather_single") if hasattr(dist, n)]
    originals = {name: getattr(dist, name) for name in names}
    sizes: list[int] = []

    def noting(name: str) -> Callable[..., Any]:
        def call(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(output.numel())
            with contextlib.ExitStack() as stack:
                for other in names:  # one may call the other
                    stack.callback(setattr, dist, other, getattr(dist, other))
                    setattr(dist, other, originals[other])
                return originals[name](output, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, noting(name))
    try:
        yield sizes
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def gathers(rank: int) -> list[tuple[int, int, int]]:
    """The lowest active block, how many are recomputed, and the all-gathers, of some steps."""
    found = Run(sharded(), Budget(memory=0.3))
    seen = []
    for step in range(STEPS):
        with counted_gathers() as sizes:
            loss_of(found.model, rows(step, rank)).backward()
        _, plan = found.optimizer._costing.current((), {})
        seen.append((min(plan.active), len(plan.checkpointed), len(sizes)))
        found.optimizer.step()
        found.optimizer.zero_grad()
    return seen


def reported(rank: int) -> Any:
    """What one rank alone is told of a larger batch, and what a step with it takes."""
    model = sharded()
    optimizer = wrapped(model, active=1.0)
    x = rows(0, rank, 2 * ROWS)
    report = optimizer.memory_report(x) if rank == 0 else None
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    told = report and (report.all_active.peak, report.weights)
    return told, whole_peak(model, x), held


# Where gathers can be counted: older versions call what notes them with other arguments.
COUNTS_GATHERS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def everything(rank: int) -> dict[str, Any]:
    return {
        **{units: like_ddp(rank, units) for units in ("whole", "blocks", "adapters")},
        **{case: set_otherwise(rank, case) for case in SETTINGS},
        "unsynchronised": unsynchronised(rank),
        "unequal rows": unequal_rows(rank),
        "growing": {shards: growing(rank, shards=shards) for shards in (True, False)},
        "refused by ddp": refused_by_ddp(rank),
        "failing": failing(rank),
        "gathers": gathers(rank) if COUNTS_GATHERS else None,
        "reported": reported(rank),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return returned_on_ranks(everything)


def alike(ranks: list[dict[str, Any]], case: str) -> None:
    """Check what holds for every run: the ranks choose alike, and stay within the limit."""
    one, other = (rank[case] for rank in ranks)
    assert one["chosen"] == other["chosen"]
    assert len(set(one["chosen"])) > 2
    assert one["limit"] == other["limit"]
    for found in (one, other):
        assert max(found["peaks"]) <= found["limit"]


@pytest.mark.parametrize("units", ["whole", "blocks", "adapters"])
def test_it_trains_as_under_ddp_and_within_the_limit(units, ranks):
    alike(ranks, units)
    for found in (rank[units] for rank in ranks):
        assert found["losses"] == pytest.approx(found["twin losses"], abs=1e-9)
        assert len(set(found["losses"])) == STEPS
        for name, value in found["twin weights"].items():
            torch.testing.assert_close(found["weights"][name], value, atol=1e-9, rtol=0)
        if units != "whole":  # where gathered parameters take so much that the limit is another
            assert found["chosen"] == found["ddp"]


@pytest.mark.parametrize("case", ["whole", "blocks", "adapters", *SETTINGS])
def test_the_predicted_peak_is_the_counted_one(case, ranks):
    for found in (rank[case] for rank in ranks):
        assert 0 <= found["whole"] - found["counted"] <= SLACK


@pytest.mark.parametrize("case", SETTINGS)
def test_it_stays_within_the_limit_in_settings_of_fsdp2(case, ranks):
    alike(ranks, case)


def test_whole_gradients_that_accumulate_count(ranks):
    alike(ranks, "unsynchronised")
    assert not any(rank["unsynchronised"]["reduces"] for rank in ranks)


def test_ranks_with_unequal_batches_plan_and_refuse_together(ranks):
    alike(ranks, "unequal rows")
    one, other = (rank["unequal rows"] for rank in ranks)
    assert one["said"] == other["said"]
    assert [step for step, _ in one["said"]] == [2]
    assert "cannot hold a step" in one["said"][0][1]
    for found in (one, other):
        assert max(found["bounded"]) <= found["bound"]


@pytest.mark.parametrize("shards", [True, False], ids=["fsdp", "ddp"])
def test_a_forward_that_grows_on_one_rank_takes_what_can_be_recomputed_on_all(ranks, shards):
    one, other = (rank["growing"][shards] for rank in ranks)
    for found in (one, other):
        assert found["active"] == [BLOCKS, BLOCKS]
        assert found["peak"] <= found["limit"]
    assert same(one["weights"], other["weights"])


def test_a_rank_that_cannot_measure_stops_all_and_changes_nothing(ranks):
    (one, other) = (rank["failing"] for rank in ranks)
    assert [(step, kind) for step, kind, *_ in other["said"]] == [(0, "KeyError"), (2, "KeyError")]
    assert [(step, kind) for step, kind, *_ in one["said"]] == [
        (0, "ValueError"),
        (2, "ValueError"),
    ]
    assert all("rank 1 cannot measure its batch: 'an odd" in text for _, _, text, _ in one["said"])
    assert all(is_same for rank in (one, other) for *_, is_same in rank["said"])
    assert all(len(rank["losses"]) == 2 for rank in (one, other))


@pytest.mark.skipif(not COUNTS_GATHERS, reason="torch before 2.11")
def test_a_recomputed_block_is_gathered_once_in_the_backward(ranks):
    for rank in ranks:
        assert any(recomputed for _, recomputed, _ in rank["gathers"][1:])
        for lowest, _, count in rank["gathers"][1:]:
            ahead = lowest > 0  # the block below the lowest, of which FSDP2 does not know
            assert count == 1 + BLOCKS + (BLOCKS - lowest) + ahead


def test_one_rank_alone_may_ask_for_a_report(ranks):
    (predicted, weights), counted, held = ranks[0]["reported"]
    assert weights == held
    assert 0 <= predicted - counted <= SLACK  # it is of as many numbers, in float32


def test_under_ddp_too_a_batch_that_cannot_fit_is_refused_by_all(ranks):
    one, other = (rank["refused by ddp"] for rank in ranks)
    assert one["said"] == other["said"]
    assert [step for step, _ in one["said"]] == [2]
    assert len(one["losses"]) == len(other["losses"]) == 3
    assert same(one["weights"], other["weights"])
