"""inject, remove: which modules, and that nothing else changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from tiny_models import (
    NAMES,
    TRANSFORMERS,
    WIDTH,
    Encoder,
    Stack,
    TinyModel,
    build,
    randomize_trainable,
    same,
    snapshot,
)
from torch import nn

from dynalora_adapters import (
    LoRAConfig,
    LoRALinear,
    VeRAConfig,
    VeRALinear,
    inject,
    merge,
    remove,
    unmerge,
)

BOTH = pytest.mark.parametrize("kind", ["lora", "vera"])


def config(kind: str = "lora", **options: object) -> LoRAConfig | VeRAConfig:
    if kind == "vera":
        return VeRAConfig(**{"rank": 4, **options})
    return LoRAConfig(**{"rank": 4, "alpha": 8, **options})


def adapt(tiny: TinyModel, **options: object) -> TinyModel:
    inject(tiny.model, config(targets=tiny.targets, trainable=tiny.trainable, **options))
    return tiny


def adapted(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (LoRALinear, VeRALinear))]


@BOTH
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_unchanged_bit_for_bit(name: str, training: bool, kind: str) -> None:
    tiny = build(name)
    tiny.model.train(training)
    before = tiny.logits()
    after = adapt(tiny, kind=kind, dropout=0.3).logits()
    if name == "encoder" and not training:  # torch's fast path, which adapters have to leave
        torch.testing.assert_close(after, before)
    else:
        assert torch.equal(after, before)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_and_the_named_head_train(name: str, kind: str) -> None:
    tiny = adapt(build(name), kind=kind)
    tiny.loss().backward()
    for param_name, param in tiny.model.named_parameters():
        head = param_name.split(".")[0] in tiny.trainable
        adapter = ".lora_" in param_name or ".vera_lambda_" in param_name
        assert param.requires_grad is (adapter or head), param_name
        assert (param.grad is not None) is param.requires_grad, param_name
    assert len(adapted(tiny.model)) == 2 * len(tiny.targets)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_remove_gives_back_the_very_model(name: str, kind: str) -> None:
    tiny = build(name)
    next(tiny.model.parameters()).requires_grad_(False)
    before, logits = snapshot(tiny.model), tiny.logits()
    assert inject(tiny.model, config(kind, targets=tiny.targets)) is tiny.model
    randomize_trainable(tiny.model)
    assert not torch.equal(tiny.logits(), logits)
    assert remove(tiny.model) is tiny.model
    assert same(before, snapshot(tiny.model))
    assert torch.equal(tiny.logits(), logits)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_idle_adapters_leave_the_output_and_get_no_gradient(name: str, kind: str) -> None:
    tiny = adapt(build(name), kind=kind)
    randomize_trainable(tiny.model)
    expected = tiny.loss()
    layers = [tiny.model.get_submodule(name) for name in adapted(tiny.model)]
    for layer in layers[::2]:
        layer.active = False
    loss = tiny.loss()
    loss.backward()
    assert torch.equal(loss, expected)
    for index, layer in enumerate(layers):
        for param in layer.adapter_params():
            assert (getattr(layer, param).grad is None) is (index % 2 == 0)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_adapted_models_copy_and_pickle(name: str, kind: str) -> None:
    tiny = adapt(build(name), kind=kind)
    randomize_trainable(tiny.model)
    logits = tiny.logits()
    buffer = io.BytesIO()
    torch.save(tiny.model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(tiny.model), torch.load(buffer, weights_only=False)):
        other = TinyModel(name, twin, tiny.batch, tiny.targets, tiny.trainable)
        assert torch.equal(other.logits(), logits)
        remove(twin)
        assert not adapted(twin)
    assert torch.equal(tiny.logits(), logits)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_the_fast_path_of_transformer_encoder_does_not_pass_adapters_by(
    masked: bool, grad: bool
) -> None:
    tiny = adapt(build("encoder"))
    if not masked:
        del tiny.batch["attention_mask"]
    randomize_trainable(tiny.model)
    with torch.set_grad_enabled(grad):
        expected = tiny.model(**tiny.batch).logits
        tiny.model.eval()
        logits = tiny.model(**tiny.batch).logits
    torch.testing.assert_close(logits, expected)
    merge(tiny.model)
    torch.testing.assert_close(tiny.logits(), expected)
    bare = remove(unmerge(tiny.model))
    assert bare.encoder.use_nested_tensor
    assert (bare(**tiny.batch).logits - expected).abs().max() > 0.01  # adapters do matter here


def test_a_layer_used_twice_is_adapted_once_and_replaced_everywhere() -> None:
    model = Stack()
    shared = model.blocks[0][0]
    model.blocks[1][0] = shared
    model.alias = shared
    inject(model, config(targets=["blocks.1.0"]))
    layer = model.blocks[0][0]
    assert isinstance(layer, LoRALinear)
    assert layer is model.blocks[1][0] is model.alias
    assert layer.base_layer is shared
    remove(model)
    assert model.blocks[0][0] is model.blocks[1][0] is model.alias is shared


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["query"], (), {"0.attention.self.query", "1.attention.self.query"}),
        (["layer.1.attention.self.query"], (), {"1.attention.self.query"}),
        (["self.query", "query"], (), {"0.attention.self.query", "1.attention.self.query"}),
        (["query", "key"], ["key"], {"0.attention.self.query", "1.attention.self.query"}),
        (["query"], r".*\.0\..*", {"1.attention.self.query"}),
        (r".*\.1\.(attention\.self\.value|intermediate\.dense)", (),
         {"1.attention.self.value", "1.intermediate.dense"}),
        (["dense"], ["attention.output.dense", "pooler.dense"],
         {f"{i}.{m}.dense" for i in (0, 1) for m in ("intermediate", "output")}),
    ],
)  # fmt: skip
def test_targets_mean_what_they_mean_to_peft(
    targets: object, exclude: object, expected: set[str]
) -> None:
    tiny = build("bert")
    inject(tiny.model, config(targets=targets, exclude=exclude))
    assert {n.removeprefix("bert.encoder.layer.") for n in adapted(tiny.model)} == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_linear_is_everything_but_the_head(name: str) -> None:
    tiny = build(name)
    linear = [n for n, m in tiny.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    inject(tiny.model, config(targets="All-Linear", trainable=tiny.trainable))
    expected = [n for n in linear if n.split(".")[0] not in tiny.trainable]
    assert adapted(tiny.model) == expected


def test_all_linear_spares_a_classification_head_that_is_not_trainable() -> None:
    tiny = build("roberta")
    inject(tiny.model, config(targets="all-linear"))
    assert adapted(tiny.model)
    assert not any(name.startswith("classifier") for name in adapted(tiny.model))


def test_all_linear_spares_the_output_projection_of_multihead_attention() -> None:
    model = Encoder()
    inject(model, config(targets="all-linear"))
    assert {n.rpartition(".")[2] for n in adapted(model)} == {"linear1", "linear2", "head"}


def test_a_lazy_layer_is_no_target_before_it_has_a_weight() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"'0' matches only modules .*\(LazyLinear\)"):
        inject(model, config(targets=["0"]))


def tied_head() -> nn.Module:
    model = Stack()
    model.decoder = nn.Linear(CLASS_ROWS, WIDTH, bias=False)
    model.decoder.weight = model.blocks[0][2].weight
    return model


CLASS_ROWS = 2 * WIDTH

BAD: dict[str, tuple[Callable[[], nn.Module], dict[str, object], str]] = {
    "typo": (
        lambda: build("bert").model,
        {"targets": ["query", "valeu"]},
        r"targets entry 'valeu' matches no module .* Did you mean value.*end in .*dense.*query",
    ),
    "regex for one leaf": (
        lambda: build("bert").model,
        {"targets": "query"},
        r"A string is a regular expression for the whole dotted name; \['query'\]",
    ),
    "normalisation": (
        lambda: build("bert").model,
        {"targets": ["LayerNorm"]},
        r"'LayerNorm' matches only modules that are not linear layers \(LayerNorm\)",
    ),
    "container": (
        lambda: build("bert").model,
        {"targets": ["query", "encoder"]},
        r"'encoder' matches only modules .*\(BertEncoder\)",
    ),
    "unknown head": (
        lambda: build("bert").model,
        {"targets": ["query"], "trainable": ["score"]},
        "trainable entry 'score' matches no module",
    ),
    "unknown exclusion": (
        lambda: build("bert").model,
        {"targets": ["query"], "exclude": ["keys"]},
        "exclude entry 'keys' matches no module .* Did you mean key",
    ),
    "everything excluded": (
        lambda: build("bert").model,
        {"targets": ["query"], "exclude": r".*query"},
        r"targets=\('query',\) leaves no module to adapt: .*exclude='.\*query'",
    ),
    "inside the head": (
        lambda: build("roberta").model,
        {"targets": ["out_proj"], "trainable": ["classifier"]},
        r"targets=\('out_proj',\) leaves no module .* is inside trainable=\('classifier',\)",
    ),
    "attention projection": (
        Encoder,
        {"targets": ["linear1", "out_proj"]},
        r"targets matches encoder.layers.0.self_attn.out_proj, .*whose weight MultiheadAttention",
    ),
    "attention projection by regex": (Encoder, {"targets": r".*proj"}, "MultiheadAttention reads"),
    "shared trainable": (
        tied_head,
        {"targets": ["blocks.0.0"], "trainable": ["decoder"]},
        "trainable includes decoder.weight, which is the same parameter as blocks.0.2.weight",
    ),
    "nothing linear": (
        lambda: nn.Sequential(nn.ReLU()),
        {"targets": "all-linear"},
        "targets='all-linear' leaves no module to adapt",
    ),
    "no linear layers at all": (
        lambda: nn.Sequential(nn.ReLU()),
        {"targets": ["q"]},
        r"The names of linear layers end in \(it has no linear layer\)",
    ),
    "twice": (
        lambda: inject(Stack(), config(targets=["0"])),
        {"targets": ["2"]},
        r"model is adapted already \(by 'default'\); call remove\(model\) first",
    ),
    "wrapped": (
        lambda: nn.DataParallel(Stack()),
        {"targets": ["0"]},
        "model is wrapped in DataParallel",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_before_anything_changes(case: str) -> None:
    make, options, message = BAD[case]
    model = make()
    before = snapshot(model)
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        inject(model, config(**options))
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), generator)


def test_remove_takes_out_layers_that_were_put_in_by_hand() -> None:
    model = Stack()
    before = snapshot(model)
    model.blocks[0][0] = LoRALinear(model.blocks[0][0], rank=2, alpha=2)
    assert same(before, snapshot(remove(model)))


def test_a_foreign_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="a LoRAConfig or a VeRAConfig of this package, got dict"):
        inject(Stack(), {"rank": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", [remove, merge, unmerge])
def test_operations_on_adapters_say_when_there_are_none(
    operation: Callable[[nn.Module], nn.Module],
) -> None:
    with pytest.raises(ValueError, match=r"model \(Stack\) holds no adapters; call inject"):
        operation(Stack())


def test_several_modules_that_share_a_weight_may_all_be_trainable() -> None:
    model = tied_head()
    inject(model, config(targets=["blocks.1.0"], trainable=["decoder", "blocks.0.2"]))
    assert model.decoder.weight.requires_grad
    assert model.blocks[0][2].bias.requires_grad


def test_a_layer_inside_a_chosen_layer_is_left_to_it() -> None:
    class Outer(nn.Linear):
        """A linear layer that is computed by another one."""

        def __init__(self) -> None:
            super().__init__(3, 3)
            self.inner = nn.Linear(3, 3)

    model = nn.Sequential(Outer())
    inject(model, config(targets=r".*"))
    assert adapted(model) == ["0"]


def test_tiny_models_are_reproducible_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    for name in NAMES:
        first, second, other = build(name), build(name), build(name, seed=1)
        assert torch.equal(first.logits(), second.logits())
        assert not torch.equal(first.logits(), other.logits())
    assert torch.equal(torch.get_rng_state(), state)
