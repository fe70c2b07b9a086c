"""`chunk_loss`: a causal model's own loss and gradients, in training, without all logits."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from causal_models import (  # noqa: E402
    CONFIGS,
    LENGTH,
    ROWS,
    VOCABULARY,
    assert_same,
    batch,
    build,
    step,
)

from dynalora_adapters import LoRAConfig, inject  # noqa: E402
from dynalora_optim import (  # noqa: E402
    Blocks,
    Budget,
    DynamicAllocationOptimizer,
    ForwardNorm,
    LiveBytes,
    blocks_on_budget,
    estimate_memory,
)
from dynalora_optim.integrations.transformers import chunk_loss  # noqa: E402
from dynalora_optim.loss import LazyLogits  # noqa: E402

CHUNK = 4
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def in_float64(logits, labels, vocab_size, num_items_in_batch=None, **_) -> Tensor:
    """transformers' loss without its rounding to float32."""
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
    total = F.cross_entropy(logits.view(-1, vocab_size), shifted, reduction="sum")
    return total / (num_items_in_batch or (shifted != -100).sum())


def same_chunked(model: Any, inputs: dict[str, Any] | None = None, tolerance: float = 1e-6) -> None:
    """The model's step in chunks is its step without, and was in chunks."""
    inputs = inputs or batch()
    theirs = step(model, inputs)
    with chunk_loss(model, chunk=CHUNK):
        assert_same(step(model, inputs), theirs, tolerance)
        assert isinstance(model(**inputs).logits, LazyLogits)


@pytest.fixture
def log(caplog):
    """What chunk_loss has said."""
    caplog.set_level(logging.WARNING, logger="dynalora_optim")
    return lambda: [r.getMessage() for r in caplog.records if "chunk_loss" in r.getMessage()]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_models_own(name, tied, dtype, log):
    model = build(name, tied=tied, dtype=dtype)
    for items in (None, 40, torch.tensor(40)):
        inputs = batch(**({} if items is None else {"num_items_in_batch": items}))
        if dtype == torch.float64:
            model.loss_function = in_float64
        theirs = step(model, inputs)
        vars(model).pop("_loss_function", None)
        with chunk_loss(model, chunk=CHUNK):
            assert_same(step(model, inputs), theirs, TOLERANCES[dtype])
            assert isinstance(model(**inputs).logits, LazyLogits)
    assert log() == []


@pytest.mark.parametrize(
    "inputs",
    ["positional", "shift_labels", "to keep", "list to keep", "tuple", "2d mask", "hidden states"],
)
def test_every_way_to_call_it(inputs, log):
    model = build()
    data = batch()
    ids, labels = data["input_ids"], data["labels"]
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    places = torch.tensor([1, 6, 7])
    calls = {
        "positional": lambda: model(ids, None, None, None, None, labels).loss,
        "shift_labels": lambda: model(ids, labels=labels, shift_labels=shifted).loss,
        "to keep": lambda: model(ids, labels=labels[:, -5:], logits_to_keep=5).loss,
        "list to keep": lambda: (
            model(ids, labels=labels[:, places], logits_to_keep=places).loss  # not neighbours
        ),
        "tuple": lambda: model(ids, labels=labels, return_dict=False)[0],
        "2d mask": lambda: model(ids, labels=labels, attention_mask=torch.ones_like(ids)).loss,
        "hidden states": lambda: model(ids, labels=labels, output_hidden_states=True).hidden_states[
            1
        ],
    }
    expected = calls[inputs]()
    with chunk_loss(model, chunk=CHUNK):
        torch.testing.assert_close(calls[inputs](), expected, rtol=1e-6, atol=0)
    assert log() == []


SEQ2SEQ: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "scaled states": (  # the decoder's states are scaled before the head
        "T5Config",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
        },
        [],
    ),
    "bias of the logits": (
        "BartConfig",
        {
            **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0},
            **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
        },
        ["__add__"],
    ),
}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoders_with_a_decoder(name, log):
    kind, options, asked = SEQ2SEQ[name]
    tokens = {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**tokens, **options)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).train()
    if "final_logits_bias" in dict(model.named_buffers()):
        model.final_logits_bias.normal_()
    theirs = step(model, batch())
    with chunk_loss(model, chunk=CHUNK):
        assert_same(step(model, batch()), theirs, 1e-6)
    assert len(log()) == len(asked)
    assert all(name in line for name, line in zip(asked, log(), strict=True))


def test_a_micro_batch_without_labels_to_learn_gives_zero():
    model = build()
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert step(model, inputs)[0].isnan(), "what transformers gives"
    with chunk_loss(model):
        loss, gradients = step(model, inputs)
    assert loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values())


BAD_LABELS = {
    "labels has 97, but the head has 97 classes; pass labels from 0 to 96": VOCABULARY,
    "labels has -1, but": -1,
    r"labels=tensor of torch.int32.*; pass labels.long\(\)": torch.zeros(ROWS, LENGTH).int(),
    r"labels=tensor of torch.bool.*; pass labels.long\(\)": torch.ones(ROWS, LENGTH).bool(),
    r"labels of shape \(30,\).*; pass labels of shape \(33,\)": torch.ones(ROWS, 10).long(),
}


@pytest.mark.parametrize("message", BAD_LABELS)
def test_labels_that_make_no_sense_are_refused_by_name(message, log):
    model, labels = build(), BAD_LABELS[message]
    if isinstance(labels, int):
        labels = torch.full((ROWS, LENGTH), labels)
    with chunk_loss(model), pytest.raises((TypeError, ValueError), match=message):
        model(**batch(labels=labels))
    assert log() == []


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_is_padded_afterwards(tied, log):
    model = build(tied=tied)
    with chunk_loss(model):
        model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=64)
        assert model(**batch()).logits.shape[-1] == 128
    same_chunked(model)
    assert log() == []


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16])
def test_a_head_of_another_dtype_than_the_model_under_autocast(head, log):
    model = build(dtype=torch.bfloat16 if head == torch.float32 else torch.float32)
    model.lm_head.to(head)
    with torch.autocast("cpu", torch.bfloat16):
        same_chunked(model, tolerance=TOLERANCES[torch.bfloat16])
    assert log() == []


def test_generation_within_training():
    model, ids = build(), batch()["input_ids"]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with chunk_loss(model):
        model(**batch()).loss.backward()
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        assert isinstance(model(**batch()).logits, LazyLogits)


def test_label_smoothing():
    model = build()
    inputs = batch()
    logits = model(**inputs).logits[:, :-1].reshape(-1, VOCABULARY)
    labels = inputs["labels"][:, 1:].reshape(-1)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    with chunk_loss(model, label_smoothing=0.1, chunk=CHUNK):
        torch.testing.assert_close(model(**inputs).loss, expected)


def test_evaluation_and_generation_are_unchanged():
    model = build().eval()
    inputs = batch()
    ids = inputs["input_ids"]
    expected = model(**inputs), model.generate(ids, max_new_tokens=4, do_sample=False)
    with chunk_loss(model):
        output = model(**inputs)
        assert type(output.logits) is Tensor
        assert torch.equal(output.logits, expected[0].logits)
        assert torch.equal(output.loss, expected[0].loss)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, expected[1])
        model.train()
        assert type(model(input_ids=ids).logits) is Tensor


def test_logits_are_computed_when_asked_for_and_carry_gradients(log):
    model = build()
    inputs = batch()
    expected = model(**inputs).logits
    with chunk_loss(model):
        logits = model(**inputs).logits
    assert logits.shape == expected.shape
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    with torch.no_grad():
        assert torch.equal(logits[:1].softmax(-1), expected[:1].softmax(-1))
    assert log() == []
    assert torch.equal(logits.tensor(), expected)
    (found,) = torch.autograd.grad(
        torch.log_softmax(logits, -1).square().sum(), model.lm_head.weight
    )
    (theirs,) = torch.autograd.grad(expected.log_softmax(-1).square().sum(), model.lm_head.weight)
    torch.testing.assert_close(found, theirs)
    (line,) = log()
    assert "code outside the model uses them, and a Budget does not count that" in line


def test_logits_of_weights_that_have_changed_are_refused():
    model, inputs = build(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with chunk_loss(model):
        early, late = model(**inputs), model(**inputs)
        expected = early.logits.tensor().detach().clone()
        late.loss.backward()
        optimizer.step()
        for use in (torch.argmax, torch.softmax):
            with pytest.raises(RuntimeError, match=r"has changed.*; ask for output"):
                use(late.logits[:, :-1], -1)
        assert torch.equal(early.logits.tensor(), expected)
        model.lm_head.requires_grad_(False)
        frozen = model(**inputs)
        frozen.loss.backward()
        optimizer.zero_grad(set_to_none=False)
        optimizer = torch.optim.SGD(model.model.parameters(), lr=0.1)
        optimizer.step()
        assert frozen.logits.argmax(-1).shape == inputs["labels"].shape


def test_a_handle_around_another_one_and_closing_in_either_order():
    model, inputs = build(), batch()
    theirs = step(model, inputs)
    for order in (0, 1), (1, 0):
        inner = chunk_loss(model)
        model.forward = functools.partial(inner)  # as accelerate wraps it
        outer = chunk_loss(model, chunk=CHUNK)
        assert_same(step(model, inputs), theirs, 1e-6)
        assert isinstance(model(**inputs).logits, LazyLogits)
        for place in order:
            (inner, outer)[place].close()
        assert_same(step(model, inputs), theirs, 0)
        assert type(model(**inputs).logits) is Tensor
        del model.forward


def test_closing_leaves_no_trace():
    model = build()
    before = [dict(vars(module)) for module in model.modules()]
    hooks = [len(d["_forward_hooks"]) + len(d["_forward_pre_hooks"]) for d in before]
    handle = chunk_loss(model)
    model(**batch())
    with pytest.raises(ValueError, match="labels has 97"):
        model(**{**batch(), "labels": torch.full((ROWS, LENGTH), VOCABULARY)})
    handle.close()
    handle.close()
    for module, old, count in zip(model.modules(), before, hooks, strict=True):
        now = vars(module)
        assert now.keys() == old.keys()
        assert len(now["_forward_hooks"]) + len(now["_forward_pre_hooks"]) == count
    assert type(model(**batch()).logits) is Tensor


def test_the_trainer_reads_from_the_model_what_it_read_before():
    import inspect

    model = build()
    before = inspect.signature(model.forward), model.loss_type, model.loss_function
    with chunk_loss(model):
        assert (inspect.signature(model.forward), model.loss_type, model.loss_function) == before
        assert not hasattr(model, "accepts_loss_kwargs")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_its_loss_in_chunks_too(how):
    model = build()
    with chunk_loss(model):
        twin = how(model)
    assert type(model(**batch()).logits) is Tensor
    output = twin(**batch())
    assert isinstance(output.logits, LazyLogits)
    torch.testing.assert_close(output.loss, model(**batch()).loss)


# --- Adapters, on the head too


@pytest.mark.parametrize("head", ["frozen", "adapter", "trainable"])
def test_our_adapters(head, log):
    model = build()
    targets = ["q_proj", "down_proj", *(["lm_head"] if head == "adapter" else [])]
    trainable = ["lm_head"] if head == "trainable" else []
    inject(model, LoRAConfig(rank=2, alpha=4, targets=targets, trainable=trainable))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    same_chunked(model)
    assert log() == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("always", [[], ["lm_head"]], ids=["frozen head", "head trains"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_whole_blocks_beside_a_head_that_the_optimizer_holds(tied, always, dtype, log):
    """It gives an inactive head detached parameters; in chunks it has no gradient either."""
    model = build(tied=tied, dtype=dtype)
    weight = model.lm_head.weight
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        groups=Blocks(outside="frozen"),
        active=0.5,
        always_active=always,
    )
    (_, gradients), peaks, steps = step(model, batch()), [], {}
    assert (weight.grad is not None) == bool(always)
    assert 0 < sum("layers" in name for name in gradients) < len(gradients) + (not always)
    for chunked in (False, True):
        handle = chunk_loss(model, chunk=CHUNK) if chunked else None
        with LiveBytes() as memory:
            steps[chunked] = step(model, batch())
        peaks.append(memory.peak)
        assert isinstance(model(**batch()).logits, LazyLogits) == chunked
        if handle:
            handle.close()
    tolerance = 1e-6 if dtype == torch.float64 else TOLERANCES[dtype]  # the model's own is float32
    assert_same(steps[True], steps[False], tolerance)
    assert peaks[1] < peaks[0]
    assert log() == []
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before) == (not always)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("always", [[], ["lm_head"]], ids=["frozen head", "head trains"])
def test_a_copy_without_data_of_whole_blocks_has_the_costs_of_the_model(tied, always, monkeypatch):
    found = []
    for room in (None, 0):
        model = build(tied=tied)
        chunk_loss(model, chunk=CHUNK)
        rule = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = blocks_on_budget(model, rule, memory=1.0, always_active=always)
        monkeypatch.setattr(optimizer._costing, "_room", lambda room=room: room)
        optimizer.measure(**batch())
        found.append(optimizer._allocation.costs)
    assert found[0] == found[1] is not None


def test_logits_that_are_asked_for_later_have_the_graph_of_the_forward():
    model = build()
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, groups=Blocks(outside="frozen")
    )
    with chunk_loss(model, chunk=CHUNK):
        lazy = model(**batch()).logits
        lazy.tensor().square().sum().backward()
    assert model.lm_head.weight.grad is None
    assert any(parameter.grad is not None for parameter in model.parameters())
    optimizer.close()


@pytest.mark.parametrize("head", ["frozen", "adapter", "modules_to_save", "tied, saved"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_of_peft(head, when, log):
    peft = pytest.importorskip("peft")
    model = build(tied=head.startswith("tied"))
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj", *(["lm_head"] if head == "adapter" else [])],
        modules_to_save=["lm_head"] if "save" in head else None,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    if when == "before":
        handle = chunk_loss(model, chunk=CHUNK)
        adapted = peft.get_peft_model(model, config).train()
        ours = step(adapted, batch())
        assert isinstance(adapted(**batch()).logits, LazyLogits)
        handle.close()
        assert_same(ours, step(adapted, batch()), 1e-6)
    else:
        adapted = peft.get_peft_model(model, config).train()
        same_chunked(adapted)
    assert log() == []


def test_the_importance_of_an_adapter_on_the_head_is_the_same():
    def scores(*, chunked: bool) -> dict[str, float]:
        model = build()
        torch.manual_seed(0)
        inject(model, LoRAConfig(rank=2, alpha=4, targets=["q_proj", "lm_head"]))
        optimizer = DynamicAllocationOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, active=2, importance=ForwardNorm()
        )
        if chunked:
            chunk_loss(model, chunk=CHUNK)
        for seed in range(2):
            output = model(**batch(seed))
            assert isinstance(output.logits, LazyLogits) is chunked
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(optimizer.tracker.scores())

    expected = scores(chunked=False)
    assert len(expected) == 3
    assert scores(chunked=True) == pytest.approx(expected, rel=1e-5)


# --- Where the model's own way is kept, with one line in the log


class Squared(nn.Module):
    """A head that is not linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square()


def without_labels(model: Any) -> dict[str, Any]:
    return {"input_ids": batch()["input_ids"]}


def other_hooks(model: Any) -> dict[str, Any]:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return batch()


def backward_hook(model: Any) -> dict[str, Any]:
    model.lm_head.register_full_backward_hook(lambda head, given, got: (given[0] * 2,))
    return batch()


def hook_within(model: Any) -> dict[str, Any]:
    config = LoRAConfig(rank=2, alpha=4, targets=["lm_head"])
    layer = inject(model, config).lm_head
    layer.register_module("drop", nn.Identity())
    layer.drop.register_full_backward_pre_hook(lambda module, gradient: None)
    model.model.norm.requires_grad_(True)
    return batch()


def sharded_head(model: Any) -> dict[str, Any]:
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it gathers for each forward
    return batch()


def replaced_head(model: Any) -> dict[str, Any]:
    model.lm_head = Squared(model.lm_head)
    return batch()


def other_loss(model: Any) -> dict[str, Any]:
    model.loss_function = lambda logits, labels, **_: logits.softmax(-1).square().mean()
    return batch()


def other_vocabulary(model: Any) -> dict[str, Any]:
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(
        logits.view(-1, VOCABULARY)[:, :50], labels.view(-1).clamp(max=49)
    )
    return batch()


OWN_WAY = {
    "a forward got no labels": without_labels,
    "the head has hooks": other_hooks,
    r"the head has hooks\.": backward_hook,
    "modules within the head have hooks": hook_within,
    "the head's weight is sharded": sharded_head,
    "the head, Squared, is not linear": replaced_head,
    r"uses its logits in another way \(softmax\)": other_loss,
    r"uses its logits in another way \(indexing\)": other_vocabulary,
}


@pytest.mark.parametrize("reason", OWN_WAY)
def test_the_models_own_way_is_kept_and_one_line_says_why(reason, log):
    model = build()
    handle = chunk_loss(model)
    inputs = OWN_WAY[reason](model)

    def found() -> tuple[Tensor, Tensor]:
        output = model(**inputs)
        value = output.logits.sum() if output.loss is None else output.loss
        return value.detach(), torch.autograd.grad(value, model.model.norm.weight)[0]

    ours = [found() for _ in range(3)][-1]
    handle.close()
    torch.testing.assert_close(ours, found())
    (line,) = log()
    assert re.search(reason, line)


def heads(count: int) -> nn.Module:
    return nn.ModuleList([build() for _ in range(count)])


def not_linear() -> nn.Module:
    model = build()
    model.lm_head = Squared(model.lm_head)
    return model


BAD = {
    "is not a model": (TypeError, lambda: "llama", {}),
    "Linear has 0 language-model heads": (TypeError, lambda: nn.Linear(2, 2), {}),
    "LlamaModel has 0 language-model heads": (TypeError, lambda: build().model, {}),
    "ModuleList has 2 language-model heads": (TypeError, lambda: heads(2), {}),
    "the head of LlamaForCausalLM, Squared, is not linear": (TypeError, not_linear, {}),
    "chunk=0": (ValueError, build, {"chunk": 0}),
    "label_smoothing=2": (ValueError, build, {"label_smoothing": 2}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    kind, make, options = BAD[message]
    with pytest.raises(kind, match=message) as caught:
        chunk_loss(make(), **options)
    assert ";" in str(caught.value), "it says what to do"


def test_a_second_handle_is_refused():
    model = build()
    with chunk_loss(model), pytest.raises(ValueError, match="close"):
        chunk_loss(model)
    chunk_loss(model).close()


@pytest.fixture
def liger(monkeypatch, tmp_path):
    """The package with the layout of the real one, which imports triton before anything else."""

    def installed(source: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
            monkeypatch.delitem(sys.modules, name)
        folder = tmp_path / "liger_kernel" / "transformers"
        folder.mkdir(parents=True)
        for place in (folder, folder.parent):
            (place / "__init__.py").touch()
        (folder / "functional.py").write_text(source, "utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield installed
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]


KERNEL = "liger_fused_linear_cross_entropy = None"


def test_liger_without_its_packages_is_refused_by_name(liger, monkeypatch):
    model = build()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "liger_kernel", None)
        with pytest.raises(ImportError, match=r"package liger_kernel.*; install liger-kernel"):
            chunk_loss(model, liger=True)
    liger(f"import triton.language\n{KERNEL}")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"package triton.*; install triton, or"):
        chunk_loss(model, liger=True)
    assert "forward" not in vars(model)


def test_liger_where_it_cannot_run_is_refused(liger, monkeypatch):
    model, inputs = build(), batch()
    liger("def liger_fused_linear_cross_entropy(*args, **options): raise AssertionError")
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        with pytest.raises(ValueError, match=r"liger=True.* finds none; leave liger out"):
            chunk_loss(model, liger=True)
    assert "forward" not in vars(model)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with chunk_loss(model, liger=True) as handle:  # it may be moved to the GPU before it trains
        with pytest.raises(ValueError, match=r"head of the model is on the CPU; move the model"):
            model(**inputs)
        assert "forward" not in vars(model.get_output_embeddings())
        assert model.eval()(**inputs).loss.isfinite()
        handle.close()
    assert model.train()(**inputs).loss.isfinite()


def test_logits_asked_for_while_another_adapter_is_in_use_are_refused():
    """They would be those of the bare head, and differ from the loss without a word."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(), config).train()
    expected = model(**batch()).logits
    chunk_loss(model)
    output = model(**batch())
    with model.disable_adapter(), pytest.raises(RuntimeError, match="which adapter is in use"):
        output.logits.tensor()
    torch.testing.assert_close(output.logits.tensor(), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ligers_kernel_gives_the_same():
    pytest.importorskip("liger_kernel")
    model = build().cuda()
    inputs = {name: value.cuda() for name, value in batch().items()}
    theirs = step(model, inputs)
    with chunk_loss(model, liger=True):
        assert_same(step(model, inputs), theirs, 1e-3)


# --- Memory

HEAVY = {"vocab_size": 4096, "num_hidden_layers": 4, "hidden_size": 32}


def heavy(**options: Any) -> tuple[Any, dict[str, Any]]:
    """A model whose logits are most of a step."""
    model = build(**HEAVY, **options)
    inject(model, LoRAConfig(rank=2, alpha=4, targets=["q_proj", "v_proj", "down_proj"]))
    ids = torch.randint(3, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "labels": ids.clone()}


def counted(model: Any, inputs: dict[str, Any], optimizer: Any) -> int:
    with LiveBytes() as memory:
        model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return memory.peak


def test_a_budget_that_was_refused_holds_with_the_loss_in_chunks():
    model, inputs = heavy()
    limit = 0.07
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    plain = counted(model, inputs, inner)
    optimizer = DynamicAllocationOptimizer(
        inner, model, allocator=Budget(memory=round(limit * plain))
    )
    with pytest.raises(ValueError, match="cannot hold a step"):
        model(**inputs)

    model, inputs = heavy()
    optimizer = DynamicAllocationOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        model,
        allocator=Budget(memory=round(limit * plain)),
        period=1,
    )
    with chunk_loss(model, chunk=4):
        model(**inputs)  # measures
        for _ in range(6):
            assert counted(model, inputs, optimizer) <= limit * plain
    assert len({event.chosen for event in optimizer.record}) > 1


def test_the_rehearsal_counts_it():
    model, inputs = heavy()

    def estimated() -> int:
        return estimate_memory(
            model, inputs, lambda model: torch.optim.SGD(model.parameters(), lr=0.01)
        ).activations

    whole = estimated()
    with chunk_loss(model, chunk=4):
        chunked = estimated()
        with LiveBytes() as memory:
            model(**inputs).loss.backward()
    assert chunked < 0.4 * whole
    assert chunked == pytest.approx(memory.peak, rel=0.05)
