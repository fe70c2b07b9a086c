"""torch.compile: one graph for every active set, and the training of eager mode.

``aot_eager`` runs what torch.compile has traced and differentiated, without generating code: what
it counts and computes holds for every backend. ``fullgraph=True`` makes each graph break an error.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import Sizes, TinyModel, build, randomize_trainable
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from toy import ToyModel, batch

from dynalora_adapters import LoRAConfig, LoRALinear, VeRAConfig, VeRALinear, inject, save_adapter
from dynalora_optim import (
    Budget,
    DynamicAllocationOptimizer,
    ForwardNorm,
    GradientNorm,
    ImportanceTracker,
)
from dynalora_optim.allocation._context import uses_active
from dynalora_optim.groups._blocks import find_blocks

STEPS = 52  # of which 2 warm up: 50 reallocations follow


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def adapted(name: str, kind: str, blocks: int = 2) -> TinyModel:
    """A tiny model whose adapters are no longer zero."""
    torch.manual_seed(0)
    tiny = build(name, sizes=Sizes(blocks=blocks, width=16))
    if hasattr(tiny.model, "config"):  # else transformers sets it in the first forward
        tiny.model.config.problem_type = "single_label_classification"
    if kind == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=tiny.targets, modules_to_save=tiny.trainable)
        tiny.model = peft.get_peft_model(tiny.model, config)
    elif kind == "vera":
        inject(tiny.model, VeRAConfig(rank=4, targets=tiny.targets, trainable=tiny.trainable))
    else:
        options = {"targets": tiny.targets, "trainable": tiny.trainable}
        inject(tiny.model, LoRAConfig(rank=2, alpha=4, **options))
    randomize_trainable(tiny.model)
    tiny.model.train()
    return tiny


def wrapped(model: nn.Module, **options: Any) -> DynamicAllocationOptimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.01)
    options = {"period": 1, "allocator": "random", **options}
    if uses_active(options["allocator"]):
        options.setdefault("active", 2)
    return DynamicAllocationOptimizer(rule, model, **options)


@dataclass
class Run:
    """What is left of a training run, and the graphs compiled up to each step."""

    losses: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    chosen: list[tuple[str, ...]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)


def unpadded(name: str, kind: str) -> TinyModel:
    """Compiled as a whole, a model does not show the mask of a batch: see docs/compile.md."""
    tiny = adapted(name, kind)
    tiny.batch["attention_mask"].fill_(1)
    return tiny


def train(
    tiny: TinyModel,
    how: str = "eager",
    *,
    steps: int = STEPS,
    wrap_first: bool = False,
    backend: str = "aot_eager",
    each_step: Callable[[DynamicAllocationOptimizer], None] = lambda optimizer: None,
    **options: Any,
) -> Run:
    """Train ``tiny`` as it is, compiled as a ``"whole"``, or compiled by ``"blocks"``."""
    counter = CompileCounterWithBackend(backend)
    model = tiny.model
    optimizer = wrapped(model, **options) if wrap_first else None
    if how == "whole":
        model = torch.compile(model, backend=counter, fullgraph=True)
    elif how == "blocks":
        for block in find_blocks(model):
            block.module.compile(backend=counter, fullgraph=True)
    optimizer = optimizer or wrapped(model, **options)
    run = Run()
    for _ in range(steps):
        loss = model(**tiny.batch).loss
        loss.backward()
        each_step(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        run.chosen.append(tuple(optimizer.active_groups))
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.frames.append(counter.frame_count)
    run.scores = optimizer.tracker.scores()
    run.weights = [p.detach().clone() for p in model.parameters()]
    return run


def assert_same(compiled: Run, eager: Run, tolerance: float = 1e-6) -> None:
    assert compiled.chosen == eager.chosen
    assert compiled.losses == pytest.approx(eager.losses, abs=tolerance)
    torch.testing.assert_close(compiled.weights, eager.weights, atol=tolerance, rtol=0)
    assert compiled.scores == pytest.approx(eager.scores, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "kind", "how", "wrap_first"),
    [
        ("llama", "lora", "whole", True),
        ("llama", "lora", "blocks", False),
        ("bert", "vera", "blocks", True),
        ("bert", "peft", "blocks", False),
    ],
)
def test_fifty_reallocations_compile_nothing_anew(
    name: str, kind: str, how: str, wrap_first: bool
) -> None:
    tiny, plain = unpadded(name, kind), unpadded(name, kind)
    run = train(tiny, how, wrap_first=wrap_first)
    assert len(set(run.chosen)) == 6  # of 4 modules, each pair was active at some time
    assert run.frames[1] == run.frames[-1] == {"whole": 1, "blocks": 2}[how]
    assert_same(run, train(plain))


# The layers


LAYERS = [
    lambda: LoRALinear(nn.Linear(5, 4).requires_grad_(False), rank=2, alpha=4),
    lambda: VeRALinear(nn.Linear(5, 4).requires_grad_(False), rank=2),
]


def gradients(layer: Any, forward: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    layer.zero_grad()
    x = torch.arange(10.0).view(2, 5).requires_grad_()
    forward(x).square().sum().backward()
    return [x.grad, *(getattr(layer, name).grad for name in layer.adapter_params())]


@pytest.mark.parametrize("make", LAYERS)
def test_a_gate_turns_the_gradients_of_an_idle_layer_into_zeros(make: Any) -> None:
    layer = make()
    randomize_trainable(layer)
    expected = gradients(layer, layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for active in (False, True, False):
        layer.active = active
        x_grad, *own = gradients(layer, compiled)
        torch.testing.assert_close([x_grad], expected[:1])
        wanted = expected[1:] if active else [torch.zeros_like(g) for g in own]
        torch.testing.assert_close(own, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", LAYERS)
def test_without_a_gate_an_idle_layer_has_code_and_no_gradients_of_its_own(make: Any) -> None:
    layer = make()
    layer.gated = False
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for active in (True, False, True):
        layer.active = active
        assert all((grad is not None) is active for grad in gradients(layer, compiled)[1:])
    assert counter.frame_count == 2


def test_a_gate_counts_as_it_is_in_the_backward_pass() -> None:
    layer = LAYERS[0]()
    nn.init.ones_(layer.lora_B)
    loss = torch.compile(layer, backend="aot_eager")(torch.ones(2, 5)).sum()
    layer.active = False
    loss.backward()
    assert layer.lora_A.grad.count_nonzero() == 0


def test_an_overflow_behind_a_closed_gate_stays_there() -> None:
    layer = LAYERS[0]()
    layer.active = False
    compiled = torch.compile(layer, backend="aot_eager")
    (compiled(torch.ones(2, 5)).sum() * float("inf")).backward()
    assert layer.lora_B.grad.count_nonzero() == 0


def test_inference_code_has_no_gate() -> None:
    layer = LAYERS[0]()
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        compiled(torch.ones(2, 5))
    assert not any(tensor.dtype == torch.bool for tensor in _inputs(graphs[0]))
    compiled(torch.ones(2, 5))
    assert any(tensor.dtype == torch.bool for tensor in _inputs(graphs[1]))


def _inputs(graph: torch.fx.GraphModule) -> list[Tensor]:
    values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    return [value for value in values if isinstance(value, Tensor)]


# Scores


def test_what_is_measured_changes_without_a_recompilation() -> None:
    tiny = adapted("stack", "lora")
    masks = [torch.arange(4)[:, None] < 2, None]

    def alternate(optimizer: DynamicAllocationOptimizer) -> None:
        masks.append(masks.pop(0))
        optimizer.tracker.attention_mask = masks[0]

    def tracker() -> ImportanceTracker:
        return ImportanceTracker(ForwardNorm(p=1, part="delta"), every=2, window="period")

    run = train(tiny, "whole", steps=8, importance=tracker(), each_step=alternate)
    assert run.frames[0] == run.frames[-1]
    tiny = adapted("stack", "lora")
    masks = [torch.arange(4)[:, None] < 2, None]
    assert_same(run, train(tiny, steps=8, importance=tracker(), each_step=alternate))


@pytest.mark.parametrize("probe", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradient_scores_are_those_of_eager_mode(probe: bool) -> None:
    def tracker() -> ImportanceTracker:
        return ImportanceTracker(GradientNorm(), probe=probe)

    options = {"steps": 12, "allocator": "discounted", "period": 3}
    run = train(adapted("stack", "lora"), "whole", importance=tracker(), **options)
    assert run.frames[0] == run.frames[-1]
    assert_same(run, train(adapted("stack", "lora"), importance=tracker(), **options))


def test_a_copy_of_the_model_reports_to_no_tracker_of_the_original() -> None:
    tiny = adapted("stack", "lora")
    optimizer = wrapped(tiny.model, allocator="topk", period=100)
    clone = copy.deepcopy(tiny.model)
    torch.compile(clone, backend="aot_eager", fullgraph=True)(**tiny.batch).loss.backward()
    assert set(optimizer.tracker.scores().values()) == {0.0}
    torch.compile(tiny.model, backend="aot_eager", fullgraph=True)(**tiny.batch).loss.backward()
    assert min(optimizer.tracker.scores().values()) > 0


# Budget


def test_a_budget_over_compiled_blocks_is_that_of_eager_mode() -> None:
    switched = []

    def note(optimizer: DynamicAllocationOptimizer) -> None:
        idle = [g for g in optimizer.module_groups if g["name"] not in optimizer.active_groups]
        blocks = {name.split("layer.")[1][0] for name in optimizer.active_groups}
        for group in idle:
            if "layer." in group["name"]:
                assert group["name"].split("layer.")[1][0] not in blocks
                assert all(p.grad is None for p in group["params"])  # nothing was computed
        switched.append(
            sum(
                type(block.module.__dict__.get("_compiled_call_impl")).__name__
                == "_CheckpointedCode"
                for block in find_blocks(optimizer._model)
            )
        )

    options = {"steps": 24, "allocator": Budget(0.5)}
    run = train(adapted("bert", "lora", blocks=4), "blocks", each_step=note, **options)
    assert run.frames[-1] <= 4
    assert max(switched) > 0
    assert len(set(run.chosen)) > 2
    assert_same(run, train(adapted("bert", "lora", blocks=4), **options))


def test_a_budget_needs_the_blocks_compiled_one_by_one() -> None:
    with pytest.raises(RuntimeError, match="Budget has measured nothing"):
        train(adapted("stack", "lora"), "whole", steps=1, allocator=Budget(0.5))
    tiny = adapted("stack", "lora")
    layers = tiny.model.blocks
    for position, block in enumerate(list(layers)):
        layers[position] = torch.compile(block, backend="aot_eager")
    with pytest.raises(ValueError, match=r"compile the block itself, in place: block\.compile"):
        wrapped(tiny.model, allocator=Budget(0.5))


# Names


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_names_and_files_are_those_of_the_model_itself(how: str, tmp_path: Any) -> None:
    plain, tiny = adapted("stack", "lora"), adapted("stack", "lora")
    model = tiny.model
    if how == "whole":
        model = torch.compile(model, backend="aot_eager")
    else:
        layers = model.blocks
        for position, block in enumerate(list(layers)):
            layers[position] = torch.compile(block, backend="aot_eager")
    compiled, eager = wrapped(model), wrapped(plain.model)
    assert compiled.groups == eager.groups
    model(**tiny.batch).loss.backward()
    compiled.step()
    eager.load_state_dict(compiled.state_dict())
    assert eager.active_groups == compiled.active_groups
    files = []
    for name, saved in (("compiled", model), ("plain", plain.model)):
        save_adapter(saved, tmp_path / name)
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            files.append(set(file.keys()))
    assert files[0] == files[1]


# Checkpoints


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_a_pass_that_a_checkpoint_repeats_counts_once(how: str) -> None:
    def checkpointed() -> TinyModel:
        tiny = unpadded("llama", "lora")
        tiny.model.config.use_cache = False
        for block in find_blocks(tiny.model):  # as transformers' own switch, without its hooks
            block.module.gradient_checkpointing = True
            block.module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        return tiny

    run = train(checkpointed(), how, steps=4)
    assert_same(run, train(unpadded("llama", "lora"), steps=4))


# Limits, and the real code generator


def test_a_flag_that_a_users_adapter_reads_is_part_of_the_code() -> None:
    model = ToyModel(layers=3)
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, active=1, period=1, allocator="random"
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    chosen = set()
    for step in range(10):
        chosen.add(tuple(optimizer.active_groups))
        compiled(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == len(chosen) == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_inductor(how: str) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    run = train(unpadded("bert", "lora"), how, steps=12, backend="inductor")
    assert run.frames[1] == run.frames[-1]
    assert_same(run, train(unpadded("bert", "lora"), steps=12), tolerance=1e-5)
