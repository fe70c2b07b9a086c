"""Adapters on every architecture of transformers: our files mean the same to peft, or we say so."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from architectures import AUTO, batch, build, names
from torch import Tensor, nn

from dynalora_adapters import LoRAConfig, inject, load_adapter, save_adapter
from dynalora_adapters._layers import AdapterLinear

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-5
TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"


def targets_in(model: nn.Module, targets: str) -> str | list[str]:
    """Return "all-linear", or those of the seven usual names that the model has."""
    if targets == "all-linear":
        return targets
    leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return [name for name in SEVEN if name in leaves]


def outcome(auto: str, kind: str, targets: str) -> str:
    """Adapt, train twice, save and load in ours and in peft. Return in a few words what came."""
    base = build(auto, kind)
    chosen = targets_in(base, targets)
    if not chosen:
        return "no such names"
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dynalora_adapters").addHandler(handler)
    try:
        return _outcome(base, chosen, said)
    finally:
        logging.getLogger("dynalora_adapters").removeHandler(handler)


def _outcome(base: nn.Module, chosen: str | list[str], said: list[str]) -> str:
    inputs = batch(base)
    model = copy.deepcopy(base)
    try:
        inject(model, LoRAConfig(rank=2, alpha=4, targets=chosen))
    except ValueError as error:
        return f"refused: {error}"
    _train(model, inputs)
    wanted = _first(model, inputs)
    said.clear()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adapter(model, folder)
        ours = load_adapter(copy.deepcopy(base), folder)
        if _far(_first(ours, inputs), wanted):
            return "DIFFERS in ours"
        trouble = _in_peft(copy.deepcopy(base), folder, model, inputs, wanted)
    if not trouble:
        return "equal" + (" although warned" if said else "")
    return f"warned: {said[0]}" if said else f"DIFFERS in peft: {trouble}"


def _train(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=3e-2)
    for _ in range(2):
        loss = _first(model, inputs, grad=True).float().square().mean()
        if not loss.requires_grad:  # the names are in a part that the batch does not reach
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # what the batch did not reach has moved as well
        generator = torch.Generator().manual_seed(1)
        for param in params:
            param.add_(0.02 * torch.randn(param.shape, generator=generator))


def _first(model: nn.Module, inputs: dict[str, Tensor], *, grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        out = model(**inputs)
    found = out.get("logits") if hasattr(out, "get") else None
    return found if isinstance(found, Tensor) else next(v for v in _tensors(out) if v.dim() > 1)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if hasattr(value, "values") else value
    return [t for v in items for t in _tensors(v)] if isinstance(items, (list, tuple)) or hasattr(
        value, "values") else []  # fmt: skip


def _far(one: Tensor, other: Tensor) -> bool:
    scale = max(1.0, float(other.nan_to_num(posinf=0, neginf=0).abs().max()))
    near = torch.isclose(one, other, atol=TOLERANCE * scale, rtol=0, equal_nan=True)
    return not bool(near.all())


def _in_peft(
    base: nn.Module, folder: Path, ours: nn.Module, inputs: dict[str, Tensor], wanted: Tensor
) -> str:
    """Return what differs when peft loads the folder, or nothing."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        except Exception as error:  # whatever peft raises
            return f"{type(error).__name__}: {error}"
    mine = {
        f"base_model.model.{name}.{key}": param
        for name, layer in ours.named_modules()
        if isinstance(layer, AdapterLinear)
        for key, param in [("lora_A", layer.lora_A), ("lora_B", layer.lora_B)]
    }
    found = {n.replace(".default.weight", ""): p for n, p in theirs.named_parameters()
             if ".lora_" in n}  # fmt: skip
    if mine.keys() != found.keys():
        return f"other modules: {sorted(mine.keys() ^ found.keys())[:3]}"
    if not all(torch.equal(mine[key], found[key]) for key in mine):
        return "other weights"
    try:
        return "other logits" if _far(_first(theirs, inputs), wanted) else ""
    except TypeError as error:
        return f"TypeError: {error}"


ALL = [(auto, kind) for auto in AUTO for kind in names(auto)]


def case(number: int, auto: str, kind: str) -> Any:
    """Every tenth architecture is tried in the default suite, all others in the slow one."""
    marks = [] if number % 10 == 0 else [pytest.mark.slow]
    return pytest.param(auto, kind, marks=marks, id=f"{auto.removeprefix('AutoModelFor')}-{kind}")


@pytest.mark.parametrize(("auto", "kind"), [case(i, *one) for i, one in enumerate(ALL)])
def test_nothing_differs_in_silence(auto: str, kind: str) -> None:
    try:
        said = {targets: outcome(auto, kind, targets) for targets in ("all-linear", "seven")}
    except LookupError as error:
        pytest.skip(str(error))
    assert not any("DIFFERS" in one for one in said.values()), said


def rows() -> list[str]:
    """Return the lines of the table in docs/architectures.md."""
    lines = []
    for auto, kind in ALL:
        try:
            found = [_short(outcome(auto, kind, targets)) for targets in ("all-linear", "seven")]
        except LookupError:
            continue
        lines.append(f"| {kind} | {auto.removeprefix('AutoModelFor')} | {' | '.join(found)} |")
    return lines


def _short(said: str) -> str:
    words = said.partition(":")[0]
    return {"no such names": "-", "equal although warned": "equal"}.get(words, words)


def test_the_table_in_the_docs_names_enough_and_nothing_that_differs() -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert len({kind for kind, *_ in cells}) >= 150
    assert {one for _, _, *found in cells for one in found} <= {"equal", "warned", "refused", "-"}


if __name__ == "__main__":
    head, mark, _ = TABLE.read_text(encoding="utf-8").partition("|---|---|---|---|\n")
    TABLE.write_text(head + mark + "\n".join(rows()) + "\n", encoding="utf-8")
