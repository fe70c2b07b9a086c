"""Adapters by peft's own configurations: our files mean the same to peft, and its files to us.

Every tenth configuration is tried in the default suite. All of them:
``tox run -e slow -- tests/test_peft_matrix.py``. ``python tests/test_peft_matrix.py`` makes the
tables in docs/peft-configurations.md.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_matrix import Case, build, cases, named, obstacle
from tiny_models import randomize_trainable
from torch import Tensor, nn

from dynalora_adapters import LoRAConfig, inject, load_adapter, save_adapter
from dynalora_optim import DynamicAllocationOptimizer

pytest.importorskip("transformers")
peft = pytest.importorskip("peft", minversion="0.21")

TOLERANCE = 1e-5
TABLE = Path(__file__).parent.parent / "docs" / "peft-configurations.md"
REMEDY = (
    "load it with peft.PeftModel.from_pretrained: the optimizer drives peft's layers with the same "
    "line"
)
NO_LAYERS = "load it with peft (prompts are no layers"


@functools.lru_cache(maxsize=2)
def built(model: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model and its input once for the cases that follow each other."""
    return build(model)


def by_peft(case: Case) -> nn.Module:
    """Adapt a model by peft and move all that trains."""
    base = copy.deepcopy(built(case.model)[0])
    torch.manual_seed(0)
    options = named(base, case.options)
    theirs = peft.get_peft_model(base, getattr(peft, case.kind)(**options)).eval()
    randomize_trainable(theirs)
    return theirs


def outcome(case: Case) -> str:
    """Return "equal" if both read what the other wrote, "refused: why", or what differs."""
    base, inputs = built(case.model)
    theirs = by_peft(case)
    wanted = logits(theirs, inputs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        try:
            ours = load_adapter(copy.deepcopy(base), folder).eval()
        except (TypeError, ValueError) as error:
            return f"refused: {error}"
    if far(logits(ours, inputs), wanted):
        return "DIFFERS in ours"
    if not far(wanted, logits(base, inputs)):
        return "DIFFERS in nothing from the base: the case shows nothing"
    randomize_trainable(ours, seed=2)
    wanted = logits(ours, inputs)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    return "DIFFERS in peft" if far(logits(theirs, inputs), wanted) else "equal"


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the first output of a model."""
    with torch.no_grad():
        torch.manual_seed(0)
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0]


def far(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by more than rounding."""
    scale = TOLERANCE * max(1.0, float(other.abs().max()))
    return one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=scale)


def drive(case: Case) -> None:
    """Train a model that peft has adapted by one step of our optimizer."""
    theirs = by_peft(case).train()
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1),
        theirs,
        active=1,
    )
    out = theirs(**built(case.model)[1])
    (out if isinstance(out, Tensor) else out[0]).square().mean().backward()
    optimizer.step()
    optimizer.close()


ALL = list(cases())


def case_of(number: int, case: Case) -> Any:
    """Every tenth configuration is tried in the default suite, all others in the slow one."""
    marks = [] if number % 10 == 1 else [pytest.mark.slow]
    return pytest.param(case, marks=marks, id=str(case).replace("::", "."))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case_of(number, case) for number, case in enumerate(ALL)])
def test_both_read_what_the_other_wrote_or_ours_says_who_can(case: Case) -> None:
    said = outcome(case)
    if obstacle(case) is None:
        assert said == "equal"
    elif "num_virtual_tokens" in case.options:
        assert said.startswith("refused")
        assert NO_LAYERS in said
    else:
        assert said.startswith("refused")
        assert REMEDY in said
        drive(case)


class Nested(nn.Module):
    """A head that holds a module of the same name, as peft compares names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.classifier = nn.Sequential(OrderedDict(classifier=nn.Linear(4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def test_a_module_to_save_inside_another_one_is_what_peft_cannot_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = Nested()
    config = LoRAConfig(rank=2, alpha=4, targets=["body"], trainable=["classifier"])
    ours = inject(copy.deepcopy(base), config)
    randomize_trainable(ours)
    save_adapter(ours, tmp_path / "ours")
    assert "also matches classifier.classifier, inside of another match" in caplog.text
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    x = torch.randn(3, 4)
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "ours")(x), ours(x))
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["classifier"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="classifier, inside of another match"):
        load_adapter(base, tmp_path / "theirs")


def tables() -> str:
    """Return the tables in docs/peft-configurations.md. This tries all configurations."""
    said = {str(case): outcome(case).partition(":")[0] for case in ALL}
    assert {*said.values()} == {"equal", "refused"}, said
    groups = {
        case.group: Counter(said[str(c)] for c in ALL if c.group == case.group) for case in ALL
    }
    reasons = Counter(obstacle(case) for case in ALL if said[str(case)] == "refused")
    lines = ["| peft's tests of | equal | refused |", "|---|---|---|"]
    lines += [f"| {name} | {got['equal']} | {got['refused']} |" for name, got in groups.items()]
    total = Counter(said.values())
    lines += [f"| all | {total['equal']} | {total['refused']} |", ""]
    lines += ["| refused because of | configurations |", "|---|---|"]
    lines += [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def test_the_tables_in_the_docs_are_of_these_configurations() -> None:
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text("utf-8").splitlines()]
    found = {
        name: [*map(int, numbers)] for name, *numbers in rows if numbers and numbers[0].isdigit()
    }
    expected = Counter(obstacle(case) for case in ALL)
    assert found["all"] == [expected.pop(None), expected.total()]
    assert {name: found[name][0] for name in expected} == expected


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    head, mark, _ = TABLE.read_text(encoding="utf-8").partition("<!-- made by the test -->\n\n")
    TABLE.write_text(head + mark + tables(), encoding="utf-8")
