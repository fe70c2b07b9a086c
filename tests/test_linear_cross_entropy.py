"""`linear_cross_entropy` is torch's cross entropy of the logits, in a part of the memory."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import LiveBytes, linear_cross_entropy
from dynalora_optim.loss import LazyLogits

# The largest difference, as a share of the largest value. In bf16 a value has 8 bits, and torch
# rounds at other places than we do.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
CLASSES, WIDTH = 61, 12


def softcap(logits: Tensor) -> Tensor:
    return 3 * torch.tanh(logits / 3)


def problem(
    *, shape=(4, 7), dtype=torch.float32, bias=True, masked=0.3, seed=0
) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(WIDTH, CLASSES, bias=bias)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < masked] = -100
    return hidden, head.to(dtype), labels


def whole(hidden: Tensor, head: nn.Module, labels: Tensor, *, transform=None, **options) -> Tensor:
    """The loss over all logits at once, in float32 at least, as transformers computes it."""
    logits = head(hidden)
    logits = transform(logits) if transform else logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), **options)


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> dict[str, Tensor | None]:
    named = {"hidden": hidden, **dict(head.named_parameters())}
    wanted = {name: t for name, t in named.items() if t.requires_grad}
    return dict(
        zip(
            wanted,
            torch.autograd.grad(loss, list(wanted.values()), allow_unused=True),
            strict=True,
        )
    )


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    scale = max(theirs.abs().max().item(), 1e-6) if theirs.numel() else 1.0
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).abs().max().item() <= tolerance * max(scale, 1.0)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(list(TOLERANCES)),
    chunk=st.integers(1, 40),
    bias=st.booleans(),
    masked=st.sampled_from([0.0, 0.4]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    transform=st.sampled_from([None, softcap]),
    trains=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_is_cross_entropy_for_all_shapes_dtypes_chunks_and_masks(
    shape, dtype, chunk, bias, masked, smoothing, reduction, transform, trains, seed
):
    hidden, head, labels = problem(shape=shape, dtype=dtype, bias=bias, masked=masked, seed=seed)
    head.requires_grad_(trains)
    labels.view(-1)[0] = 3  # one row counts; the case of none stands below
    options = {"reduction": reduction, "label_smoothing": smoothing, "transform": transform}
    ours = linear_cross_entropy(hidden, head, labels, chunk=chunk, **options)
    theirs = whole(hidden, head, labels, **options)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(ours, theirs, TOLERANCES[dtype])
    found = gradients(ours, hidden, head)
    for name, gradient in gradients(theirs, hidden, head).items():
        assert found[name].dtype == dtype
        assert_close(found[name], gradient, TOLERANCES[dtype])


def test_low_precision_is_not_summed_in_low_precision():
    """torch 2.13's own chunks are percents off in bf16, and inf in fp16 above 65,504."""
    for dtype in (torch.bfloat16, torch.float16):
        hidden, head, labels = problem(shape=(1, 20_000), dtype=dtype, masked=0.0)
        ours = linear_cross_entropy(hidden, head, labels, reduction="sum", chunk=100)
        theirs = whole(hidden.double(), copy.deepcopy(head).double(), labels, reduction="sum")
        assert theirs > 65_504
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=0)


def test_fp16_gradients_do_not_underflow_before_the_scaler_has_scaled_them():
    hidden, head, labels = problem(shape=(1, 4000), dtype=torch.float32, masked=0.0)
    exact = gradients(whole(hidden, head, labels), hidden, head)
    low = hidden.detach().half().requires_grad_()
    low_head = copy.deepcopy(head).half()
    loss = linear_cross_entropy(low, low_head, labels, chunk=256) * 2.0**16
    for name, gradient in gradients(loss, low, low_head).items():
        expected = exact[name].double() * 2.0**16
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error < 5e-3, name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_that_are_all_ignored_give_a_zero_that_hangs_on_the_graph(reduction):
    hidden, head, labels = problem()
    labels.fill_(-100)
    loss = linear_cross_entropy(hidden, head, labels, reduction=reduction)
    assert loss.item() == 0
    for gradient in gradients(loss, hidden, head).values():
        assert gradient.count_nonzero() == 0


def test_no_rows_at_all_give_a_zero():
    hidden, head, labels = problem(shape=(0, 7))
    loss = linear_cross_entropy(hidden, head, labels)
    assert loss.item() == 0
    assert gradients(loss, hidden, head)["hidden"].shape == hidden.shape


def test_each_row_has_its_loss_and_its_gradient():
    hidden, head, labels = problem()
    with torch.no_grad():
        linear_cross_entropy(hidden, head, labels, reduction="none")  # though the head trains
    head.requires_grad_(False)
    ours = linear_cross_entropy(hidden, head, labels, reduction="none", chunk=5)
    theirs = whole(hidden, head, labels, reduction="none").view(labels.shape)
    torch.testing.assert_close(ours, theirs)
    weights = torch.rand(labels.shape)
    torch.testing.assert_close(
        gradients((ours * weights).sum(), hidden, head),
        gradients((theirs * weights).sum(), hidden, head),
    )


def test_a_second_backward_gives_the_same_and_double_backward_is_refused():
    hidden, head, labels = problem()
    loss = linear_cross_entropy(hidden, head, labels)
    leaves = [hidden, *head.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, [hidden], create_graph=True)
    loss = linear_cross_entropy(hidden, head, labels)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Counted(nn.Linear):
    """A head that counts the forwards in which a graph is recorded."""

    graphs = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.graphs += torch.is_grad_enabled()
        return super().forward(x)


def test_only_needed_gradients_are_formed():
    hidden, head, labels = problem(shape=(4, 16))

    def flops(*, grad: bool = True, **trains: bool) -> int:
        hidden.requires_grad_(trains.get("hidden", False))
        head.weight.requires_grad_(trains.get("weight", False))
        head.bias.requires_grad_(False)
        with LiveBytes() as memory, torch.set_grad_enabled(grad):
            linear_cross_entropy(hidden, head, labels, chunk=8)
        return memory.flops

    product = 2 * 64 * WIDTH * CLASSES
    assert flops() == product
    assert flops(grad=False, hidden=True, weight=True) == product
    assert flops(hidden=True) == 2 * product
    assert flops(weight=True) == 2 * product
    assert flops(hidden=True, weight=True) == 3 * product
    module = Counted(WIDTH, CLASSES)
    with torch.no_grad():
        linear_cross_entropy(hidden, module, labels)
    assert Counted.graphs == 0


def test_it_holds_one_chunk_of_logits():
    classes, rows, chunk = 8192, 512, 32
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(classes, WIDTH)
    labels = torch.randint(0, classes, (rows,))
    one = chunk * classes * 4
    with LiveBytes() as memory:
        linear_cross_entropy(hidden, weight, labels, chunk=chunk).backward()
    assert one < memory.peak < 1.2 * one
    with LiveBytes() as memory:
        F.cross_entropy(F.linear(hidden, weight), labels).backward()
    assert memory.peak > 1.9 * rows / chunk * one


@pytest.mark.parametrize("active", [True, False])
def test_a_head_with_our_adapter(active):
    torch.manual_seed(0)
    hidden, head, labels = problem()
    model = inject(nn.Sequential(head), LoRAConfig(rank=2, alpha=4, targets=["0"]))
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    layer.active = active
    ours = linear_cross_entropy(hidden, layer, labels, chunk=5)
    theirs = whole(hidden, layer, labels)
    torch.testing.assert_close(ours, theirs)
    found, expected = gradients(ours, hidden, layer), gradients(theirs, hidden, layer)
    torch.testing.assert_close(found, expected)
    assert (found["lora_A"] is not None) is active


def test_hooks_of_a_parameter_see_its_whole_gradient_once():
    hidden, linear, labels = problem()
    head = nn.Sequential(linear, nn.Identity())  # no plain linear layer
    seen: list[Tensor] = []
    linear.weight.register_hook(seen.append)
    linear_cross_entropy(hidden, head, labels, chunk=3).backward()
    assert len(seen) == 1
    torch.testing.assert_close(
        seen[0], gradients(whole(hidden, linear, labels), hidden, linear)["weight"]
    )


def test_a_weight_that_is_not_a_leaf_gets_its_gradient():
    hidden, _, labels = problem(bias=False)
    base = torch.randn(CLASSES, WIDTH, requires_grad=True)
    ours = linear_cross_entropy(hidden, base * 2, labels, chunk=5)
    theirs = F.cross_entropy(F.linear(hidden, base * 2).flatten(0, 1), labels.flatten())
    (found,), (expected,) = torch.autograd.grad(ours, [base]), torch.autograd.grad(theirs, [base])
    torch.testing.assert_close(found, expected)


def test_autocast_rounds_as_without_chunks():
    hidden, head, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, head, labels, chunk=5)
        theirs = whole(hidden, head, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    found, expected = gradients(ours, hidden, head), gradients(theirs, hidden, head)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert_close(found[name], gradient, TOLERANCES[torch.bfloat16])


def test_the_meta_device_counts_the_same_bytes():
    def peak(device: str) -> int:
        hidden = torch.zeros(64, WIDTH, requires_grad=True, device=device)
        weight = torch.zeros(512, WIDTH, requires_grad=True, device=device)
        labels = torch.zeros(64, dtype=torch.int64, device=device)
        with LiveBytes(meta=True) as memory:
            linear_cross_entropy(hidden, weight, labels, chunk=16).backward()
        return memory.peak

    assert peak("meta") == pytest.approx(peak("cpu"), rel=0.02)


def test_a_checkpoint_may_repeat_it():
    hidden, head, labels = problem()
    expected = gradients(whole(hidden, head, labels), hidden, head)
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(
            lambda x: linear_cross_entropy(x, head, labels, chunk=5),
            hidden * 1,
            use_reentrant=reentrant,
        )
        head.zero_grad()
        hidden.grad = None
        loss.backward()
        torch.testing.assert_close(hidden.grad, expected["hidden"])
        torch.testing.assert_close(head.weight.grad, expected["weight"])


BAD = {
    "chunk": (ValueError, {"chunk": 0}),
    "reduction": (ValueError, {"reduction": "max"}),
    "label_smoothing": (ValueError, {"label_smoothing": 1.5}),
    "reduction='none'": (ValueError, {"reduction": "none"}),
    "bias": (ValueError, {"bias": torch.zeros(CLASSES)}),
    "head=str": (TypeError, {"head": "lm_head"}),
    "head of shape": (ValueError, {"head": torch.zeros(3)}),
    "hidden=tensor of torch.int64": (TypeError, {"hidden": torch.zeros(4, 7, dtype=torch.int64)}),
    "labels=tensor of torch.int32": (TypeError, {"labels": torch.zeros(4, 7, dtype=torch.int32)}),
    "labels of shape": (ValueError, {"labels": torch.zeros(7, dtype=torch.int64)}),
    f"labels has {CLASSES}": (ValueError, {"labels": torch.full((4, 7), CLASSES)}),
    "labels has -1.*pass labels from 0": (ValueError, {"labels": torch.full((4, 7), -1)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    kind, changed = BAD[message]
    hidden, head, labels = problem()
    arguments = {"hidden": hidden, "head": head, "labels": labels, **changed}
    with pytest.raises(kind, match=message) as caught:
        linear_cross_entropy(**arguments)
    assert ";" in str(caught.value), "it says what to do"


# --- LazyLogits


def lazy(hidden: Tensor, head: nn.Module) -> tuple[LazyLogits, list[str]]:
    asked: list[str] = []
    return LazyLogits(hidden, head, classes=CLASSES, told=asked.append), asked


CHUNKED = {
    "cross entropy": lambda z, y: F.cross_entropy(z.view(-1, CLASSES), y.view(-1)),
    "shifted, in float32": lambda z, y: F.cross_entropy(
        z.float()[..., :-1, :].contiguous().view(-1, CLASSES), y[..., 1:].reshape(-1)
    ),
    "soft cap": lambda z, y: F.cross_entropy((3 * torch.tanh(z / 3)).view(-1, CLASSES), y.view(-1)),
    "a module": lambda z, y: nn.CrossEntropyLoss()(z.reshape(-1, z.size(-1)), y.flatten()),
    "argmax": lambda z, y: z[:, 1:].argmax(dim=-1),
    "norms": lambda z, y: torch.linalg.vector_norm(z, 2, dim=-1),
    "shape": lambda z, y: torch.tensor([*z.shape, z.size(1), z.dim(), z.ndim, len(z)]),
}
COMPUTED = {
    "softmax": lambda z, y: torch.softmax(z, -1),
    "a part of the classes": lambda z, y: z[..., :5],
    "a class": lambda z, y: z[0, 1, 2],
    "a mask of rows": lambda z, y: z[y > 10],
    "sum": lambda z, y: z.sum(),
    "scaled by a tensor": lambda z, y: z * torch.tensor(2.0),
    "class weights": lambda z, y: F.cross_entropy(
        z.view(-1, CLASSES), y.view(-1), weight=torch.ones(CLASSES)
    ),
    "changed in place": lambda z, y: (z.__setitem__((..., slice(3)), -9.0), z.sum())[1],
    "operators": lambda z, y: (z - 1) * 2 + z / torch.tensor(3.0) - (1 - z) ** 2 + abs(-z),
    "compared": lambda z, y: (z > 0).float() + (z <= 0.5).float(),
    "added": lambda z, y: torch.add(torch.ones(CLASSES), z),
}


@pytest.mark.parametrize("name", [*CHUNKED, *COMPUTED])
def test_what_is_done_with_lazy_logits_is_done_with_logits(name):
    hidden, head, labels = problem()
    labels.clamp_(min=0)
    operation = {**CHUNKED, **COMPUTED}[name]
    logits, asked = lazy(hidden, head)
    grad_enabled = name != "norms"
    with torch.set_grad_enabled(grad_enabled):
        ours, theirs = operation(logits, labels), operation(head(hidden), labels)
    assert bool(asked) is (name in COMPUTED)
    torch.testing.assert_close(ours, theirs)
    if theirs.requires_grad:
        torch.testing.assert_close(
            gradients(ours.sum(), hidden, head), gradients(theirs.sum(), hidden, head)
        )


def test_logits_asked_for_without_gradients_have_the_graph_of_the_forward():
    hidden, head, _ = problem()
    logits, _ = lazy(hidden, head)
    with torch.no_grad():
        assert logits.sum().grad_fn is None
    assert logits.requires_grad
    assert logits.tensor().requires_grad


def test_a_part_is_not_changed_in_place():
    hidden, head, _ = problem()
    logits, _ = lazy(hidden, head)
    with pytest.raises(RuntimeError, match="call tensor"):
        logits[:, 1:][0] = 0
    with pytest.raises(RuntimeError, match="call tensor"):
        logits[:, 1:].fill_(0)
