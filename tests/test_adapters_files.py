"""save_adapter, load_adapter: what is written comes back, and nothing broken gets in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import NAMES, Stack, TinyModel, build, randomize_trainable, same, snapshot
from torch import Tensor, nn

from dynalora_adapters import (
    LoRAConfig,
    LoRALinear,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    unmerge,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted(name: str, seed: int = 1, **options: Any) -> TinyModel:
    tiny = build(name)
    torch.manual_seed(seed)
    options = {"rank": 4, "alpha": 8, "targets": tiny.targets, **options}
    inject(tiny.model, LoRAConfig(**{"trainable": tiny.trainable, **options}))
    randomize_trainable(tiny.model, seed)
    return tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of an adapted Stack."""
    folder = tmp_path_factory.mktemp("good")
    save_adapter(adapted("stack").model, folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good files, to be spoilt."""
    for name in (WEIGHTS, CONFIG):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_model_takes_over_function_and_trainability(name: str, tmp_path: Path) -> None:
    tiny, fresh = adapted(name), build(name)
    save_adapter(tiny.model, tmp_path / "new" / "folder")
    generator = torch.get_rng_state()
    assert load_adapter(fresh.model, tmp_path / "new" / "folder") is fresh.model
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(fresh.logits(), tiny.logits())
    trainable = {n: p.requires_grad for n, p in tiny.model.named_parameters()}
    assert trainable == {n: p.requires_grad for n, p in fresh.model.named_parameters()}


@pytest.mark.parametrize("name", ["bert", "gpt2", "stack"])
def test_an_adapted_model_takes_over_the_weights(name: str, tmp_path: Path) -> None:
    tiny, other = adapted(name), adapted(name, seed=2)
    save_adapter(tiny.model, str(tmp_path))
    identity = [id(p) for p in other.model.parameters()]
    load_adapter(other.model, str(tmp_path))
    assert torch.equal(other.logits(), tiny.logits())
    assert identity == [id(p) for p in other.model.parameters()]  # an optimizer keeps them


def test_saving_after_loading_writes_the_same_bytes(good: Path, tmp_path: Path) -> None:
    save_adapter(load_adapter(build("stack").model, good), tmp_path)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / name).read_bytes() == (good / name).read_bytes()


def test_what_is_in_the_files(good: Path) -> None:
    with safe_open(good / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(good / WEIGHTS)
    prefix = "base_model.model."
    assert {key.removeprefix(prefix) for key in tensors} == {
        *(f"blocks.{b}.{i}.lora_{k}.weight" for b in (0, 1) for i in (0, 2) for k in "AB"),
        *("head.weight", "head.bias"),
    }
    assert tensors[prefix + "blocks.0.0.lora_A.weight"].shape == (4, 32)
    assert tensors[prefix + "blocks.0.0.lora_B.weight"].shape == (64, 4)
    config = json.loads((good / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["modules_to_save"] == ["head"]
    # "0" and "2" would mean blocks.0 as well, to peft, which refuses what it cannot adapt.
    assert config["target_modules"] == [f"blocks.{b}.{i}" for b in (0, 1) for i in (0, 2)]
    assert (config["task_type"], config["bias"]) == (None, "none")


def test_the_state_of_an_adapter_does_not_change_what_is_saved(good: Path, tmp_path: Path) -> None:
    tiny = adapted("stack")
    merge(tiny.model)
    for module in tiny.model.modules():
        if isinstance(module, LoRALinear):
            module.active = False
    save_adapter(nn.DataParallel(tiny.model), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (good / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"rslora": True},
        {"rank_pattern": {r"blocks\.1\.0": 2}, "alpha_pattern": {"2": 3.5}},
        {"targets": "all-linear", "trainable": ["head"], "dropout": 0.25},
        {"targets": r"blocks\..\.0", "exclude": ["blocks.0.0"]},
        {"trainable": []},
        {"targets": ["head"], "trainable": []},
    ],
)
def test_every_option_survives(options: dict[str, Any], tmp_path: Path) -> None:
    tiny, fresh = adapted("stack", **options), build("stack")
    save_adapter(tiny.model, tmp_path)
    load_adapter(fresh.model, tmp_path)
    assert torch.equal(fresh.model.eval()(**fresh.batch).logits, tiny.model.eval()(**tiny.batch)[1])
    assert repr(fresh.model) == repr(tiny.model)  # ranks, alphas, dropout, and where


def test_names_that_a_list_would_confuse_are_written_exactly(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))

    one = inject(model(), LoRAConfig(rank=1, alpha=1, targets="all-linear", exclude=["1.0"]))
    save_adapter(one, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "(?:0)"
    other = load_adapter(model(), tmp_path)
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]


def test_a_class_that_is_a_language_model_by_name_only_has_no_task(tmp_path: Path) -> None:
    class TinyForCausalLM(Stack):
        """peft's wrapper for this task would ask it how to generate."""

    model = inject(TinyForCausalLM(), LoRAConfig(rank=1, alpha=1, targets=["0"]))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] is None


def test_tensors_are_converted_to_the_models_dtype(good: Path) -> None:
    model = build("stack").model.double()
    load_adapter(model, good)
    key = "base_model.model.blocks.0.0.lora_A.weight"
    assert model.blocks[0][0].lora_A.dtype == torch.float64
    assert torch.equal(model.blocks[0][0].lora_A.float(), load_file(good / WEIGHTS)[key])


def test_tied_weights_of_trainable_modules_are_saved_under_both_names(tmp_path: Path) -> None:
    def model() -> nn.Module:
        tied = Stack()
        tied.first, tied.second = nn.Linear(3, 3), nn.Linear(3, 3)
        tied.second.weight = tied.first.weight
        return tied

    config = LoRAConfig(rank=1, alpha=1, targets=["0"], trainable=["first", "second"])
    one = inject(model(), config)
    randomize_trainable(one)
    save_adapter(one, tmp_path)
    other = load_adapter(model(), tmp_path)
    assert torch.equal(one.first.weight, other.second.weight)
    assert other.first.weight is other.second.weight


@pytest.mark.parametrize("make", [Stack, lambda: remove(adapted("stack").model)])
def test_saving_a_model_without_adapters_raises(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapters"):
        save_adapter(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_a_part_of_the_adapted_model_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass the module that was given to inject, not a part"):
        save_adapter(adapted("stack").model.blocks, tmp_path)


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def full_disk_for_weights(source: Path, target: Path, replace: Any = Path.replace) -> None:
    """A rename that fails for the second file."""
    if Path(target).name == WEIGHTS:
        full_disk()
    replace(source, target)


FAILURES = {
    "weights": ("dynalora_adapters.io._storage.save_file", full_disk),
    "config": ("pathlib.Path.write_text", full_disk),
    "backup": ("shutil.copy2", full_disk),
    "first rename": ("pathlib.Path.replace", full_disk),
    "second rename": ("pathlib.Path.replace", full_disk_for_weights),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_disk_leaves_the_old_files_whole_and_no_others(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    tiny = adapted("stack", seed=2, rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[case])
        with pytest.raises(OSError, match="No space left"):
            save_adapter(tiny.model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    save_adapter(tiny.model, folder)
    assert torch.equal(load_adapter(build("stack").model, folder)(**tiny.batch)[1], tiny.logits())


def test_a_failing_disk_leaves_a_new_folder_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathlib.Path.replace", full_disk_for_weights)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted("stack").model, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def edit(folder: Path, **options: object) -> None:
    """Change options of the configuration; ``...`` removes one."""
    raw = {**json.loads((folder / CONFIG).read_text()), **options}
    kept = {key: value for key, value in raw.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(kept))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


A, HEAD = "base_model.model.blocks.0.0.lora_A.weight", "base_model.model.head.bias"


def strip_prefix(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, f"{CONFIG} does not exist"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "never read"),
    "not JSON": (lambda f: (f / CONFIG).write_text("{"), ValueError, f"{CONFIG} is not JSON"),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\xfd"), ValueError, "is not JSON"),
    "too deep": (lambda f: (f / CONFIG).write_text("[" * 10**5), ValueError, "is not JSON"),
    "no object": (lambda f: (f / CONFIG).write_text("[]"), ValueError, "JSON object, got list"),
    "other kind": (
        lambda f: edit(f, peft_type="IA3"),
        ValueError,
        r"'VERA'\], got 'IA3'",
    ),
    "no kind": (lambda f: edit(f, peft_type=["LORA"]), ValueError, "peft_type must be one of"),
    "no rank": (lambda f: edit(f, r=...), ValueError, "r is missing"),
    "no targets": (lambda f: edit(f, target_modules=None), ValueError, "target_modules is missing"),
    "bad rank": (lambda f: edit(f, r="4"), ValueError, f"{CONFIG}: rank must be an int, got '4'"),
    "huge rank": (lambda f: edit(f, r=10**18), ValueError, r"shape \(4, 32\), but the model and"),
    "bad regex": (lambda f: edit(f, target_modules="("), ValueError, "not a regular expression"),
    "other names": (lambda f: edit(f, target_modules=["q"]), ValueError, "does not fit the model"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]),
        ValueError,
        f"{WEIGHTS} is truncated or not a safetensors file",
    ),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, "truncated or not"),
    "a pickle": (lambda f: torch.save({}, f / WEIGHTS), ValueError, "not a safetensors file"),
    "no prefix": (
        lambda f: retensor(f, strip_prefix),
        ValueError,
        "without the prefix 'base_model.model.', which peft would ignore silently: blocks.0.0",
    ),
    "missing": (lambda f: retensor(f, lambda t: t.pop(A)), ValueError, f"missing {A}; unexpected"),
    "head missing": (lambda f: retensor(f, lambda t: t.pop(HEAD)), ValueError, f"missing {HEAD}"),
    "unexpected": (
        lambda f: retensor(f, lambda t: t.update({A + "2": torch.ones(1)})),
        ValueError,
        f"missing nothing; unexpected {A}2",
    ),
    "head shape": (
        lambda f: retensor(f, lambda t: t.update({HEAD: torch.ones(4)})),
        ValueError,
        rf"{HEAD} has the shape \(4,\), .* need \(3,\)",
    ),
    "rank differs": (
        lambda f: edit(f, r=3),
        ValueError,
        r"lora_A.weight has the shape \(4, 32\), but the model and the rank in .* need \(3, 32\)",
    ),
    "integers": (
        lambda f: retensor(f, lambda t: t.update({A: t[A].to(torch.int32)})),
        ValueError,
        f"{A} is torch.int32, but the model needs a floating dtype",
    ),
}
REFUSED = {
    "use_dora": True,
    "bias": "boft_only",
    "lora_bias": True,
    "layer_replication": [[0, 1]],
    "target_parameters": ["weight"],
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "init_lora_weights": "pissa",
    "an_option_of_the_future": 3,
}


def check_refused(
    make: Callable[[], nn.Module], folder: Path, error: type[Exception], message: str
) -> None:
    model = make()
    before, generator = snapshot(model), torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_raise_before_a_bare_model_changes(case: str, folder: Path) -> None:
    spoil, error, message = BROKEN[case]
    spoil(folder)
    check_refused(lambda: build("stack").model, folder, error, message)


@pytest.mark.parametrize("case", [c for c in BROKEN if c != "other names"])
def test_broken_files_raise_before_an_adapted_model_changes(case: str, folder: Path) -> None:
    spoil, error, message = BROKEN[case]
    spoil(folder)
    check_refused(lambda: adapted("stack").model, folder, error, message)


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_change_the_forward_are_refused_by_name(option: str, folder: Path) -> None:
    edit(folder, **{option: REFUSED[option]})
    message = f"{option}={REFUSED[option]!r} is not implemented here".replace("[", r"\[")
    check_refused(lambda: build("stack").model, folder, ValueError, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 4}, "says alpha=8 for blocks.0.0, but the model has 4"),
        ({"rslora": True}, r"says scaling=2.0 for blocks.0.0, but the model has 4.0; call remove"),
        ({"rank": 2, "alpha": 8}, "says rank=4 for blocks.0.0, but the model has 2"),
        ({"targets": ["0"]}, "unexpected base_model.model.blocks.0.2.lora_A.weight"),
        ({"trainable": []}, "unexpected base_model.model.head"),
    ],
)
def test_an_adapted_model_that_disagrees_is_left_alone(
    options: dict[str, Any], message: str, good: Path
) -> None:
    check_refused(lambda: adapted("stack", **options).model, good, ValueError, message)


def test_a_merged_model_is_not_loaded_into(good: Path) -> None:
    tiny = adapted("stack")
    merge(tiny.model)
    with pytest.raises(ValueError, match=r"is merged into its base; call unmerge\(model\)"):
        load_adapter(tiny.model, good)
    load_adapter(unmerge(tiny.model), good)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
options = st.sampled_from(
    [
        *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
        *("alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"),
        *("init_lora_weights", "bias", "an_option_of_the_future"),
    ]
)


def loads_or_raises_a_typed_error(folder: Path) -> None:
    model = build("stack").model
    before = snapshot(model)
    try:
        load_adapter(model, folder)
    except ValueError as error:
        assert str(folder) in str(error)  # noqa: PT017
        assert same(before, snapshot(model))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(options, json_values, min_size=1, max_size=2))
def test_any_configuration_loads_or_raises_a_typed_error(
    folder: Path, good: Path, changes: dict[str, object]
) -> None:
    (folder / CONFIG).write_bytes((good / CONFIG).read_bytes())
    edit(folder, **changes)
    loads_or_raises_a_typed_error(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_the_weights_loads_or_raises_a_typed_error(
    folder: Path, good: Path, data: st.DataObject
) -> None:
    raw = bytearray((good / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, header - 1))
        raw[position] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    loads_or_raises_a_typed_error(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["F64", "F16", "BF16", "F8_E4M3", "F4", "BOOL", "U64", "I8", "X", "C64"]),
    shape=st.lists(st.integers(0, 2**33), max_size=4),
    start=st.integers(0, 10**6),
)
def test_any_tensor_header_loads_or_raises_a_typed_error(
    folder: Path, good: Path, dtype: str, shape: list[int], start: int
) -> None:
    raw = (good / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header[A] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + 512]}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    loads_or_raises_a_typed_error(folder)


def test_the_folder_may_hold_other_files(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    save_adapter(adapted("stack").model, folder)
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
