"""A head of the user's own class is tried before its loss comes in chunks: it must go by rows."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformers")

from causal_models import VOCABULARY, batch, build

from dynalora_optim import linear_cross_entropy
from dynalora_optim.integrations.transformers import chunk_loss
from dynalora_optim.loss import LazyLogits


class Own(nn.Linear):
    """A linear layer that does something with its rows first."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.places = nn.Parameter(torch.randn(50, width))


class Normed(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.flatten(0, -2)).view_as(x))


class Attending(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.scaled_dot_product_attention(x, x, x))


class Placed(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.places[: x.shape[-2]])


class InThree(Own):
    def forward(self, x: Tensor) -> Tensor:
        _, rows, width = x.shape
        return super().forward(x.reshape(-1, rows, width))


class Dropped(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


class Scaled(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:])) / 3


REASONS = {
    Normed: "maps several rows together",
    Attending: "maps several rows together",
    Placed: "maps a row by its place among others",
    InThree: "cannot be called with rows, (rows, features): not enough values to unpack",
}


def rows(kind: type[Own], dtype: torch.dtype = torch.float32) -> tuple[Own, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(12, 8, dtype=dtype, requires_grad=True)
    return kind(8, 7).to(dtype), hidden, torch.randint(0, 7, (12,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", REASONS)
def test_a_head_that_does_not_go_by_rows_is_refused_before_anything_changes(kind, dtype):
    head, hidden, labels = rows(kind, dtype)
    before, random = copy.deepcopy(head.state_dict()), torch.get_rng_state()
    modes = [part.training for part in head.modules()]
    for factor in (torch.nan, 1):  # what a batch holds does not matter
        with pytest.raises(ValueError, match="maps each row by itself; use") as caught:
            linear_cross_entropy(hidden * factor, head, labels, chunk=5)
        assert f"head={kind.__name__} {REASONS[kind]}" in str(caught.value)
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in head.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [Dropped, Scaled])
def test_a_head_that_goes_by_rows_has_the_loss_of_all_logits(kind, dtype):
    head, hidden, labels = rows(kind, dtype)
    torch.manual_seed(1)
    ours = linear_cross_entropy(hidden, head, labels, chunk=12)
    torch.manual_seed(1)
    theirs = F.cross_entropy(head(hidden).to(ours.dtype), labels)
    torch.testing.assert_close(ours, theirs)


def test_it_is_tried_once_for_each_mode_and_kind_of_its_parts():
    called = 0

    class Counted(Own):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal called
            called += 1
            return super().forward(self.norm(x) if isinstance(self.norm, nn.LayerNorm) else x)

    def chunks() -> int:
        nonlocal called
        called = 0
        linear_cross_entropy(hidden, head, labels, chunk=12)
        return called

    head, hidden, labels = rows(Counted)
    assert [chunks(), chunks()] == [5, 1]
    head.eval()
    assert [chunks(), chunks()] == [5, 1]
    head.norm = nn.LayerNorm(8)
    assert [chunks(), chunks()] == [5, 1]


@pytest.mark.parametrize("kind", REASONS)
def test_a_model_with_such_a_head_keeps_its_own_way(kind, caplog):
    model = build()
    model.lm_head = kind(model.config.hidden_size, VOCABULARY)

    def found() -> tuple[Any, list[Tensor]]:
        torch.manual_seed(0)
        output = model(**batch())
        parameters = [p for p in model.parameters() if p.requires_grad]
        return output, list(torch.autograd.grad(output.loss, parameters, allow_unused=True))

    theirs = found()
    with chunk_loss(model, chunk=4), caplog.at_level(logging.WARNING):
        ours = [found() for _ in range(3)][-1]
    assert not isinstance(ours[0].logits, LazyLogits)
    torch.testing.assert_close(ours[0].loss, theirs[0].loss)
    torch.testing.assert_close(ours[1], theirs[1])
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"the head, {kind.__name__}, {REASONS[kind]}" in line
