"""Several adapters over one base: each is as if it were alone, and only the active one has effect.

The reference of every adapter is a model of its own, which holds no other.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CUDA
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_models import ROOMY, Encoder, Stack, TinyModel, build, randomize_trainable, same, snapshot
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.utils.checkpoint import checkpoint

from dynalora_adapters import (
    LoRAConfig,
    VeRAConfig,
    active_adapter,
    adapter_names,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    unmerge,
)
from dynalora_adapters._config import AdapterConfig
from dynalora_optim import Budget, DynamicAllocationOptimizer

CONFIGS: dict[str, Callable[[TinyModel], AdapterConfig]] = {
    "lora": lambda tiny: LoRAConfig(
        rank=3, alpha=6, targets=tiny.targets, trainable=tiny.trainable
    ),
    "wide": lambda tiny: LoRAConfig(rank=5, alpha=5, targets="all-linear", exclude=tiny.trainable),
    "vera": lambda tiny: VeRAConfig(
        rank=7, targets=tiny.targets[:1], d_initial=0.3, key=3, trainable=tiny.trainable
    ),
}


def adapted(tiny: TinyModel, *names: str, seed: int = 0) -> TinyModel:
    """Add adapters, each drawn and moved by numbers of its own: also alone it is the same."""
    for name in names:
        torch.manual_seed(sorted(CONFIGS).index(name) + seed)
        inject(tiny.model, CONFIGS[name](tiny), name=name)
        with set_adapter(tiny.model, name):
            randomize_trainable(tiny.model, sorted(CONFIGS).index(name) + seed)
    return tiny


def own(model: nn.Module) -> dict[str, Tensor]:
    """What the active adapter trains."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- Each adapter is as if it were alone.


@pytest.mark.parametrize("architecture", ["stack", "encoder", "bert", "gpt2"])
def test_each_computes_as_it_does_alone(architecture: str) -> None:
    several = adapted(build(architecture), *CONFIGS)
    several.model.eval()
    assert adapter_names(several.model) == list(CONFIGS)
    assert active_adapter(several.model) == "lora"  # the first one
    for name in ("vera", "lora", "wide", "vera"):
        alone = adapted(build(architecture), name)
        alone.model.eval()
        set_adapter(several.model, name)
        assert active_adapter(several.model) == name
        assert torch.equal(several.logits(), alone.logits())
        assert snapshot(several.model).keys() == snapshot(alone.model).keys()
        assert list(several.model.state_dict()) == list(alone.model.state_dict())
        assert equal(own(several.model), own(alone.model))


def steps(tiny: TinyModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    for _ in range(number):
        tiny.loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, **options: Any) -> DynamicAllocationOptimizer:
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return DynamicAllocationOptimizer(inner, model, active=1, period=2, **options)


@pytest.mark.parametrize("pair", [("lora", "vera"), ("vera", "wide"), ("wide", "lora")])
def test_two_that_train_in_turn_train_as_each_does_alone(pair: tuple[str, str]) -> None:
    several = adapted(build("bert"), *pair)
    optimizers, trained = {}, {}
    for name in pair:
        set_adapter(several.model, name)
        optimizers[name] = optimizer_of(several.model)
    for number in (1, 2, 3, 1):
        for name in pair:
            set_adapter(several.model, name)
            assert name not in trained or equal(own(several.model), trained[name])  # unmoved
            steps(several, optimizers[name], number)
            trained[name] = own(several.model)
    for name in pair:
        alone = adapted(build("bert"), name)
        optimizer = optimizer_of(alone.model)
        steps(alone, optimizer, 7)
        assert equal(own(alone.model), trained[name])
        assert list(optimizer.record) == list(optimizers[name].record)
        optimizers[name].close()


def test_two_may_share_a_step_and_resume_apart() -> None:
    several, optimizers = adapted(build("stack"), "lora", "vera"), {}
    for name in adapter_names(several.model):
        set_adapter(several.model, name)
        optimizers[name] = optimizer_of(several.model)
    for number in range(5):
        losses = []
        for name, optimizer in optimizers.items():
            set_adapter(several.model, name)
            if number == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizers[name] = optimizer_of(several.model)
                optimizers[name].load_state_dict(state)
            losses.append(several.loss())
        for loss in losses:
            loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    for name, optimizer in optimizers.items():
        alone = adapted(build("stack"), name)
        twin = optimizer_of(alone.model)
        steps(alone, twin, 5)
        set_adapter(several.model, name)
        assert equal(own(alone.model), own(several.model))
        assert list(twin.record) == list(optimizer.record)


def test_a_budget_is_refused_beside_the_optimizer_of_an_adapter_that_waits() -> None:
    several = adapted(build("bert"), "lora", "vera")
    inner = torch.optim.SGD(several.model.parameters(), lr=0.1)
    first = DynamicAllocationOptimizer(inner, several.model)
    set_adapter(several.model, "vera")
    inner = torch.optim.SGD([p for p in several.model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="a Budget decides for whole blocks"):
        DynamicAllocationOptimizer(inner, several.model, allocator=Budget(memory=0.9))
    first.close()
    DynamicAllocationOptimizer(inner, several.model, allocator=Budget(memory=0.9))


@pytest.mark.slow
def test_budgets_drive_one_after_the_other() -> None:
    def train(tiny: TinyModel) -> dict[str, Tensor]:
        inner = torch.optim.SGD(tiny.model.parameters(), lr=0.1)
        optimizer = DynamicAllocationOptimizer(
            inner, tiny.model, allocator=Budget(memory=0.7), period=1
        )
        steps(tiny, optimizer, 2)
        optimizer.close()
        return own(tiny.model)

    several = adapted(build("bert", sizes=ROOMY), "lora", "vera")
    for name in ("lora", "vera"):
        set_adapter(several.model, name)
        assert equal(train(several), train(adapted(build("bert", sizes=ROOMY), name)))


def test_without_an_adapter_the_model_is_its_base() -> None:
    several = adapted(build("bert"), "lora", "vera")
    with_lora, plain = several.logits(), build("bert").logits()
    with set_adapter(several.model, None):
        assert torch.equal(several.logits(), plain)
        assert active_adapter(several.model) is None
        assert not own(several.model)
    assert torch.equal(several.logits(), with_lora)
    with pytest.raises(KeyError), set_adapter(several.model, "vera"):
        raise KeyError
    assert active_adapter(several.model) == "lora"


def test_an_adapter_without_a_name_is_as_before_and_can_get_company() -> None:
    tiny = build("bert")
    inject(tiny.model, LoRAConfig(rank=2, alpha=2, targets=tiny.targets))
    randomize_trainable(tiny.model)
    alone = tiny.logits()
    adapted(tiny, "vera")
    assert adapter_names(tiny.model) == ["default", "vera"]
    assert torch.equal(tiny.logits(), alone)
    set_adapter(tiny.model, "vera")
    assert torch.equal(tiny.logits(), adapted(build("bert"), "vera").logits())


def test_one_is_removed_and_the_others_stay() -> None:
    several, plain = adapted(build("stack"), *CONFIGS), build("stack")
    before = several.logits()
    remove(several.model, name="wide")
    assert torch.equal(several.logits(), before)
    remove(several.model, name="lora")
    assert active_adapter(several.model) is None
    assert torch.equal(several.logits(), plain.logits())
    assert adapter_names(several.model) == ["vera"]
    set_adapter(several.model, "vera")
    assert torch.equal(several.logits(), adapted(build("stack"), "vera").logits())
    remove(several.model, name="vera")
    assert torch.equal(several.logits(), plain.logits())
    assert all(p.requires_grad for p in several.model.parameters())
    adapted(several, "lora")
    assert torch.equal(several.logits(), before)


@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_merged_and_removed_keeps_the_trained_head(at_once: bool) -> None:
    several = adapted(build("stack"), "vera", "lora")
    set_adapter(several.model, "lora")
    expected = several.logits()
    remove(several.model, name="vera")
    if at_once:
        merge(several.model, name="lora", remove=True)
    else:
        remove(merge(several.model))
    assert list(several.model.state_dict()) == list(build("stack").model.state_dict())
    assert not adapter_names(several.model)
    torch.testing.assert_close(several.logits(), expected)


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)))


def test_copies_of_tied_modules_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    config = LoRAConfig(rank=2, alpha=2, targets=["inner"], trainable=["embed", "head"])
    for name in ("a", "b"):
        inject(model, config, name=name)
    first = model.embed.weight
    assert model.head.weight is first
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    set_adapter(model, "b")
    assert model.head.weight is model.embed.weight is not first
    load_adapter(model, tmp_path)
    assert torch.equal(model.head.weight, first)
    remove(model)
    assert model.head.weight is model.embed.weight
    assert not torch.equal(model.head.weight, first)


def test_those_that_wait_follow_the_mode_of_the_model() -> None:
    tiny = build("bert")
    for name in ("a", "b"):
        config = LoRAConfig(
            rank=2, alpha=2, dropout=0.5, targets=tiny.targets, trainable=tiny.trainable
        )
        inject(tiny.model, config, name=name)
    tiny.model.eval()
    for name in ("b", None, "a"):
        set_adapter(tiny.model, name)
        assert not any(module.training for module in tiny.model.modules())
    set_adapter(tiny.model, None)
    tiny.model.train()
    set_adapter(tiny.model, "b")
    assert all(module.training for module in tiny.model.modules())


@pytest.mark.parametrize("device", [CUDA])
def test_those_that_wait_follow_the_model_to_its_device(device: str) -> None:
    tiny = adapted(build("bert"), "lora", "vera")
    tiny.model.to(device)
    batch = {key: value.to(device) for key, value in tiny.batch.items()}
    for name in ("vera", "lora"):
        set_adapter(tiny.model, name)
        assert {p.device.type for p in tiny.model.parameters()} == {device}
        tiny.model(**batch).loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_all_adapters_and_shares_nothing(copied: Callable[[Any], Any]) -> None:
    several = adapted(build("stack"), "lora", "vera")
    set_adapter(several.model, "vera")
    twin = TinyModel("stack", copied(several.model), several.batch, [], [])
    for name in ("vera", "lora", None):
        set_adapter(twin.model, name)
        set_adapter(several.model, name)
        assert torch.equal(twin.logits(), several.logits())
        mine = {id(p) for p in several.model.parameters()}
        assert mine.isdisjoint(id(p) for p in twin.model.parameters())
    set_adapter(twin.model, "lora")
    steps(twin, torch.optim.SGD(twin.model.parameters(), lr=0.1), 1)


def test_a_transformer_layer_takes_no_fast_path_past_any_of_them() -> None:
    several = adapted(build("encoder"), "vera", "wide")
    several.model.eval()
    trained = several.logits()
    set_adapter(several.model, "wide")
    assert not torch.equal(several.logits(), trained)
    assert all(m._forward_pre_hooks for m in several.model.modules() if hasattr(m, "lora_A"))
    remove(several.model)
    assert several.model.encoder.use_nested_tensor is Encoder().encoder.use_nested_tensor


def test_compiled_code_sees_the_active_one() -> None:
    several = adapted(build("stack"), "lora", "vera")
    compiled = torch.compile(several.model, backend="eager")
    for name in ("lora", "vera", None, "lora"):
        set_adapter(compiled, name)
        with torch.no_grad():
            logits = compiled(**several.batch).logits
        torch.testing.assert_close(logits, several.logits())


# --- Files.


def test_each_is_saved_apart_and_loaded_beside_others_and_alone(tmp_path: Path) -> None:
    several = adapted(build("bert"), *CONFIGS)
    set_adapter(several.model, "vera")
    for name in CONFIGS:
        save_adapter(several.model, tmp_path / name, name=name)
    save_adapter(several.model, tmp_path / "active")
    assert active_adapter(several.model) == "vera"
    again, beside = build("bert"), adapted(build("bert"), "wide", seed=9)
    load_adapter(again.model, tmp_path / "active")
    load_adapter(beside.model, tmp_path / "wide", name="wide")  # into the one that there is
    for name in CONFIGS:
        load_adapter(beside.model, tmp_path / name, name=name)
        assert active_adapter(beside.model) == "wide"
    for name in CONFIGS:
        alone = load_adapter(build("bert").model, tmp_path / name)
        set_adapter(several.model, name)
        set_adapter(beside.model, name)
        expected = several.logits()
        with torch.no_grad():
            assert torch.equal(alone(**several.batch).logits, expected)
        assert torch.equal(beside.logits(), expected)
    set_adapter(several.model, "vera")
    assert torch.equal(again.logits(), several.logits())


def test_peft_reads_each_file_and_ours_read_each_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    several = adapted(build("bert"), *CONFIGS)
    for name in CONFIGS:
        save_adapter(several.model, tmp_path / name, name=name)
        theirs = peft.PeftModel.from_pretrained(build("bert").model, tmp_path / name).train()
        set_adapter(several.model, name)
        with torch.no_grad():
            logits = theirs(**several.batch).logits
        torch.testing.assert_close(logits, several.logits(), atol=1e-6, rtol=0)
    both = peft.PeftModel.from_pretrained(
        build("bert").model, tmp_path / "lora", adapter_name="first"
    )
    both.add_adapter("second", peft.LoraConfig(r=5, target_modules=["key"], task_type="SEQ_CLS"))
    both.train()
    both.set_adapter("second")
    randomize_trainable(both)
    both.save_pretrained(tmp_path)
    ours = build("bert")
    for name in ("first", "second"):
        load_adapter(ours.model, tmp_path / name, name=name)
    for name in ("first", "second"):
        both.set_adapter(name)
        set_adapter(ours.model, name)
        with torch.no_grad():
            logits = both(**ours.batch).logits
        torch.testing.assert_close(logits, ours.logits(), atol=1e-6, rtol=0)


# --- What would be wrong is refused before anything changes.


def merged() -> nn.Module:
    several = adapted(build("stack"), "lora", "vera")
    return merge(several.model)


def trained_in_place() -> nn.Module:
    tiny = build("stack")
    return inject(tiny.model, CONFIGS["lora"](tiny))


def two() -> nn.Module:
    return adapted(build("stack"), "lora", "vera").model


def renewed() -> nn.Module:
    several = adapted(build("stack"), "wide", "vera")
    several.model.blocks[0][0] = nn.Linear(32, 64)
    return several.model


def with_biases() -> nn.Module:
    config = LoRAConfig(rank=2, alpha=2, targets=["0"], bias="adapted")
    return inject(Stack(), config, name="a")


def add(model: nn.Module, name: str | None = "new", **options: Any) -> object:
    return inject(model, LoRAConfig(rank=2, alpha=2, targets=["0"], **options), name=name)


BAD: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "no name": (two, lambda m: add(m, None), r"adapted already \(by 'lora', 'vera'\); call remove"),
    "taken": (two, lambda m: add(m, "vera"), "adapted already .*another name="),
    "unknown": (two, lambda m: set_adapter(m, "x"), "'x' is no adapter .*'lora', 'vera'"),
    "save": (two, lambda m: save_adapter(m, "/nowhere", name="x"), "'x' is no adapter"),
    "remove": (two, lambda m: remove(m, name="x"), "'x' is no adapter"),
    "merge": (two, lambda m: merge(m, name="x"), "'x' is no adapter"),
    "others": (two, lambda m: merge(m, remove=True), "lora, vera; call remove"),
    "merged": (merged, lambda m: set_adapter(m, "vera"), "delta of the adapter 'lora'.*unmerge"),
    "merged base": (merged, lambda m: set_adapter(m, None), "call unmerge"),
    "merged, new": (merged, add, "call unmerge"),
    "merged, gone": (merged, lambda m: remove(m, name="lora"), "call unmerge"),
    "in place": (trained_in_place, add, "'default' trains modules of the base .*give the first"),
    "biases": (two, lambda m: add(m, bias="all"), "bias='all' trains biases of the base"),
    "beside biases": (with_biases, add, "'a' trains modules .*or biases"),
    "wrapped": (two, lambda m: set_adapter(DataParallel(m), "vera"), "wrapped in DataParallel"),
    "replaced": (renewed, lambda m: set_adapter(m, "vera"), "adapts 1 modules that .* no longer"),
    "plain": (Stack, lambda m: set_adapter(m, "a"), "not itself passed to inject"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_before_anything_changes(case: str) -> None:
    make, call, message = BAD[case]
    model = make()
    before, active = snapshot(model), active_adapter(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert active_adapter(model) == active
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", ["", 3, ["a"]])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match=r"name must be a string that is not empty, got"):
        add(Stack(), name)


def test_while_none_is_active_there_is_none_to_merge_or_save(tmp_path: Path) -> None:
    model = two()
    set_adapter(model, None)
    for call in (merge, unmerge, lambda m: save_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match="no adapter of the model is active; name one of"):
            call(model)
    save_adapter(model, tmp_path, name="vera")
    assert active_adapter(model) is None


def test_a_merge_that_fails_leaves_the_former_one_active() -> None:
    model = two()
    with set_adapter(model, "vera"), torch.no_grad():
        model.blocks[0][0].vera_lambda_b.fill_(torch.inf)
    with pytest.raises(ValueError, match="inf or nan"):
        merge(model, name="vera")
    assert active_adapter(model) == "lora"


def test_a_file_that_replaces_embeddings_is_loaded_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    tiny = build("bert")
    tiny.model.resize_token_embeddings(70)
    theirs = get_peft_model(tiny.model, LoraConfig(r=2, target_modules=tiny.targets))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    other = build("bert", seed=1)
    other.model.resize_token_embeddings(70)
    inject(other.model, LoRAConfig(rank=2, alpha=2, targets=tiny.targets), name="first")
    before = snapshot(other.model)
    with pytest.raises(ValueError, match=r"replaces .*word_embeddings.* of the base.*first"):
        load_adapter(other.model, tmp_path, name="second")
    assert same(before, snapshot(other.model))
    remove(other.model)
    load_adapter(other.model, tmp_path, name="second")
    with pytest.raises(ValueError, match=r"'second' trains modules of the base .*file has"):
        add(other.model)


# --- Checkpoints.


class Checkpointed(Stack):
    """Recomputes each block."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x).square().sum()


def recomputing(*, reentrant: bool) -> Checkpointed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Checkpointed(reentrant=reentrant)
    adapted(TinyModel("stack", model, {}, ["0", "2"], ["head"]), "lora", "vera", "wide")
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("other", ["vera", "wide", None])
def test_a_forward_is_not_recomputed_with_another(other: str | None, reentrant: bool) -> None:
    model = recomputing(reentrant=reentrant)
    x = torch.ones(2, 32)
    loss = model(x)
    set_adapter(model, other)
    with pytest.raises(RuntimeError, match=r"recomputes .* adapter 'lora' was active, but now"):
        loss.backward()
    if other is not None:
        model(x).backward()  # its own forward


@pytest.mark.parametrize("reentrant", [False, True])
def test_another_adapter_may_be_used_between_a_forward_and_its_backward(
    tmp_path: Path, reentrant: bool
) -> None:
    x, found = torch.ones(2, 32), []
    for between in (False, True):
        model = recomputing(reentrant=reentrant)
        loss = model(x)
        if between:
            for name in ("vera", None, "vera"):
                with set_adapter(model, name):
                    model(x)
            save_adapter(model, tmp_path, name="wide")
            load_adapter(model, tmp_path, name="wide")
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert equal(*found)


# --- Any sequence of operations.


class Adapters(RuleBasedStateMachine):
    """A model of several adapters; of each, a model that holds it alone."""

    @initialize()
    def begin(self) -> None:
        self.tiny = build("stack")
        self.tiny.model.double()
        self.tiny.batch["x"] = self.tiny.batch["x"].double()
        self.plain = self.twin()
        self.twins: dict[str, TinyModel] = {}
        self.active: str | None = None
        self.merged = False
        self.draws = itertools.count()

    def twin(self) -> TinyModel:
        twin = build("stack")
        twin.model.double()
        twin.batch = self.tiny.batch
        return twin

    def free(self) -> bool:
        return not self.merged

    @precondition(free)
    @rule(name=st.sampled_from("abc"), kind=st.sampled_from(sorted(CONFIGS)))
    def add(self, name: str, kind: str) -> None:
        if name in self.twins:
            return
        seed, twin = next(self.draws), self.twin()
        for one in (twin, self.tiny):
            torch.manual_seed(seed)
            inject(one.model, CONFIGS[kind](one), name=name)
        self.active = self.active if self.twins else name
        self.twins[name] = twin

    @precondition(free)
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        if self.twins:
            self.active = data.draw(st.sampled_from([None, *self.twins]))
            set_adapter(self.tiny.model, self.active)

    @precondition(free)
    @rule()
    def train(self) -> None:
        if self.active is None:
            return
        seed = next(self.draws)
        for model in (self.tiny.model, self.twins[self.active].model):
            randomize_trainable(model, seed)

    @rule(mode=st.booleans())
    def change_mode(self, mode: bool) -> None:
        self.tiny.model.train(mode)

    @rule()
    def deep_copy(self) -> None:
        self.tiny.model = copy.deepcopy(self.tiny.model)

    @rule(data=st.data(), again=st.booleans())
    def save_and_load(self, data: st.DataObject, again: bool) -> None:
        """Save any adapter, and load it over another one of its kind, or as a new one."""
        if not self.twins:
            return
        name = data.draw(st.sampled_from(sorted(self.twins)))
        if again and not (self.merged and name == self.active):
            save_adapter(self.tiny.model, self.folder / name, name=name)
            load_adapter(self.tiny.model, self.folder / name, name=name)
        elif not again and "d" not in self.twins and not self.merged:
            save_adapter(self.tiny.model, self.folder / name, name=name)
            load_adapter(self.tiny.model, self.folder / name, name="d")
            self.twins["d"] = twin = self.twin()
            load_adapter(twin.model, self.folder / name)

    @precondition(free)
    @rule(data=st.data())
    def take_out(self, data: st.DataObject) -> None:
        if self.twins:
            name = data.draw(st.sampled_from(sorted(self.twins)))
            remove(self.tiny.model, name=name)
            del self.twins[name]
            self.active = None if name == self.active else self.active

    @precondition(free)
    @rule()
    def take_all_out(self) -> None:
        if self.twins:
            remove(self.tiny.model)
            self.twins, self.active = {}, None

    @rule()
    def merge_or_unmerge(self) -> None:
        if self.active is not None:
            (unmerge if self.merged else merge)(self.tiny.model)
            self.merged = not self.merged

    @invariant()
    def as_the_twin(self) -> None:
        model = self.tiny.model
        assert adapter_names(model) == list(self.twins)
        assert active_adapter(model) == self.active
        reference = self.plain if self.active is None else self.twins[self.active]
        torch.testing.assert_close(self.tiny.logits(), reference.logits())
        if self.twins:
            assert own(model).keys() == (own(reference.model).keys() if self.active else set())
        else:
            assert all(p.requires_grad for p in model.parameters())
            assert not self.active

    @property
    def folder(self) -> Path:
        return type(self).root

    root: Path


@pytest.fixture
def machine(tmp_path: Path) -> type[Adapters]:
    Adapters.root = tmp_path
    return Adapters


@pytest.mark.parametrize(
    ("runs", "moves"), [(6, 12), pytest.param(200, 30, marks=pytest.mark.slow)]
)
def test_any_sequence_of_operations(machine: type[Adapters], runs: int, moves: int) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=runs, stateful_step_count=moves, deadline=None)
    )
