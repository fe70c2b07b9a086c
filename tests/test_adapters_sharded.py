"""Models that are not wholly here: sharded over processes, offloaded, or without numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from tiny_models import Stack, randomize_trainable, same, snapshot
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dynalora_adapters import (
    LoRAConfig,
    VeRAConfig,
    active_adapter,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
)
from dynalora_adapters._config import AdapterConfig

WEIGHTS = "adapter_model.safetensors"
KINDS = {
    "lora": LoRAConfig(rank=3, alpha=4, targets="all-linear", trainable=["head"]),
    "vera": VeRAConfig(rank=3, targets="all-linear", trainable=["head"]),
}


def stack(config: AdapterConfig | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Stack()
    if config is not None:
        inject(model, config)
        randomize_trainable(model, seed + 1)
    return model


def shard(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def message(act: Callable[[], object]) -> str:
    try:
        act()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def save_and_load(kind: str, folder: Path) -> dict[str, Any]:
    """Save a sharded model, also in the middle of a step; load into another one."""
    model = shard(stack(KINDS[kind]))
    save_adapter(model, folder / kind)
    written = (folder / kind / WEIGHTS).exists()  # on every rank, when the call returns
    model(torch.randn(2, 32)).logits.sum()  # leaves the root's weights whole
    save_adapter(model, folder / f"{kind}-in-step")
    other = shard(stack(KINDS[kind], seed=5))
    load_adapter(other, folder / kind)
    other(torch.randn(2, 32)).logits.sum().backward()  # it still trains
    return {"written": written, "same": _equal(whole(model), whole(other)), "whole": whole(model)}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether what an adapter's file holds agrees; the bases are of different seeds."""
    keys = [key for key in one if "base_layer" not in key]
    return all(torch.equal(one[key], other[key]) for key in keys)


def refusals(folder: Path) -> dict[str, str]:
    config = KINDS["lora"]
    model = shard(stack(config))
    mesh = init_device_mesh("cpu", (2,))
    split = stack()
    for block in split.blocks:  # one by one: torch 2.8 does not find them by their paths
        parallelize_module(block[0], mesh, ColwiseParallel())
    blocked = folder / "a file"
    if dist.get_rank() == 0:
        blocked.write_text("")
    dist.barrier()
    return {
        "inject": message(lambda: inject(shard(stack()), config)),
        "tensor parallel": message(lambda: inject(split, config)),
        "load bare": message(lambda: load_adapter(shard(stack()), folder / "lora")),
        "merge": message(lambda: merge(model)),
        "disk": message(lambda: save_adapter(model, blocked / "below")),
    }


def several(folder: Path) -> dict[str, str]:
    """What is said about the adapters of a sharded model, of which the first one is active."""
    model = stack()
    for name, config in KINDS.items():
        inject(model, config, name=name)
    shard(model)
    save_adapter(model, folder / "waiting", name="vera")
    return {
        "switch": message(lambda: set_adapter(model, "vera")),
        "plain": message(lambda: set_adapter(model, None)),
        "add": message(lambda: inject(model, KINDS["lora"], name="third")),
        "active": str(active_adapter(model)),
    }


def first_version(folder: Path) -> dict[str, str]:
    """What is said about a model in FSDP1's wrapper, as a whole or in parts."""
    config = KINDS["lora"]
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(stack(config), **options)
    parts = stack(config)
    parts.blocks[0] = FullyShardedDataParallel(parts.blocks[0], **options)
    return {
        "save": message(lambda: save_adapter(model, folder / "fsdp1")),
        "save parts": message(lambda: save_adapter(parts, folder / "fsdp1")),
        "load": message(lambda: load_adapter(model, folder / "lora")),
        "merge": message(lambda: merge(parts)),
        "remove": message(lambda: remove(model)),
        "inject": message(lambda: inject(FullyShardedDataParallel(stack(), **options), config)),
    }


def everything(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {kind: save_and_load(kind, folder) for kind in KINDS}
    found["refused"] = refusals(folder)
    found["several"] = several(folder)
    found["first"] = first_version(folder)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    found = on_ranks(everything, folder)
    assert not any(isinstance(one, Exception) for one in found), found
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_is_saved_once_and_whole(
    kind: str, ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    assert all(rank[kind]["written"] and rank[kind]["same"] for rank in ranks)
    model = stack(KINDS[kind])
    save_adapter(model, tmp_path)
    for name in (WEIGHTS, "adapter_config.json"):
        expected = (tmp_path / name).read_bytes()
        assert (folder / kind / name).read_bytes() == expected
        assert (folder / f"{kind}-in-step" / name).read_bytes() == expected
    back = load_adapter(stack(), folder / kind)
    x = torch.randn(4, 32)
    assert torch.equal(back(x).logits, model(x).logits)


@pytest.mark.distributed
def test_what_cannot_be_done_with_a_sharded_model_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = rank["refused"]
        for case in ("inject", "tensor parallel", "load bare"):
            assert "call inject or load_adapter first, then fully_shard(model)" in said[case]
        assert "is sharded over processes (save the adapter and merge it" in said["merge"]
        assert said["disk"].startswith(("OSError", "NotADirectoryError")), "on every rank"


@pytest.mark.distributed
def test_a_sharded_model_keeps_its_active_adapter(
    ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    for rank in ranks:
        said = rank["several"]
        assert "switch first, then fully_shard(model)" in said["switch"]
        assert "switch first, then fully_shard(model)" in said["plain"]
        assert "call inject or load_adapter first, then fully_shard(model)" in said["add"]
        assert said["active"] == "lora"
    torch.manual_seed(0)
    save_adapter(inject(Stack(), KINDS["vera"]), tmp_path)
    assert (folder / "waiting" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.distributed
def test_the_first_version_of_fsdp_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for said in rank["first"].values():
            assert "FullyShardedDataParallel" in said
            assert "use FSDP2, fully_shard(model), instead" in said


def half_on_meta() -> nn.Module:
    model = stack()
    model.blocks[1].to("meta")
    return model


def offloaded() -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(stack(), execution_device="cpu")


def on_disk(folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    places = {"blocks.0": "cpu", "blocks.1": "disk", "head": "cpu"}
    return accelerate.dispatch_model(stack(), places, offload_dir=folder, main_device="cpu")


@pytest.mark.parametrize("make", ["meta", "cpu", "disk"])
@pytest.mark.parametrize("act", ["inject", "load"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_not_in_memory_is_refused(
    make: str, act: str, kind: str, tmp_path: Path
) -> None:
    save_adapter(stack(KINDS[kind]), tmp_path / "adapter")
    model = {"meta": half_on_meta, "cpu": offloaded, "disk": lambda: on_disk(tmp_path)}[make]()
    names = {name: id(module) for name, module in model.named_modules()}
    free = {name: param.requires_grad for name, param in model.named_parameters()}
    acts = {
        "inject": lambda: inject(model, KINDS[kind]),
        "load": lambda: load_adapter(model, tmp_path / "adapter"),
    }
    with pytest.raises(ValueError, match=r"not in memory .*load the model without offloading"):
        acts[act]()
    assert names == {name: id(module) for name, module in model.named_modules()}
    assert free == {name: param.requires_grad for name, param in model.named_parameters()}


def test_a_model_wholly_on_meta_is_adapted_but_not_written_or_read(tmp_path: Path) -> None:
    save_adapter(stack(KINDS["lora"]), tmp_path)
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(ValueError, match="on the meta device, without numbers"):
        load_adapter(model, tmp_path)
    inject(model, KINDS["lora"])
    with pytest.raises(ValueError, match="on the meta device, without numbers"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="on the meta device, without numbers"):
        load_adapter(model, tmp_path)


def test_an_adapted_model_that_was_offloaded_is_not_saved(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(stack(KINDS["lora"]), execution_device="cpu")
    with pytest.raises(ValueError, match="on the meta device, without numbers"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="on the meta device, without numbers"):
        merge(model)


def test_a_whole_model_is_adapted_as_before() -> None:
    model = stack()
    before = snapshot(copy.deepcopy(model))
    remove(inject(model, KINDS["lora"]))
    assert before["requires_grad"] == snapshot(model)["requires_grad"]
    assert same({**before, "modules": 0, "identity": 0}, {**snapshot(model), "modules": 0,
                                                          "identity": 0})  # fmt: skip
