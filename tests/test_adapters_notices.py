"""What cannot be adapted, or stays frozen, or means something else to peft, is named."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch, names
from architectures import build as built
from tiny_models import build as build_tiny
from tiny_models import randomize_trainable, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from dynalora_adapters import LoRAConfig, LoRALinear, inject, load_adapter, merge, save_adapter

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


def build_architecture(auto: str, kind: str) -> nn.Module:
    """The tiny model of a type; the test is skipped if these versions cannot build it."""
    try:
        return built(auto, kind)
    except LookupError as error:
        pytest.skip(str(error))


def build(auto: str, kind: str) -> nn.Module:
    if kind not in names(auto):
        pytest.skip(f"this transformers has no {kind}")
    return build_architecture(auto, kind)


def config(**options: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "alpha": 4, "targets": "all-linear", **options})


def adapted(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}


class Reader(nn.Module):
    """Computes with weights that it reads, in every way that code has for it."""

    def __init__(self, how: str = "direct") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.read, self.called, self.asked = (nn.Linear(4, 4) for _ in range(3))
        self.several = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.either = nn.Linear(4, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.counted = nn.ModuleList([nn.Linear(4, 4)])
        self.reset_rows()

    def reset_rows(self) -> None:
        self.asked.weight.data.mul_(1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.read.weight, self.read.bias)
        x = self.called(x.to(self.asked.weight.dtype))
        x = self.asked(x) if isinstance(self.asked.weight, Tensor) else x
        for layer in self.several:
            x = x @ layer.weight.t()
        proj = self.inner[0]
        x = x @ proj.weight
        first, second = self.first, self.second
        x = x @ first.weight + x @ second.weight
        for i, layer in enumerate(self.counted):
            x = x + F.linear(x, weight=layer.weight) * i
        return self.either(x) if self.training else F.linear(x, self.either.weight)


class Scaler(nn.Module):
    """Scales the weights of its layers once, in place, as timm's vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.fix_scales()

    @torch.no_grad()
    def fix_scales(self) -> None:
        for number, layer in enumerate(self.blocks):
            layer.weight.div_(number + 1)

    def run(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = layer(x)
        return x

    forward = run


def test_a_layer_whose_weight_is_changed_in_place_is_not_read() -> None:
    model = inject(Scaler(), config(targets="all-linear"))
    assert adapted(model) == {"blocks.0", "blocks.1"}
    assert adapted(inject(Scaler(), config(targets=["blocks.0"]))) == {"blocks.0"}


class Readers(Reader):
    """Inherits the forward that reads."""


PAST = ["counted.0", "first", "inner.0", "read", "second", "several.0", "several.1"]


@pytest.mark.parametrize("kind", [Reader, Readers])
def test_all_linear_leaves_out_layers_that_are_read(
    kind: type[Reader], caplog: pytest.LogCaptureFixture
) -> None:
    model = inject(kind(), config())
    assert adapted(model) == {"called", "asked"}
    assert "leaves out read, several.0, several.1 and 5 more" in caplog.text


@pytest.mark.parametrize("name", PAST)
def test_a_layer_that_is_read_and_never_called_is_refused(name: str) -> None:
    model = Reader()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"targets matches {name}.*reads without calling.*exclude"):
        inject(model, config(targets=["called", name]))
    assert same(before, snapshot(model))
    leaf = name.rpartition(".")[2]
    inject(model, config(targets=["called", name], exclude=[name, leaf]))


def test_a_layer_that_is_read_in_some_cases_only_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert adapted(inject(Reader(), config(targets=["either"]))) == {"either"}
    assert "either, whose weight the model reads without calling the layer in some" in caplog.text


def test_mamba_is_adapted_where_it_has_an_effect_and_reads_the_same_in_peft(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = build("AutoModelForCausalLM", "mamba")
    inputs = batch(base)
    model = inject(base, config())
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"in_proj"}
    assert "out_proj" in caplog.text
    assert "dt_proj" in caplog.text
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    fresh = build("AutoModelForCausalLM", "mamba")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path)
    wanted = model(**inputs).logits
    torch.testing.assert_close(theirs(**inputs).logits, wanted, atol=1e-5, rtol=0)
    merge(model, remove=True)
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=0)


def test_what_peft_refuses_in_mamba_is_named_at_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = inject(build("AutoModelForCausalLM", "mamba"), config(targets=["out_proj", "in_proj"]))
    save_adapter(model, tmp_path)
    assert "peft refuses backbone.layers.0.mixer.out_proj" in caplog.text
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        peft.PeftModel.from_pretrained(build("AutoModelForCausalLM", "mamba"), tmp_path)


class Odd(nn.Module):
    """A layer of another library: (in, out) weight, or a forward of its own."""

    def __init__(self, kind: str, rows: int = 6, columns: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features, self.kind = rows, columns, kind
        shape = (columns, rows) if kind == "usual" else (rows, columns)
        self.weight = nn.Parameter(torch.randn(shape))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = x @ (self.weight.t() if self.kind == "usual" else self.weight)
        return {"doubled": 2 * y, "tuple": (y, y)}.get(self.kind, y)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 1.5 * self.weight, self.bias)


class Grouped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x[..., ::2], self.weight[:, ::2])


class Logged(nn.Linear):
    """The same computation in a forward of its own, with dropout in training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (6, 4)])
@pytest.mark.parametrize("kind", ["usual", "turned"])
def test_the_layout_is_what_the_forward_says(
    kind: str, rows: int, columns: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(Odd(kind, rows, columns))
    x = torch.randn(3, rows)
    inject(model, config(targets=["0"]))
    assert model[0].base_layer.calls == 0, "the trial leaves no trace"
    randomize_trainable(model)
    wanted = model(x)
    save_adapter(model, tmp_path)
    assert "peft refuses 0, of the class Odd" in caplog.text
    assert torch.equal(load_adapter(nn.Sequential(Odd(kind, rows, columns)), tmp_path)(x), wanted)
    merge(model, remove=True)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    "make", [lambda: Odd("doubled"), lambda: Odd("tuple"), lambda: Scaled(6, 6),
             lambda: Grouped(6, 4)]
)  # fmt: skip
def test_a_layer_that_computes_something_else_is_no_target(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), make())
    with pytest.raises(ValueError, match=r"'1' matches only modules that are not linear layers"):
        inject(model, config(targets=["1"]))
    assert adapted(inject(model, config())) == {"0"}
    if isinstance(model[1], nn.Linear):
        assert '"all-linear" leaves out 1: their class computes something else' in caplog.text


def test_a_subclass_that_computes_the_same_is_adapted() -> None:
    model = inject(nn.Sequential(Logged(6, 6)), config())
    assert model[0].base_layer.training
    randomize_trainable(model.eval())
    x = torch.randn(2, 6)
    wanted = model(x)
    torch.testing.assert_close(merge(model, remove=True)(x), wanted)


EXPERTS = ("glm4_moe", "deepseek_v3", "ernie4_5_moe", "qwen3_next")


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]])
def test_names_that_peft_takes_for_experts_are_named_at_save(
    kind: str, targets: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("AutoModelForCausalLM", kind)
    if targets != "all-linear" and kind in ("deepseek_v3", "qwen3_next"):
        targets = targets[1:]
    inject(model, config(targets=targets))
    save_adapter(model, tmp_path)
    assert "peft would leave out the adapters of " in caplog.text
    assert "mlp.gate_proj" in caplog.text or "shared_expert" in caplog.text
    assert "Load the file with load_adapter" in caplog.text


def test_names_that_peft_takes_for_old_ones_are_named_at_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = build("AutoModelForCausalLM", "laguna")  # in transformers 5.17 and later
    model = inject(base, config())
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    fresh = build("AutoModelForCausalLM", "laguna")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path)
    lost = [n for n, p in theirs.named_parameters() if "lora_B" in n and not p.any()]
    said = "mlp.shared_experts.down_proj" in caplog.text and "an older version" in caplog.text
    assert said is bool(lost), "no warning without a reason"


def test_a_model_that_peft_reads_as_it_is_needs_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = inject(build("AutoModelForCausalLM", "qwen2_moe"), config(targets=["gate_proj"]))
    caplog.clear()
    save_adapter(model, tmp_path)
    assert caplog.text == ""


def test_without_transformers_tables_any_fused_experts_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inject(build("AutoModelForCausalLM", "qwen2_moe"), config(targets=["gate_proj"]))
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    save_adapter(model, tmp_path)
    assert "mlp.shared_expert.gate_proj" in caplog.text
    assert "takes their names for those of the experts" in caplog.text


@pytest.mark.parametrize(
    ("targets", "named"), [("all-linear", True), (["up_proj"], True), (["q_proj"], False)]
)
def test_fused_experts_that_stay_frozen_are_named(
    targets: Any, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    inject(build("AutoModelForCausalLM", "qwen2_moe"), config(targets=targets))
    assert ("mlp.experts.gate_up_proj" in caplog.text) is named
    assert ("gate_up_proj'], ...) instead of inject" in caplog.text) is named


HEADS = [("bert", "classifier"), ("gpt2", "score"), ("vit", "classifier"), ("stack", "head")]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_a_head_that_stays_frozen_is_named(
    name: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = build_tiny(name)
    inject(tiny.model, config(targets=tiny.targets))
    assert f"{head}: the head of {type(tiny.model).__name__} stays frozen" in caplog.text
    assert f"trainable=['{head}']" in caplog.text
    caplog.clear()
    tiny = build_tiny(name)
    inject(tiny.model, config(targets=tiny.targets, trainable=[head]))
    assert caplog.text == ""


def test_every_module_of_a_new_head_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = build("AutoModelForSequenceClassification", "distilbert")
    inject(model, config(targets=["q_lin"], trainable=["classifier"]))
    assert "pre_classifier: the head of DistilBert" in caplog.text
    assert "pass trainable=['classifier', 'pre_classifier']" in caplog.text


def test_a_language_models_head_is_not_new(caplog: pytest.LogCaptureFixture) -> None:
    inject(build("AutoModelForCausalLM", "llama"), config())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("auto", "kind", "task"),
    [
        ("AutoModelForSpeechSeq2Seq", "whisper", None),
        ("AutoModelForImageTextToText", "llava", None),
        ("AutoModelForImageTextToText", "qwen3_vl", None),
        ("AutoModelForSeq2SeqLM", "t5", "SEQ_2_SEQ_LM"),
        ("AutoModelForSeq2SeqLM", "bart", "SEQ_2_SEQ_LM"),
        ("AutoModelForCausalLM", "llama", "CAUSAL_LM"),
    ],
)
def test_only_text_encoder_decoders_get_pefts_task_type_for_them(
    auto: str, kind: str, task: str | None, tmp_path: Path
) -> None:
    model = inject(build(auto, kind), config())
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task


def test_sound_is_classified_without_a_task_type(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"intermediate_size": 16, "conv_dim": (8, 8), "conv_stride": (5, 2)}
    made = transformers.Wav2Vec2Config(
        **sizes, **options, conv_kernel=(10, 3), num_feat_extract_layers=2, classifier_proj_size=8,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip

    def make() -> nn.Module:
        torch.manual_seed(0)
        return transformers.Wav2Vec2ForSequenceClassification(made).eval()

    model = inject(make(), config(targets=["q_proj"], trainable=["projector", "classifier"]))
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    sound = torch.randn(2, 400)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(sound).logits, model(sound).logits, atol=1e-5, rtol=0)


def test_the_notices_are_warnings_of_this_package(caplog: pytest.LogCaptureFixture) -> None:
    inject(Reader(), config())
    assert {(r.name, r.levelno) for r in caplog.records} == {
        ("dynalora_adapters._inject", logging.WARNING)
    }
