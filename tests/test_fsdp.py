"""FSDP2 (``fully_shard``): two real processes against one that sees both batches."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import CLIPPED_SHARDS, returned_on_ranks
from test_ddp import options as options_of
from test_ddp import rows
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import ToyAdapter, ToyModel, batch, same, wrapped

from dynalora_optim import DynamicAllocationOptimizer
from dynalora_optim.update._master_weights import MASTER

pytestmark = pytest.mark.distributed
STEPS = 8
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
BF16_REDUCED_IN_32 = {
    "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
}


class Unflagged(ToyAdapter):
    """Has no ``active`` flag, so that hooks must detach its parameters."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        del self.active

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def build(kind: str = "flagged", **options: Any) -> ToyModel:
    model = ToyModel(**options)
    if kind == "unflagged":
        for layer in model.layers:
            adapter = Unflagged(layer[0].base.in_features)
            adapter.load_state_dict(layer[0].state_dict())
            layer[0] = adapter
    return model


def shard(model: ToyModel, units: str, **options: Any) -> None:
    """Shard the whole model, and before that its blocks or its adapters one by one."""
    parts: dict[str, list[nn.Module]] = {
        "whole": [],
        "blocks": list(model.layers),
        "adapters": [layer[0] for layer in model.layers],
    }
    for part in parts[units]:
        fully_shard(part, **options)
    fully_shard(model, **options)


def full(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, put together from all ranks."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def with_gradient(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is not None]


def train(
    model: ToyModel,
    optimizer: DynamicAllocationOptimizer,
    rank: int | None,
    *,
    start: int = 0,
    stop: int = STEPS,
    accumulate: int = 1,
) -> list[list[str]]:
    """A loop with accumulation and clipping; returns who had a gradient at each step."""
    seen = []
    for step in range(start, stop):
        for micro in range(accumulate):
            if rank is not None:
                model.set_requires_gradient_sync(micro == accumulate - 1)
            loss = model(rows(step * accumulate + micro, rank)).square().mean()
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        seen.append(with_gradient(model))
        optimizer.step()
        optimizer.zero_grad()
    return seen


# name -> kind of adapter, FSDP units, optimizer options, micro-batches a step
CASES: dict[str, tuple[str, str, str, int]] = {
    **{
        f"options-{options}": ("flagged", "blocks", options, 1)
        for options in ("random", "scored", "gradient", "smoothed", "probe", "local")
    },
    "foreach": ("flagged", "blocks", "foreach", 1),
    "whole model": ("flagged", "whole", "scored", 1),
    "hooks": ("unflagged", "blocks", "random", 1),
    "hooks of an adapter sharded by itself": ("unflagged", "adapters", "random", 1),
    "accumulation": ("flagged", "blocks", "scored", 2),
    "accumulation, whole model": ("unflagged", "whole", "gradient", 3),
}
MIXED = {"bfloat16": BF16, "bfloat16, reduced in float32": BF16_REDUCED_IN_32}


def make(model: ToyModel, options: str) -> DynamicAllocationOptimizer:
    if options == "foreach":
        inner = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=True)
        return DynamicAllocationOptimizer(inner, model, active=2, period=1)
    return wrapped(model, lr=0.02, **options_of(options))


def run(case: str, rank: int | None = None):
    """Train one case as this rank, or (None) as the single process that sees both batches."""
    kind, units, options, accumulate = CASES[case]
    model = build(kind).double()
    if rank is not None:
        shard(model, units)
    optimizer = make(model, options)
    seen = train(model, optimizer, rank, accumulate=accumulate)
    return full(model), [e.chosen for e in optimizer.record], seen, optimizer.tracker.scores()


def run_mixed(policy: str, rank: int, chosen: list[tuple[str, ...]] | None = None):
    """Train in mixed precision; given ``chosen``, a plain optimizer that skips all others."""
    model = build()
    shard(model, "blocks", **MIXED[policy])
    plain = torch.optim.AdamW(model.parameters(), lr=0.02)
    options: dict[str, Any] = {"active": 2, "period": 1, "allocator": "random"}
    optimizer = DynamicAllocationOptimizer(plain, model, **options) if chosen is None else plain
    losses = []
    for step in range(STEPS):
        loss = model(rows(step, rank).float()).float().square().mean()
        loss.backward()
        if chosen is None:
            active = optimizer.active_groups
            assert {n.rsplit(".", 1)[0] for n in with_gradient(model)} == {*active, "head"}
        else:
            for name, parameter in model.named_parameters():
                if name.rsplit(".", 1)[0] not in (*chosen[step], "head"):
                    parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    choices = [e.chosen for e in optimizer.record] if chosen is None else chosen
    return full(model), losses, choices


def both_mixed(policy: str, rank: int):
    ours = run_mixed(policy, rank)
    return ours, run_mixed(policy, rank, ours[2])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_both_batches(case, ranks):
    (found, chosen, seen, scores), others = ranks[0][case], ranks[1][case]
    expected, choices, expected_seen, _ = run(case)
    assert same(found, others[0]), "the ranks part"
    assert (chosen, seen, scores) == others[1:], "and all that decides is the same on all"
    assert chosen == choices
    assert len(set(choices)) > 1, "the set must change for this to say anything"
    assert seen == expected_seen, "who has a gradient"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=CLIPPED_SHARDS, rtol=0)


@pytest.mark.parametrize("policy", MIXED)
def test_mixed_precision_is_the_plain_optimizer_without_the_inactive_gradients(policy, ranks):
    choices = [rank[policy][0][2] for rank in ranks]
    assert choices[0] == choices[1]
    assert len(set(choices[0])) > 1
    for rank in ranks:
        (found, losses, _), (expected, expected_losses, _) = rank[policy]
        assert losses == expected_losses
        assert same(found, expected)


class Rounded(nn.Module):
    """Computes with bfloat16 copies of its weights, as FSDP2 does in mixed precision."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        copies = {name: p.bfloat16() for name, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, copies, x.bfloat16())


def reduced_in_bfloat16(state, bucket):  # torch's own hook of this kind needs NCCL
    """A communication hook of DDP."""
    rounded = bucket.buffer().bfloat16() / dist.get_world_size()
    dist.all_reduce(rounded)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer().copy_(rounded))
    return done


def losses(policy: str, rank: int, *, sharded: bool) -> list[float]:
    """The losses of this rank, in FSDP2 or in DDP without flags."""
    model: nn.Module = build()
    optimizer = None
    if sharded:
        shard(model, "blocks", **MIXED.get(policy, {}))
    else:
        optimizer = make(model, "random")
        model = DistributedDataParallel(Rounded(model) if policy in MIXED else model)
        if policy == "bfloat16":
            model.register_comm_hook(None, reduced_in_bfloat16)
    optimizer = optimizer or make(model, "random")
    found = []
    for step in range(STEPS):
        loss = model(rows(step, rank).float()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def losses_of_both(policy: str, rank: int) -> tuple[list[float], list[float]]:
    return losses(policy, rank, sharded=True), losses(policy, rank, sharded=False)


@pytest.mark.parametrize("policy", ["float32", *MIXED])
def test_the_losses_are_those_of_ddp(policy, ranks):
    # On torch 2.8 the last bits of float32 differ, and so at times the nearest bfloat16.
    rounding = 1e-6 if policy == "float32" or torch.__version__ >= (2, 11) else 1e-4
    curves = [rank[f"losses, {policy}"] for rank in ranks]
    for sharded, ddp in curves:
        assert sharded == pytest.approx(ddp, abs=rounding)
        assert len(set(ddp)) == STEPS
    assert curves[0] != curves[1], "the ranks have batches of their own"


def rounded(rank: int, rounding: str) -> tuple[dict[str, Tensor], set[str]]:
    """The bfloat16 weights after the first pause, and whose parameters have float32 copies then."""
    model = build().bfloat16()
    shard(model, "blocks")
    optimizer = wrapped(
        model, lr=1e-3, active=2, period=2, allocator="round_robin", master_weights=rounding
    )
    first = set(optimizer.active_groups)
    for step in range(3):
        model(rows(step, rank).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            found = full(model)
    after = full(model)
    paused = [name for name in found if name.rsplit(".", 1)[0] in first]
    assert all(torch.equal(found[name], after[name]) for name in paused), "idle is unmoved"
    held = {n for n, p in model.named_parameters() if MASTER in optimizer.state.get(p, {})}
    assert held
    assert held.isdisjoint(paused)
    return {name: found[name] for name in paused}, held


def test_copies_of_shards_are_rounded_at_random_when_their_module_pauses(ranks):
    for rank in ranks:
        (nearest, held), (stochastic, others) = rank["nearest"], rank["stochastic"]
        assert held == others
        for name, weight in nearest.items():
            apart = (weight.float() - stochastic[name].float()).abs()
            assert (apart <= weight.float().abs() / 64).all(), "one of the two next to the copy"
        assert not same(nearest, stochastic)
    assert same(ranks[0]["stochastic"][0], ranks[1]["stochastic"][0])


# What is sent


def count_reduced(rank: int, active: float):
    """Return the elements that FSDP2 reduced over 4 steps."""
    model = ToyModel(features=64)
    model.head.requires_grad_(False)
    shard(model, "blocks")
    optimizer = wrapped(model, active=active, period=1, allocator="round_robin")
    sent: list[int] = []
    with counted_collectives(sent):
        for step in range(4):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return sent


@contextlib.contextmanager
def counted_collectives(sent: list[int]):
    """Note the elements of each reduce-scatter, whichever of torch's functions starts it."""
    names = [n for n in ("reduce_scatter_tensor", "reduce_scatter_single") if hasattr(dist, n)]
    originals = {name: getattr(dist, name) for name in names}

    def noting(name: str):
        def call(output: Tensor, input: Tensor, *args: Any, **kwargs: Any):  # noqa: A002
            sent.append(input.numel())
            with contextlib.ExitStack() as stack:
                for other in names:  # one may call the other
                    stack.callback(setattr, dist, other, getattr(dist, other))
                    setattr(dist, other, originals[other])
                return originals[name](output, input, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, noting(name))
    try:
        yield
    finally:
        for name in names:
            setattr(dist, name, originals[name])


@pytest.mark.parametrize("active", [1, 2, 6])
def test_only_active_gradients_are_reduced(active, ranks):
    one = 2 * 2 * 64  # A and B of one adapter
    for rank in ranks:
        sent = rank[f"reduced, {active} active"]
        assert sent == [one] * active * 4, "a collective for each active block, and no more"


# Checkpoints

STATES = {
    "sharded": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "full, from rank 0": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}
STOP = 4


def fresh(rank: int | None, seed: int = 0):
    model = build(seed=seed).double()
    if rank is not None:
        shard(model, "blocks")
    return model, wrapped(model, lr=0.02, active=2, period=3)


def outcome(model, optimizer):
    recent = [(e.step, e.chosen) for e in optimizer.record if e.step > STOP]
    return full(model), recent, optimizer.tracker.scores()


def resume_in_memory(rank: int, kind: str):
    """Return how a run ends that goes on, and how one that took over its state in step 4."""
    options = STATES[kind]
    model, optimizer = fresh(rank)
    train(model, optimizer, rank, stop=STOP)
    model_state = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if options.full_state_dict:  # what a file holds, and rank 0 alone if it broadcasts
        file = io.BytesIO()
        torch.save((model_state, state), file)
        file.seek(0)
        model_state, state = torch.load(file, weights_only=True)
        if options.broadcast_from_rank0 and rank:
            model_state, state = {}, {}
    else:  # they are the run's own tensors
        model_state, state = copy.deepcopy((model_state, state))
    other, resumed = fresh(rank, seed=3)
    set_model_state_dict(other, model_state, options=options)
    set_optimizer_state_dict(other, resumed, state, options=options)
    for one, of in ((model, optimizer), (other, resumed)):
        train(one, of, rank, start=STOP)
    return outcome(model, optimizer), outcome(other, resumed)


def assert_same_outcome(found, expected, *, exact: bool = True) -> None:
    assert found[1] == expected[1]
    if exact:
        assert found[2] == expected[2]
    for name, value in expected[0].items():
        torch.testing.assert_close(
            found[0][name], value, atol=0 if exact else CLIPPED_SHARDS, rtol=0
        )


@pytest.mark.parametrize("kind", STATES)
def test_a_run_resumes_bit_for_bit(kind, ranks):
    for rank in ranks:
        straight, taken_over = rank[f"resumed, {kind}"]
        assert len(straight[1]) == 1, "a reallocation after the checkpoint"
        assert_same_outcome(taken_over, straight)


def through_a_folder(rank: int | None, folder: str, *, is_saving: bool):
    """Save in step 4 and go on; or go on from there."""
    model, optimizer = fresh(rank, seed=0 if is_saving else 3)
    if is_saving:
        train(model, optimizer, rank, stop=STOP)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    if is_saving:
        dcp.save(state, checkpoint_id=folder)
    else:
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, rank, start=STOP)
    return outcome(model, optimizer)


def save_and_load(rank: int, two: str, one: str):
    straight = through_a_folder(rank, two, is_saving=True)
    return straight, *(through_a_folder(rank, name, is_saving=False) for name in (two, one))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_goes_on_with_another_number_of_ranks(folders, ranks):
    two, _, alone = folders
    for straight, from_two, from_one in (rank["folders"] for rank in ranks):
        assert_same_outcome(from_two, straight)
        assert_same_outcome(from_one, alone, exact=False)
    assert_same_outcome(through_a_folder(None, two, is_saving=False), alone, exact=False)


# What is refused


def refusals(rank: int):
    model = build()
    optimizer = wrapped(model, active=2)
    shard(model, "blocks")
    model(batch()).sum().backward()
    with pytest.raises(RuntimeError, match=r"no longer holds the parameters of layers\.0") as late:
        optimizer.step()
    return str(late.value)


def test_what_cannot_work_is_refused_with_the_remedy(ranks):
    for rank in ranks:
        assert "call it before the optimizer is built" in rank["refused"]


# Starting processes takes longer than all that they do here: they are started once.


def everything(rank: int, two: str, one: str) -> dict[str, Any]:
    return {
        **{case: run(case, rank) for case in CASES},
        **{policy: both_mixed(policy, rank) for policy in MIXED},
        **{f"losses, {policy}": losses_of_both(policy, rank) for policy in ("float32", *MIXED)},
        **{rounding: rounded(rank, rounding) for rounding in ("nearest", "stochastic")},
        **{f"reduced, {active} active": count_reduced(rank, active) for active in (1, 2, 6)},
        **{f"resumed, {kind}": resume_in_memory(rank, kind) for kind in STATES},
        "folders": save_and_load(rank, two, one),
        "refused": refusals(rank),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders; the second has been written by a single process, which went on like this."""
    two, one = (str(tmp_path_factory.mktemp(name)) for name in ("two", "one"))
    return two, one, through_a_folder(None, one, is_saving=True)


@pytest.fixture(scope="module")
def ranks(folders):
    return returned_on_ranks(everything, *folders[:2])
