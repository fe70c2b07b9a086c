"""Two ranks whose batches reach different modules, as in a mixture of experts: one decision."""

from __future__ import annotations

import pytest
import torch
from processes import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy import ToyAdapter, batch, wrapped

from dynalora_optim import DynamicAllocationOptimizer, Ema, ImportanceTracker

pytestmark = pytest.mark.distributed
IMPORTANCE = {
    "forward": "forward",
    "period": ImportanceTracker(window="period"),
    "mean": ImportanceTracker(window=Ema(0.5)),
    "gradient": "gradient",
    "sensitivity": "sensitivity",
    "every second": ImportanceTracker(every=2),
}


class Experts(nn.Module):
    """Six experts, of which each batch reaches those that its router names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(ToyAdapter(8) for _ in range(6))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, route: list[int]) -> Tensor:
        for expert in route:
            x = torch.tanh(self.experts[expert](x))
        return self.head(x)


def routes(step: int, rank: int) -> list[int]:
    """Expert 0 is reached by both ranks, 1 and 2 by rank 0, 3 and 4 by rank 1; 5 seldom."""
    return [0, 1 + 2 * rank, 2 + 2 * rank, *([5] if step == 5 and rank else [])]


def train_experts(rank: int, name: str) -> tuple[list, list, dict[str, float]]:
    model = Experts()
    optimizer = wrapped(model, active=3, period=2, importance=IMPORTANCE[name])
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(9):
        x = batch(2 * step + rank)
        ddp(x, routes(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.sum().item() for p in model.parameters()]
    return optimizer.record.state_dict(), weights, optimizer.tracker.scores()


@pytest.mark.parametrize("name", IMPORTANCE)
def test_ranks_that_reach_different_modules_make_one_decision(name):
    first, second = on_ranks(train_experts, name)
    assert first == second
    _, _, scores = first
    if name in ("forward", "mean", "period"):
        assert all(score > 0 for score in scores.values()), "also the one that a rank never saw"


def score_once(rank: int, step: int) -> tuple[dict[str, float], dict[str, int]]:
    model = Experts()
    optimizer = wrapped(model, active=1.0, period=100)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    own: DynamicAllocationOptimizer = wrapped(Experts(), active=1.0, period=100)
    own._model(batch(rank), routes(step, rank)).sum().backward()
    alone = own.tracker.scores()
    ddp(batch(rank), routes(step, rank)).sum().backward()
    optimizer.step()
    return alone, optimizer.tracker.scores()


def test_a_module_that_a_rank_did_not_reach_counts_with_the_others_score():
    (alone, shared), (other, same) = on_ranks(score_once, 0)
    assert shared == same
    for number in (1, 2):
        assert shared[f"experts.{number}"] == pytest.approx(alone[f"experts.{number}"])
    for number in (3, 4):
        assert shared[f"experts.{number}"] == pytest.approx(other[f"experts.{number}"])
    mean = (alone["experts.0"] + other["experts.0"]) / 2
    assert shared["experts.0"] == pytest.approx(mean)
    assert shared["experts.5"] == 0.0
