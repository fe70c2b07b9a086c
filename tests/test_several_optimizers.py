"""Several optimizers over one model: one for each adapter, or one for each kind of parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from toy import ToyModel, same, weights

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import AllocationContext, Budget, DynamicAllocationOptimizer

LAYERS, STEPS = 4, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)).tanh())


class Net(nn.Module):
    """An embedding and blocks with two matrices and some vectors each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def of_peft() -> tuple[nn.Module, list[list[nn.Parameter]]]:
    """Two adapters in the same layers, also on the embedding, whose adapters share a module."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["table", "up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config, adapter_name="first")
    torch.manual_seed(1)
    model.add_adapter("second", config)
    named = list(model.named_parameters())
    # peft names a layer's adapters in ".first.weight", an embedding's in ".first".
    return model, [[p for n, p in named if a in n.split(".")] for a in ("first", "second")]


def of_ours() -> tuple[nn.Module, list[list[nn.Parameter]]]:
    """Adapters on two kinds of layers."""
    model = inject(Net(), LoRAConfig(rank=2, alpha=4, targets=["up", "down"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    named = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
    return model, [[p for n, p in named if f".{t}." in n] for t in ("up", "down")]


def of_blocks() -> tuple[nn.Module, list[list[nn.Parameter]]]:
    """The matrices of the blocks, and everything else."""
    model = Net()
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return model, [matrices, rest]


def named_like(part: str) -> Callable[[str, nn.Module], str | None]:
    return lambda name, module: name if name.endswith(part) else None


def muon(parameters: list[nn.Parameter]) -> Optimizer:
    if hasattr(torch.optim, "Muon"):
        return torch.optim.Muon(parameters, lr=0.02)
    package = pytest.importorskip("pytorch_optimizer")
    return package.Muon([{"params": parameters, "use_muon": True, "lr": 0.02}])


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.05)


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


BLOCKS = {"groups": "blocks"}
KINDS: dict[str, tuple[Any, list[Any], list[dict[str, Any]]]] = {
    "peft": (of_peft, [adamw, sgd], [{}, {}]),
    "ours": (of_ours, [adamw, sgd], [{"groups": named_like("up")}, {"groups": named_like("down")}]),
    "blocks": (of_blocks, [muon, adamw], [BLOCKS, BLOCKS]),
}
USES = [(k, u) for k in KINDS for u in ("in turns", "both") if (k, u) != ("blocks", "in turns")]


class Run:
    """A model, with an optimizer for each part of it."""

    def __init__(self, kind: str, options: dict[str, Any] | None, used: str = "in turns") -> None:
        make, rules, own = KINDS[kind]
        self.kind, self.used = kind, "both" if kind == "blocks" else used
        self.model, self.parts = make()
        self.optimizers: list[Any] = []
        for number, (part, rule, more) in enumerate(zip(self.parts, rules, own, strict=True)):
            self.use(number)
            optimizer = rule(part)
            if options is not None:
                options = copy.deepcopy(options)
                optimizer = DynamicAllocationOptimizer(optimizer, self.model, **options, **more)
            self.optimizers.append(optimizer)

    def use(self, number: int) -> None:
        """Let one adapter of peft compute, or both; the other does not train then."""
        if self.kind == "peft":
            both = ["first", "second"]
            self.model.base_model.set_adapter(both if self.used == "both" else both[number])

    def train(self, steps: int = STEPS, start: int = 0) -> None:
        for step in range(start, start + steps):
            self.use(step % 2)
            backward(self.model, step)
            for number, optimizer in enumerate(self.optimizers):
                if self.used == "both" or number == step % 2:
                    optimizer.step()
            self.model.zero_grad()


@pytest.mark.parametrize(("kind", "used"), USES)
def test_with_all_active_they_are_the_plain_optimizers(kind, used):
    plain, ours = Run(kind, None, used), Run(kind, {"active": 1.0}, used)
    for run in (plain, ours):
        run.train()
    assert same(weights(plain.model), weights(ours.model))
    assert not same(weights(ours.model), weights(Run(kind, None).model))


@pytest.mark.parametrize(("kind", "used"), USES)
def test_each_chooses_for_itself_and_moves_its_own_active_modules_only(kind, used):
    run = Run(kind, {"active": 2, "period": 1, "allocator": "random"}, used)
    names = {id(p): n for n, p in run.model.named_parameters()}
    choices = set()
    for step in range(STEPS):
        before = weights(run.model)
        expected = {
            names[id(p)]
            for number, optimizer in enumerate(run.optimizers)
            if used == "both" or number == step % 2
            for p in optimizer.active_parameters()
        }
        choices.add(tuple(tuple(o.active_groups) for o in run.optimizers))
        run.train(1, start=step)
        after = weights(run.model)
        assert {n for n in after if not torch.equal(before[n], after[n])} == expected
    assert len(choices) > 2


@pytest.mark.parametrize("allocator", ["discounted", "random", "topk"])
def test_muon_and_adamw_with_equal_options_train_the_same_blocks(allocator):
    run = Run("blocks", {"active": 2, "period": 1, "allocator": allocator})
    chosen = set()
    for step in range(STEPS):
        first, second = (optimizer.active_groups for optimizer in run.optimizers)
        assert first == second
        chosen.add(tuple(first))
        run.train(1, start=step)
    assert len(chosen) > 1 or allocator == "topk"


class SameBlocks:
    """Chooses what another optimizer has chosen; docs/optimizers.md has it too."""

    uses_active = False

    def __init__(self, leader: DynamicAllocationOptimizer) -> None:
        self.leader = leader

    def select(self, context: AllocationContext) -> list[int]:
        chosen = self.leader.active_groups
        return [i for i, name in enumerate(self.leader.groups) if name in chosen]


@pytest.mark.parametrize("importance", ["gradient", "sensitivity"])
def test_one_can_follow_the_other_whatever_it_measures_and_resumes(importance):
    def make() -> tuple[nn.Module, list[DynamicAllocationOptimizer]]:
        model, (matrices, rest) = of_blocks()
        first = DynamicAllocationOptimizer(
            muon(matrices), model, active=2, period=2, importance=importance, **BLOCKS
        )
        second = DynamicAllocationOptimizer(
            adamw(rest), model, period=2, allocator=SameBlocks(first), **BLOCKS
        )
        return model, [first, second]

    def train(model: nn.Module, optimizers: list[DynamicAllocationOptimizer], start: int) -> None:
        for step in range(start, start + 5):
            backward(model, step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert optimizers[0].active_groups == optimizers[1].active_groups

    (model, ours), (again, others) = make(), make()
    train(model, ours, 0)
    again.load_state_dict(model.state_dict())
    for new, old in zip(others, ours, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for one, optimizers in ((model, ours), (again, others)):
        train(one, optimizers, 5)
    assert same(weights(model), weights(again))
    assert len({entry.chosen for entry in ours[0].record}) > 1


def test_a_pass_of_one_adapter_is_no_score_of_the_other():
    run, alone = Run("peft", {"active": 1.0}), Run("peft", {"active": 1.0})
    run.train()
    for step in range(0, STEPS, 2):
        alone.train(1, start=step)
    first, second = (optimizer.tracker.scores() for optimizer in run.optimizers)
    assert first == alone.optimizers[0].tracker.scores()
    assert not any(alone.optimizers[1].tracker.scores().values())
    assert all(second.values())


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_saved_and_resumed_by_itself(kind):
    options = {"active": 2, "period": 2}
    straight, again = Run(kind, options), Run(kind, options)
    straight.train(6)
    again.model.load_state_dict(straight.model.state_dict())
    for old, new in zip(straight.optimizers, again.optimizers, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for run in (straight, again):
        run.train(6, start=6)
    assert same(weights(straight.model), weights(again.model))
    for old, new in zip(straight.optimizers, again.optimizers, strict=True):
        assert old.record.state_dict() == new.record.state_dict()
        assert len({entry.chosen for entry in old.record}) > 1


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_closing_one_leaves_the_other_as_it_is(kind):
    run, twin = Run(kind, {"active": 2, "period": 2}), Run(kind, {"active": 2, "period": 2})
    for one in (run, twin):
        one.train(4)
    run.optimizers[1].close()
    for one in (run, twin):
        for step in (4, 6):  # of the first one only
            one.train(1, start=step)
    assert same(weights(run.model), weights(twin.model))
    assert run.optimizers[0].active_groups == twin.optimizers[0].active_groups


def test_the_cell_that_builds_one_can_be_run_again(caplog):
    run = Run("peft", {"active": 2})
    run.use(1)
    new = DynamicAllocationOptimizer(AdamW(run.parts[1]), run.model, active=2)
    assert "takes over the 9 module groups" in caplog.text
    assert not run.optimizers[0]._driver.is_closed
    run.optimizers[1] = new
    run.train(2)


def test_one_optimizer_takes_in_a_second_adapter_of_its_layers():
    def run(options: dict[str, Any] | None) -> tuple[nn.Module, Any]:
        model, parts = of_peft()
        model.set_adapter("first")
        optimizer: Any = adamw(parts[0])
        if options is not None:
            optimizer = DynamicAllocationOptimizer(optimizer, model, **options)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": parts[1], "lr": 0.02})
                model.base_model.set_adapter(["first", "second"])
            backward(model, step)
            if options is not None:
                with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
                in_use = parts[0] + (parts[1] if step >= 2 else [])
                active = {id(p) for p in optimizer.active_parameters()}
                assert with_gradient == active & set(map(id, in_use))
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    assert same(weights(run(None)[0]), weights(run({"active": 1.0})[0]))
    _, optimizer = run({"active": 2, "period": 1, "allocator": "round_robin"})
    assert len(optimizer.groups) == 9


def test_an_adapter_that_is_not_in_use_is_refused_with_the_remedy():
    model, parts = of_peft()
    model.set_adapter("first")
    with pytest.raises(ValueError, match=r"model\.set_adapter"):
        DynamicAllocationOptimizer(AdamW(parts[1]), model)


def test_two_optimizers_cannot_share_the_flag_of_a_module():
    model = ToyModel()
    of = [[p for n, p in model.named_parameters() if n.endswith(end)] for end in (".A", ".B")]
    first = DynamicAllocationOptimizer(AdamW(of[0]), model, active=2)
    with pytest.raises(ValueError, match=r"trains other parameters of the same modules.*layers\.0"):
        DynamicAllocationOptimizer(SGD(of[1], lr=0.1), model, active=2)
    assert not first._driver.is_closed
    assert len(first.active_groups) == 2


@pytest.mark.parametrize("first", ["budget", "random"])
def test_a_budget_is_refused_where_another_optimizer_trains_in_the_same_blocks(first):
    model, (matrices, rest) = of_blocks()
    options = [{"allocator": Budget(memory=0.9)}, {"allocator": "random"}]
    if first == "random":
        options.reverse()
    one = DynamicAllocationOptimizer(adamw(matrices), model, groups="blocks", **options[0])
    with pytest.raises(ValueError, match=r"a Budget decides for whole blocks.*layers\.0"):
        DynamicAllocationOptimizer(adamw(rest), model, groups="blocks", **options[1])
    backward(model, 0)
    one.step()  # it drives its modules as before
    one.close()
    DynamicAllocationOptimizer(adamw(rest), model, groups="blocks", **options[1])


def test_a_budget_beside_an_optimizer_of_other_blocks():
    towers = nn.Sequential(Net(), nn.Linear(3, 3), nn.ModuleDict({"inner": Net()}))
    one, other = towers[0], towers[2]["inner"]
    first = DynamicAllocationOptimizer(adamw(list(one.parameters())), one, groups="blocks")
    DynamicAllocationOptimizer(
        adamw(list(other.parameters())), other, groups="blocks", allocator=Budget(memory=0.9)
    )
    assert not first._driver.is_closed


def test_muon_that_has_its_own_adamw_is_one_optimizer_for_both():
    package = pytest.importorskip("pytorch_optimizer")

    def run(options: dict[str, Any] | None) -> tuple[nn.Module, Any]:
        model, (matrices, rest) = of_blocks()
        groups = [
            {"params": matrices, "lr": 0.02, "use_muon": True},
            {"params": rest, "lr": 0.01, "use_muon": False},
        ]
        optimizer: Any = package.Muon(groups)
        if options is not None:
            optimizer = DynamicAllocationOptimizer(optimizer, model, groups="blocks", **options)
        for step in range(6):
            before = weights(model)
            idle = set() if options is None else {*optimizer.groups} - {*optimizer.active_groups}
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            after = weights(model)
            for name in after:
                is_idle = name.startswith(tuple(f"{group}." for group in idle))
                assert is_idle == torch.equal(before[name], after[name]), name
        return model, optimizer

    assert same(weights(run(None)[0]), weights(run({"active": 1.0})[0]))
    _, optimizer = run({"active": 2, "period": 1})
    assert len({entry.chosen for entry in optimizer.record}) > 1


def under_ddp(rank: int) -> list[tuple[dict[str, Tensor], list[Any]]]:
    """How the plain pair ends on this rank, how ours does, and ours with some blocks active."""
    ends = []
    for options in (None, {"active": 1.0}, {"active": 2, "period": 1}):
        run = Run("blocks", options)
        ddp = DistributedDataParallel(run.model)
        for step in range(STEPS):
            backward(ddp, 2 * step + rank)
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        records = [] if options is None else [o.record.state_dict() for o in run.optimizers]
        ends.append((weights(run.model), records))
    return ends


@pytest.mark.distributed
def test_under_ddp_both_are_the_plain_pair_and_choose_alike_on_all_ranks():
    if not hasattr(torch.optim, "Muon"):
        pytest.importorskip("pytorch_optimizer")
    first, second = on_ranks(under_ddp)
    for (here, records), (there, others) in zip(first, second, strict=True):
        assert same(here, there)
        assert records == others
    (plain, _), (ours, _), (_, (matrices, rest)) = first
    assert same(plain, ours)
    assert matrices == rest
    assert len({tuple(entry["chosen"]) for entry in matrices}) > 1
