"""Tied weights, embeddings and output heads, in our files and in peft's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomize_trainable, same, snapshot
from torch import Tensor, nn

from dynalora_adapters import LoRAConfig, inject, load_adapter, merge, remove, save_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# An older one resizes the embedding that a tied, adapted head shares, but not the head.
resizes_adapted_heads = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17),
    reason="needs transformers 5.17 or newer: see docs/versions.md",
)

ROWS = 24
IDS = torch.arange(2, 14).view(2, 6)


def llama(*, tied: bool, rows: int = ROWS) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=rows, num_attention_heads=2, tie_word_embeddings=tied, pad_token_id=0, **sizes
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=ROWS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def logits(model: nn.Module) -> Tensor:
    batch = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**batch).logits


def config(**options: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "alpha": 4, "targets": ["q_proj"], **options})


def by_peft(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Adapt, move and save with peft."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    randomize_trainable(model)
    model.save_pretrained(folder)
    return model.eval()


def by_us(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    model = inject(base, config(**options))
    randomize_trainable(model)
    save_adapter(model, folder)
    return model


def assert_refused(model: nn.Module, folder: Path, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert same(before, snapshot(model))


BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


def test_two_values_for_one_tied_weight_are_refused(tmp_path: Path) -> None:
    by_peft(llama(tied=True), tmp_path, **BOTH)
    message = r"lm_head.weight .*differ, but they are one parameter of this model .*tie_word"
    assert_refused(llama(tied=True), tmp_path, message)
    adapted = inject(llama(tied=True), config(trainable=["embed_tokens", "lm_head"]))
    assert_refused(adapted, tmp_path, message)


def test_two_values_are_right_for_weights_that_are_not_tied(tmp_path: Path) -> None:
    theirs = by_peft(llama(tied=False), tmp_path, **BOTH)
    ours = load_adapter(llama(tied=False), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (lambda: llama(tied=True), {"trainable": ["embed_tokens", "lm_head"]}),
        (t5, {"targets": ["q"], "trainable": ["shared", "embed_tokens", "lm_head"]}),
    ],
)
def test_a_tied_weight_trained_under_all_its_names_reads_the_same_in_peft(
    base: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    ours = by_us(base(), tmp_path, **options)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    back = load_adapter(base(), tmp_path)
    assert torch.equal(logits(back), logits(ours))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_modules_is_refused_whoever_names_it(name: str, tmp_path: Path) -> None:
    model = llama(tied=True)
    with pytest.raises(ValueError, match=r"is the same parameter as .* name both modules"):
        inject(model, config(trainable=[name]))
    by_peft(llama(tied=True), tmp_path, modules_to_save=[name])
    assert_refused(model, tmp_path, "is the same parameter as")


class Twice(nn.Module):
    """Two parents hold one module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Sequential(nn.Linear(4, 4))
        self.right = nn.Sequential(self.left[0])
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.right(self.left(x).tanh()))


def test_a_module_that_two_parents_hold_is_adapted_in_one_place_by_peft(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(3, 4)
    ours = by_us(Twice(), tmp_path / "ours", targets=["left.0"])
    assert "left.0 and right.0 are one module" in caplog.text
    assert "exclude=['left.0']" in caplog.text
    assert torch.equal(load_adapter(Twice(), tmp_path / "ours")(x), ours(x))
    theirs = peft.PeftModel.from_pretrained(Twice(), tmp_path / "ours")
    assert not torch.allclose(theirs(x), ours(x))  # otherwise there is nothing to warn about
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"left.0 and right.0 are one module .*adapts its first"):
        load_adapter(Twice(), tmp_path / "theirs")


def test_a_trainable_module_that_two_parents_hold_must_be_named_twice() -> None:
    with pytest.raises(ValueError, match=r"the same parameter as right\.0"):
        inject(Twice(), config(targets=["head"], trainable=["left"]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_pefts_copy_of_an_adapted_embedding_or_head_is_read(
    tied: bool, targets: list[str], tmp_path: Path
) -> None:
    theirs = by_peft(llama(tied=tied), tmp_path, target_modules=targets)
    ours = load_adapter(llama(tied=tied), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    assert (logits(ours) - logits(llama(tied=tied))).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_peft_reads_our_adapted_embedding_and_head(
    tied: bool, targets: list[str], tmp_path: Path
) -> None:
    ours = by_us(llama(tied=tied), tmp_path, targets=targets)
    theirs = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    assert torch.equal(logits(load_adapter(llama(tied=tied), tmp_path)), logits(ours))


@resizes_adapted_heads
@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_in_pefts_file_are_read_and_saved_again(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    def resized(seed: int) -> nn.Module:
        model = llama(tied=tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(ROWS + 4, mean_resizing=False)
        return model

    model = peft.get_peft_model(resized(1), peft.LoraConfig(r=2, target_modules=targets))
    randomize_trainable(model)
    model.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    reference = peft.PeftModel.from_pretrained(resized(2), tmp_path / "theirs")
    ours = load_adapter(resized(2), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(reference), atol=1e-5, rtol=0)
    save_adapter(ours, tmp_path / "ours")
    again = load_adapter(resized(3), tmp_path / "ours")
    torch.testing.assert_close(logits(again)[..., :ROWS], logits(ours)[..., :ROWS])
    assert_refused(llama(tied=tied), tmp_path / "theirs", "call model.resize_token_embeddings")


def test_an_embedding_adapter_starts_as_nothing_scales_and_merges(tmp_path: Path) -> None:
    def gemma() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
        options = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
        made = transformers.Gemma3TextConfig(vocab_size=ROWS, **sizes, **options)
        return transformers.Gemma3ForCausalLM(made).eval()

    plain = logits(gemma())
    model = inject(gemma(), config(targets=["embed_tokens"]))
    assert torch.equal(logits(model), plain)
    randomize_trainable(model)
    save_adapter(model, tmp_path)
    wanted = logits(model)
    assert (wanted - plain).abs().max() > 1e-2
    theirs = peft.PeftModel.from_pretrained(gemma(), tmp_path)
    torch.testing.assert_close(logits(theirs), wanted, atol=1e-5, rtol=0)
    merge(model, remove=True)
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)


def test_the_same_seed_gives_pefts_first_weights_of_an_embedding() -> None:
    torch.manual_seed(3)
    base = llama(tied=False)
    torch.manual_seed(3)
    ours = inject(copy.deepcopy(base), config(targets=["embed_tokens"])).model.embed_tokens
    torch.manual_seed(3)
    options = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(base, options).base_model.model.model.embed_tokens
    assert torch.equal(ours.lora_A, theirs.lora_embedding_A["default"])
    assert torch.equal(ours.lora_B, theirs.lora_embedding_B["default"])


@resizes_adapted_heads
def test_a_tied_head_with_an_adapter_is_tied_resized_and_checkpointed(tmp_path: Path) -> None:
    model = inject(llama(tied=True), config(targets=["lm_head"]))
    randomize_trainable(model)
    wanted = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain), logits(llama(tied=True)))
    model.resize_token_embeddings(ROWS + 4)
    assert torch.equal(logits(model)[..., :ROWS], wanted)
    assert logits(model).shape[-1] == model.lm_head.out_features == ROWS + 4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_adapter(model, tmp_path / "adapter")


def test_a_checkpoint_of_an_adapted_model_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    model = inject(llama(tied=False), config())
    assert llama(tied=False).state_dict().keys() <= model.state_dict().keys()
    randomize_trainable(model)
    other = inject(llama(tied=False), config())
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    other.load_state_dict({**llama(tied=False).state_dict()}, strict=False)
    assert torch.equal(logits(other), logits(model)), "the adapters stay"
    merge(model)
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model))


def test_merge_can_remove_the_adapters_at_once(tmp_path: Path) -> None:
    model = inject(llama(tied=False), config())
    randomize_trainable(model)
    wanted = logits(model)
    assert merge(model, remove=True) is model
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain), logits(model))
    with pytest.raises(TypeError, match="remove must be a bool, got 1"):
        merge(inject(llama(tied=False), config()), remove=1)


def test_a_weight_of_another_shape_is_refused_by_an_adapter() -> None:
    model = inject(llama(tied=False), config(targets=["lm_head"]))
    with pytest.raises(ValueError, match=r"must keep its shape \(24, 16\), got \(3, 16\); call"):
        model.lm_head.weight = nn.Parameter(torch.zeros(3, 16))
    new = nn.Parameter(torch.ones(ROWS, 16))
    model.lm_head.weight = new
    assert model.lm_head.base_layer.weight is new
    remove(model)
    assert model.lm_head.weight is new


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": ["other", "layers"]},
    ],
)
def test_pefts_layers_to_transform_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    names = {"target_modules": ["q_proj", "up_proj"]}
    theirs = by_peft(llama(tied=False), tmp_path, **names, **options)
    ours = load_adapter(llama(tied=False), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(tied=False), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_to_transform": [7]}, r"match no module in the layers \[7\]"),
        ({"layers_to_transform": [True]}, "must hold whole numbers"),
        ({"layers_to_transform": [0], "layers_pattern": 3}, "layers_pattern must hold names"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "not a regular expression"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "needs a list of names"),
        ({"use_dora": True}, "load it with peft.PeftModel.from_pretrained: the optimizer drives"),
        ({"target_parameters": ["x"]}, "load it with peft.PeftModel.from_pretrained"),
    ],
)
def test_other_options_are_refused_with_the_remedy(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    by_us(llama(tied=False), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert_refused(llama(tied=False), tmp_path, message)


def test_a_trainer_writes_and_resumes_checkpoints_of_a_tied_adapted_head(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def train(folder: Path, resume: str | None = None) -> nn.Module:
        model = inject(llama(tied=True), config(targets=["lm_head", "q_proj"]))
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2,
            report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model.eval()

    whole = train(tmp_path)
    resumed = train(tmp_path, str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed), logits(whole))
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert torch.equal(logits(plain), logits(llama(tied=True))), "the base is untouched"
