"""VeRA's files: what is written comes back, projections included, and nothing broken gets in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NAMES, build, same, snapshot
from torch import Tensor, nn
from vera_models import adapted, layers_of

from dynalora_adapters import (
    LoRAConfig,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    unmerge,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY_A, KEY_B = "base_model.vera_A", "base_model.vera_B"


def check_shared(model: nn.Module) -> None:
    assert len({id(layer.projections) for layer in layers_of(model)}) == 1


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_bare_model_takes_over_function_trainability_and_files(
    name: str, save_projection: bool, tmp_path: Path
) -> None:
    tiny, fresh = adapted(name, key=7, save_projection=save_projection, dropout=0.25), build(name)
    save_adapter(tiny.model, tmp_path / "one")
    tensors = load_file(tmp_path / "one" / WEIGHTS)
    assert ({KEY_A, KEY_B} <= tensors.keys()) is save_projection
    assert load_adapter(fresh.model, tmp_path / "one") is fresh.model
    check_shared(fresh.model)
    assert repr(fresh.model) == repr(tiny.model)
    fresh.model.eval()
    tiny.model.eval()
    assert torch.equal(fresh.logits(), tiny.logits())
    trainable = {n: p.requires_grad for n, p in tiny.model.named_parameters()}
    assert trainable == {n: p.requires_grad for n, p in fresh.model.named_parameters()}
    save_adapter(fresh.model, tmp_path / "two")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_an_adapted_model_takes_over_the_weights(tmp_path: Path) -> None:
    tiny, other = adapted(), adapted(seed=2)
    save_adapter(tiny.model, tmp_path)
    identity = [id(p) for p in other.model.parameters()]
    load_adapter(other.model, tmp_path)
    assert torch.equal(other.logits(), tiny.logits())
    assert identity == [id(p) for p in other.model.parameters()]  # an optimizer keeps them
    check_shared(other.model)


def test_what_is_in_the_files(tmp_path: Path) -> None:
    tiny = adapted(key=7, d_initial=0.5, dropout=0.25)
    merge(tiny.model)
    save_adapter(nn.DataParallel(tiny.model), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    layers = [f"base_model.model.blocks.{b}.{i}" for b in (0, 1) for i in (0, 2)]
    assert tensors.keys() == {
        *(f"{layer}.vera_lambda_{letter}" for layer in layers for letter in "bd"),
        *("base_model.model.head.weight", "base_model.model.head.bias", KEY_A, KEY_B),
    }
    assert (tensors[KEY_A].shape, tensors[KEY_B].shape) == ((4, 64), (64, 4))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["vera_dropout"]) == ("VERA", 4, 0.25)
    assert (config["projection_prng_key"], config["save_projection"]) == (7, True)
    assert (config["d_initial"], config["bias"], config["fan_in_fan_out"]) == (0.5, "none", False)


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit(folder: Path, **options: object) -> None:
    raw = {**json.loads((folder / CONFIG).read_text()), **options}
    (folder / CONFIG).write_text(json.dumps(raw))


def test_projections_of_a_file_are_used_and_kept(tmp_path: Path) -> None:
    save_adapter(adapted().model, tmp_path)
    A, B = torch.randn(4, 64, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    retensor(tmp_path, lambda t: t.update({KEY_A: A, KEY_B: B}))
    edit(tmp_path, save_projection=False)  # to draw them again would be wrong
    for model in (build("stack").model, adapted(save_projection=False, seed=2).model):
        load_adapter(model, tmp_path)
        check_shared(model)
        assert torch.equal(layers_of(model)[0].projections.A, A.float())
        save_adapter(model, tmp_path / "again")
        tensors = load_file(tmp_path / "again" / WEIGHTS)
        assert torch.equal(tensors[KEY_B], B.float())
        assert json.loads((tmp_path / "again" / CONFIG).read_text())["save_projection"] is True


def test_loading_drawn_projections_replaces_those_of_another_file(tmp_path: Path) -> None:
    tiny, other = adapted(save_projection=False), adapted(seed=2)
    save_adapter(tiny.model, tmp_path)
    layers_of(other.model)[0].projections.A.neg_()
    load_adapter(other.model, tmp_path)
    assert torch.equal(other.logits(), tiny.logits())


def test_projections_that_a_cast_has_rounded_are_saved_with_the_file(tmp_path: Path) -> None:
    tiny = adapted(save_projection=False)
    tiny.model.half().float()
    save_adapter(tiny.model, tmp_path)
    assert KEY_A in load_file(tmp_path / WEIGHTS)
    fresh = build("stack")
    fresh.model.half().float()
    load_adapter(fresh.model, tmp_path)
    assert torch.equal(fresh.logits(), tiny.logits())


D = "base_model.model.blocks.0.0.vera_lambda_d"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no projections": (
        lambda f: retensor(f, lambda t: (t.pop(KEY_A), t.pop(KEY_B))),
        f"{KEY_A} and {KEY_B} missing, although save_projection is true; .* set save_projection to",
    ),
    "no B": (lambda f: retensor(f, lambda t: t.pop(KEY_B)), f"{WEIGHTS}: {KEY_B} missing"),
    "no B, none promised": (
        lambda f: (edit(f, save_projection=False), retensor(f, lambda t: t.pop(KEY_B))),
        f"missing {KEY_B}; unexpected nothing",
    ),
    "projections too wide": (
        lambda f: retensor(f, lambda t: t.update({KEY_A: torch.ones(4, 65)})),
        rf"{KEY_A} has the shape \(4, 65\), .* need \(4, 64\)",
    ),
    "integer projections": (
        lambda f: retensor(f, lambda t: t.update({KEY_B: torch.ones(64, 4, dtype=torch.int8)})),
        f"{KEY_B} is torch.int8, but the model needs a floating dtype",
    ),
    "rank differs": (lambda f: edit(f, r=3), r"shape \(4,\), but the model .* need \(3,\)"),
    "huge rank": (lambda f: edit(f, r=10**15), r"shape \(4,\), but the model and the rank"),
    "no rank": (lambda f: edit(f, r=None), "r is missing"),
    "missing": (lambda f: retensor(f, lambda t: t.pop(D)), f"missing {D}; unexpected nothing"),
    "no prefix": (
        lambda f: retensor(f, lambda t: t.update({"base_model.vera_C": torch.ones(1)})),
        "without the prefix 'base_model.model.', .*: base_model.vera_C; rename",
    ),
    "bad key": (lambda f: edit(f, projection_prng_key="x"), f"{CONFIG}: key must be an int"),
    "bad flag": (lambda f: edit(f, save_projection="no"), "save_projection must be a bool"),
    "bias": (lambda f: edit(f, bias="lora_only"), "bias='lora_only' is not implemented here"),
    "no such layers": (
        lambda f: edit(f, layers_to_transform=["0"]),
        r"layers_to_transform must hold whole numbers, got \['0'\]",
    ),
    "of LoRA": (lambda f: edit(f, lora_alpha=8), "lora_alpha=8 is not implemented here"),
    "of the future": (lambda f: edit(f, a_new_option=3), "a_new_option=3 is not implemented here"),
}


@pytest.mark.parametrize("make", [lambda: build("stack").model, lambda: adapted(seed=2).model])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_raise_before_anything_changes(
    case: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    save_adapter(adapted().model, tmp_path)
    spoil, message = BROKEN[case]
    spoil(tmp_path)
    check_refused(make(), tmp_path, message)


def check_refused(model: nn.Module, folder: Path, message: str) -> None:
    before, generator = snapshot(model), torch.get_rng_state()
    projections = [layer.projections for layer in layers_of(model)]
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(o is n.projections for o, n in zip(projections, layers_of(model), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 1}, r"says key=0 for blocks.0.0, but the model has 1; call remove\(model\) first"),
        ({"rank": 2}, "says rank=4 for blocks.0.0, but the model has 2"),
        ({"targets": ["0"]}, "unexpected base_model.model.blocks.0.2.vera_lambda_b"),
        ({"trainable": []}, "unexpected base_model.model.head"),
    ],
)
def test_an_adapted_model_that_disagrees_is_left_alone(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(adapted(save_projection=False).model, tmp_path)
    check_refused(adapted(**options).model, tmp_path, message)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    def lora() -> nn.Module:
        tiny = build("stack")
        return inject(tiny.model, LoRAConfig(rank=4, alpha=8, targets=["0"]))

    save_adapter(lora(), tmp_path / "lora")
    save_adapter(adapted().model, tmp_path / "vera")
    check_refused(
        adapted().model,
        tmp_path / "lora",
        "is for LoRALinear, but blocks.0.0 is a VeRALinear; call",
    )
    check_refused(
        lora(), tmp_path / "vera", r"is for VeRALinear, but blocks.0.0 is a LoRALinear; call remove"
    )


def test_merging_into_the_base_and_loading_do_not_mix(tmp_path: Path) -> None:
    tiny = adapted()
    save_adapter(tiny.model, tmp_path)
    expected = tiny.logits()
    with pytest.raises(ValueError, match="is merged into its base"):
        load_adapter(merge(tiny.model), tmp_path)
    load_adapter(unmerge(tiny.model), tmp_path)
    torch.testing.assert_close(tiny.logits(), expected)
    remove(tiny.model)
    assert not layers_of(tiny.model)
