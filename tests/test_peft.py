"""Models adapted by Hugging Face peft: the same line, the same effect, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import build
from toy import same, weights

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer

peft = pytest.importorskip("peft")

KINDS = {
    "LoRA": lambda tiny: peft.LoraConfig(
        r=4, target_modules=tiny.targets, modules_to_save=tiny.trainable, task_type="SEQ_CLS"
    ),
    "DoRA": lambda tiny: peft.LoraConfig(
        r=4, target_modules=tiny.targets, use_dora=True, modules_to_save=tiny.trainable
    ),
    "VeRA": lambda tiny: peft.VeraConfig(
        r=4, target_modules=tiny.targets, modules_to_save=tiny.trainable
    ),
    "AdaLoRA": lambda tiny: peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=100,
        target_modules=tiny.targets,
        modules_to_save=tiny.trainable,
    ),
    "IA3": lambda tiny: peft.IA3Config(
        target_modules=tiny.targets, feedforward_modules=[], modules_to_save=tiny.trainable
    ),
}
ALLOCATORS = ["topk", "threshold", "stochastic", "discounted", "random", "round_robin"]
IMPORTANCES = ["forward", "gradient", "sensitivity"]


def adapted(kind: str, architecture: str = "bert"):
    torch.manual_seed(0)
    tiny = build(architecture)
    return tiny, peft.get_peft_model(tiny.model, KINDS[kind](tiny))


def optimizer_of(model, **options):
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return DynamicAllocationOptimizer(inner, model, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_peft_layer_is_a_group_and_is_really_frozen(kind):
    # The published code never froze VeRA: it knew LoRA's names only.
    tiny, model = adapted(kind)
    optimizer = optimizer_of(model, active=1, period=1, allocator="round_robin")
    assert len(optimizer.groups) == 4
    assert all(name.rsplit(".", 1)[1] in tiny.targets for name in optimizer.groups)
    assert not any("modules_to_save" in name for name in optimizer.groups)
    for _ in range(5):
        before = weights(model)
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        (active,) = [g for g in optimizer.groups if g in optimizer.record[-2].chosen]
        moved = {name for name, old in before.items() if not torch.equal(old, weights(model)[name])}
        adapters = {name for name in moved if "modules_to_save" not in name}
        assert adapters
        assert all(name.startswith(active + ".") for name in adapters)
        assert moved - adapters, "the head is always active"


def test_peft_calls_that_touch_requires_grad_do_not_undo_the_allocation():
    tiny, model = adapted("LoRA")
    optimizer = optimizer_of(model, active=1)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model(**tiny.batch).loss.backward()
    idle = set(optimizer.groups) - set(optimizer.active_groups)
    grads = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if any(name.startswith(group) for group in idle) and "lora" in name
    }
    assert grads
    assert not any(grad is not None for grad in grads.values())


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_our_lora_and_pefts_lora_give_the_same_losses(allocator):
    def losses(model, tiny):
        options = {} if allocator == "threshold" else {"active": 2}
        optimizer = optimizer_of(model, **options, period=5, allocator=allocator)
        found = []
        for _ in range(100):
            loss = model(**tiny.batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found, [entry.chosen for entry in optimizer.record]

    tiny, theirs = adapted("LoRA")
    expected, expected_sets = losses(theirs, tiny)

    tiny = build("bert")
    torch.manual_seed(0)
    ours = inject(
        tiny.model,
        LoRAConfig(rank=4, alpha=8, targets=tiny.targets, trainable=tiny.trainable),
    )
    found, sets = losses(ours, tiny)
    prefix = "base_model.model."
    assert sets == [tuple(n.removeprefix(prefix) for n in chosen) for chosen in expected_sets]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[-1] < found[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_kind_is_scored_by_every_importance(kind, importance):
    tiny, model = adapted(kind)
    optimizer = optimizer_of(model, active=1.0, importance=importance)
    for _ in range(2):
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = optimizer.tracker.scores()
    assert len(scores) == 4
    assert all(score > 0 for score in scores.values())


@pytest.mark.parametrize("architecture", ["roberta", "gpt2", "llama", "vit"])
def test_other_architectures(architecture):
    tiny, model = adapted("LoRA", architecture)
    optimizer = optimizer_of(model, active=0.5, period=1)
    groups = len(optimizer.groups)
    for _ in range(4):
        model(**tiny.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(optimizer.record.counts().values()) == 4 * round(groups / 2)


def test_a_callable_serves_what_auto_does_not_know():
    def by_layer(name, module):
        return name.split(".attention")[0] if name.endswith("lora_A") else None

    _, model = adapted("LoRA")
    optimizer = optimizer_of(model, active=1, groups=by_layer)
    assert [name.rsplit(".", 1)[1] for name in optimizer.groups] == ["0", "1"]


def test_a_run_with_peft_resumes_bit_for_bit():
    def train(steps, tiny, model, optimizer):
        for _ in range(steps):
            model(**tiny.batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    tiny, straight = adapted("LoRA")
    reference = optimizer_of(straight, active=1, period=2)
    train(3, tiny, straight, reference)
    saved = copy.deepcopy((straight.state_dict(), reference.state_dict()))
    train(4, tiny, straight, reference)

    _, resumed = adapted("LoRA")
    optimizer = optimizer_of(resumed, active=1, period=2)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(4, tiny, resumed, optimizer)
    assert same(weights(resumed), weights(straight))
    assert optimizer.record.state_dict() == reference.record.state_dict()
