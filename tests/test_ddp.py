"""DistributedDataParallel without flags: two real processes against one that sees both batches."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any, NamedTuple

import pytest
import torch
from processes import on_ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from toy import ToyModel, batch, same, weights, wrapped

from dynalora_optim import Budget, ImportanceTracker, LiveBytes, Pause, TopK
from dynalora_optim.integrations.ddp import active_gradients_hook

pytestmark = pytest.mark.distributed
STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"active": 2, "period": 1, "allocator": "random"},
    "scored": {"active": 2, "period": 2},
    "gradient": {"active": 2, "period": 2, "importance": "gradient"},
    "smoothed": {"active": 2, "period": 2, "importance": "sensitivity"},
    "probe": {"active": 2, "period": 2, "importance": ImportanceTracker("gradient", probe=True)},
    "local": {"active": 2, "period": 1, "lr_time": "local", "pause": Pause(moments="reset")},
    "budget": {"period": 1, "allocator": Budget(memory=1.0, compute=0.6)},
}


class Checkpointed(ToyModel):
    """Recomputes every layer in the backward pass."""

    use_reentrant = False

    def forward(self, x):
        x = x.clone().requires_grad_(self.use_reentrant)  # a reentrant checkpoint asks for that
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    use_reentrant = True


class LookedAt(Reentrant):
    """The loop also calls it without DDP, between a forward and its backward."""


class Skipping(ToyModel):
    """Leaves out its last layer every other time, as LayerDrop does."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        for layer in self.layers[: len(self.layers) - self.calls % 2]:
            x = layer(x)
        return self.head(x)


class Parallel(ToyModel):
    """Its layers know nothing of each other: the output of an idle one has no gradient."""

    def forward(self, x):
        return self.head(sum(layer(x) for layer in self.layers))


MODELS = {
    "plain": ToyModel,
    "parallel": Parallel,
    "checkpointed": Checkpointed,
    "reentrant": Reentrant,
    "looked at": LookedAt,
    "skipping": Skipping,
}


def rows(step: int, rank: int | None) -> torch.Tensor:
    """The batch of one rank, or those of both."""
    parts = [batch(2 * step + r) for r in range(2)]
    return torch.cat(parts).double() if rank is None else parts[rank].double()


def train_alike(model, module, optimizer, rank, *, accumulate: int = 1, steps: int = STEPS):
    """A loop with accumulation, clipping and a scheduler; the same for one process and for DDP."""
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        for micro in range(accumulate):
            last = micro == accumulate - 1
            context = contextlib.nullcontext() if last or rank is None else model.no_sync()
            with context:
                loss = model(rows(step * accumulate + micro, rank)).square().mean()
                if isinstance(module, LookedAt):
                    with torch.no_grad():
                        module(rows(step, rank))
                (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


class Case(NamedTuple):
    """A model, its optimizer, how it is trained, and how DDP is set up."""

    model: str = "plain"
    options: str = "random"
    accumulate: int = 1
    ddp: dict[str, Any] = {}
    hook: bool = False  # send active gradients only


UNUSED, STATIC = {"find_unused_parameters": True}, {"static_graph": True}
SMALL = {"bucket_cap_mb": 1e-4}  # buckets in which nothing is active, and some in which all is
CASES = {
    **{f"options-{options}": Case(options=options) for options in OPTIONS},
    "accumulation and no_sync": Case(accumulate=3),
    "accumulation and no_sync, scored": Case(options="scored", accumulate=2),
    "parallel layers": Case("parallel"),
    "checkpointed": Case("checkpointed"),
    "reentrant checkpoints": Case("reentrant"),
    "reentrant checkpoints, looked at": Case("looked at"),
    "bucket views": Case(ddp={"gradient_as_bucket_view": True}),
    "small buckets": Case(ddp=SMALL),
    "unused parameters": Case(ddp=UNUSED),
    "a skipped layer": Case("skipping", ddp=UNUSED),
    "static graph": Case(ddp=STATIC),
    "static graph, checkpointed": Case("checkpointed", ddp=STATIC),
    "static graph, reentrant checkpoints": Case("reentrant", ddp=STATIC),
    "static graph, probe": Case(options="probe", ddp=STATIC),
    "probe, accumulation and no_sync": Case(
        options="probe", accumulate=2, ddp={"gradient_as_bucket_view": True}
    ),
    "hook": Case(hook=True),
    "hook, probe": Case(options="probe", hook=True),
    "hook, budget": Case(options="budget", hook=True),
    "hook, small buckets": Case(ddp=SMALL, hook=True),
    "hook, bucket views": Case(ddp={"gradient_as_bucket_view": True}, hook=True),
    "hook, accumulation and no_sync": Case(accumulate=3, ddp=SMALL, hook=True),
}


def options(name: str) -> dict[str, Any]:
    """Options of a new optimizer; a tracker watches one model only."""
    return copy.deepcopy(OPTIONS[name])


def run(case, rank=None, seed=0):
    """Train one case as this rank, or (None) as the single process that sees both batches."""
    kind, name, accumulate, ddp_options, hook = CASES[case]
    module = MODELS[kind](seed=seed).double()
    optimizer = wrapped(module, lr=0.02, **options(name))
    model = module if rank is None else DistributedDataParallel(module, **ddp_options)
    if hook and rank is not None:
        model.register_comm_hook(optimizer, active_gradients_hook)
    train_alike(model, module, optimizer, rank, accumulate=accumulate)
    return weights(module), [entry.chosen for entry in optimizer.record]


def run_all(rank):
    return {case: run(case, rank, seed=rank) for case in CASES}  # DDP broadcasts rank 0's weights


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(run_all)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_both_batches(case, ranks):
    (first, chosen), (second, chosen_too) = ranks[0][case], ranks[1][case]
    expected, choices = run(case)
    assert same(first, second), "the ranks part"
    assert chosen == chosen_too == choices
    assert len(set(choices)) > 1, "the set must change for this to say anything"
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, atol=1e-9, rtol=0)


class Wide(ToyModel):
    """Large enough for a budget to bind."""

    def __init__(self):
        super().__init__(layers=6, features=64)
        for block in self.layers:
            for _ in range(3):
                block.append(torch.nn.Linear(64, 64).requires_grad_(False))
                block.append(torch.nn.GELU())
            block.append(torch.nn.Linear(64, 64).requires_grad_(False))


def unequal_batches(rank):
    """Train on a budget; rank 1 has three times the rows. Return its peaks and the choices."""
    module = Wide()
    optimizer = wrapped(module, period=1, allocator=Budget(memory=0.75))
    model = DistributedDataParallel(module)
    size = 64 * (1 + 2 * rank)
    model(batch(0, size, 64)).square().mean().backward()  # measures
    peaks = []
    for step in range(6):
        optimizer.step()
        optimizer.zero_grad()
        x = batch(step, size, 64)
        with LiveBytes() as memory:
            module(x).square().mean().backward()
        peaks.append(memory.peak)
        optimizer.zero_grad()
        model(x).square().mean().backward()
    return peaks, [entry.chosen for entry in optimizer.record], all_active_peak(size)


def all_active_peak(size):
    model = Wide()
    with LiveBytes() as memory:
        model(batch(0, size, 64)).square().mean().backward()
    return memory.peak


def test_the_rank_with_the_largest_batch_keeps_its_budget():
    (_, chosen, _), (peaks, chosen_too, whole) = on_ranks(unequal_batches)
    assert chosen == chosen_too
    assert len(set(chosen)) > 1
    assert max(peaks) <= 0.75 * whole


def settings_that_part(rank):
    """Each case in which one rank is set up otherwise; the others must not hang."""
    found = {}
    for case, options in {
        "seed": {"seed": rank},
        "period": {"period": 1 + rank},
        "allocator": {"allocator": ["random", "round_robin"][rank]},
    }.items():
        module = ToyModel()
        optimizer = wrapped(module, **{"active": 2, "period": 1, **options})
        try:
            optimizer.step()
        except RuntimeError as error:
            found[case] = str(error)
    return found


class Biased(TopK):
    """Breaks the rule: looks at the rank."""

    def select(self, context):
        return [context.reallocation * torch.distributed.get_rank()]


def choices_that_part(rank):
    module = ToyModel()
    optimizer = wrapped(module, active=1, period=1, allocator=Biased())
    try:
        for step in range(3):
            module(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        return step, str(error)
    return None


def test_a_rank_set_up_otherwise_stops_the_run():
    for found in on_ranks(settings_that_part):
        assert found.keys() == {"seed", "period", "allocator"}
        assert all("the ranks disagree on the allocation" in text for text in found.values())


def test_a_rank_that_chooses_otherwise_stops_the_run_at_the_reallocation():
    for step, text in on_ranks(choices_that_part):
        assert step == 0
        assert "must not depend on the rank" in text


class Uneven:
    """A schedule that looks at the rank, as one that looks at the rank's own loss would."""

    def due(self, step):
        return step == 2 + torch.distributed.get_rank()


def schedules_that_part(rank):
    module = ToyModel()
    optimizer = wrapped(module, active=1, period=Uneven())
    model = DistributedDataParallel(module)
    try:
        for step in range(5):
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        return step, str(error)
    return None


def test_a_rank_that_reallocates_at_another_time_stops_the_run_and_no_rank_waits():
    for rank, (step, text) in enumerate(on_ranks(schedules_that_part)):
        assert step == 1, "the second step is the first after which they part"
        assert f"disagree on whether to reallocate now: rank {rank} has {not rank}" in text


def overflow(rank, at=4):
    """Train with a GradScaler; at one step the loss of rank 1 alone is inf."""
    module = ToyModel().double()
    optimizer = wrapped(module, lr=0.02, **options("gradient"))
    model = module if rank is None else DistributedDataParallel(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(STEPS):
        loss = model(rows(step, rank)).square().mean()
        is_spoilt = step == at and rank != 0
        scaler.scale(loss * float("inf") if is_spoilt else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return weights(module), [(entry.step, entry.chosen) for entry in optimizer.record]


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    (first, chosen), (second, chosen_too) = on_ranks(overflow)
    expected, choices = overflow(None)
    assert same(first, second)
    assert chosen == chosen_too == choices
    assert [step for step, _ in choices] == [0, 2, 4, 6], "seven of eight steps were done"
    for name, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(first[name], value, atol=1e-9, rtol=0)


def frozen_when_wrapped(rank):
    module = ToyModel()
    module.layers[2].requires_grad_(False)
    model = DistributedDataParallel(module)
    for parameter in (module.layers[2][0].A, module.layers[2][0].B):
        parameter.requires_grad_(True)
    optimizer = wrapped(module, active=2, period=1)
    with pytest.raises(RuntimeError, match="built while only 12 of the 14") as caught:
        model(batch()).sum().backward()
    del optimizer
    return str(caught.value)


def unsynchronised(rank):
    """Train with and without DDP; return what was logged in each."""
    said = []
    for wrap in (DistributedDataParallel, lambda module: module):
        heard: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, heard=heard: heard.append(record.getMessage())
        logging.getLogger("dynalora_optim").addHandler(handler)
        module = ToyModel()
        optimizer = wrapped(module, active=2, period=1)
        model = wrap(module)
        for step in range(4):
            model(batch(2 * step + rank)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        logging.getLogger("dynalora_optim").removeHandler(handler)
        said.append(heard)
    return said


def test_ranks_that_train_apart_are_told_once():
    for with_ddp, without in on_ranks(unsynchronised):
        assert with_ddp == []
        assert [message[:38] for message in without] == ["the ranks have different weights: noth"]


def test_a_model_wrapped_while_parameters_were_frozen_is_refused():
    for text in on_ranks(frozen_when_wrapped):
        assert "before DistributedDataParallel or accelerator.prepare" in text


def train_counting(rank, hook):
    """Train with 2 of 6 active; return the weights and the bytes that were reduced."""
    module = ToyModel(features=64, seed=rank)
    module.head.requires_grad_(False)
    optimizer = wrapped(module, lr=0.02, active=2, period=1, allocator="random")
    model = DistributedDataParallel(module)
    if hook == "active only":
        model.register_comm_hook(optimizer, active_gradients_hook)
    else:  # what DDP does by itself, where it can be counted
        model.register_comm_hook(None, allreduce_hook)
    sent = []
    with counted_reductions(sent):
        for step in range(STEPS):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights(module), sum(sent)


@contextlib.contextmanager
def counted_reductions(sent):
    """Note the bytes of each all-reduce: of gradients, of scores, of checks."""
    reduce = torch.distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        yield
    finally:
        torch.distributed.all_reduce = reduce


def train_counting_both(rank):
    return {hook: train_counting(rank, hook) for hook in ("active only", "DDP's own")}


def test_the_hook_sends_active_gradients_only_and_changes_nothing():
    for rank in on_ranks(train_counting_both):
        (found, sent), (expected, all_sent) = rank["active only"], rank["DDP's own"]
        of_one_adapter = 2 * (2 * 64) * 4  # A and B, in bytes
        assert all_sent >= STEPS * 6 * of_one_adapter, "DDP sends them all"
        assert 0 < sent <= 0.36 * all_sent
        assert same(found, expected)
