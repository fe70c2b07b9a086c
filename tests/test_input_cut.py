"""The graph ends before the blocks if, and only if, nobody wants the gradient of their input."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator

import pytest
import torch
from budgets import adapted
from tiny_models import TINY
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import DynamicAllocationOptimizer, LiveBytes
from dynalora_optim.groups._blocks import Block, in_lists

transformers = pytest.importorskip("transformers")

AUDIO = ("Wav2Vec2", "Hubert", "WavLM", "Data2VecAudio", "UniSpeech", "SEW")


def drive(model: nn.Module, active: int | None = None) -> DynamicAllocationOptimizer:
    """An optimizer over all LoRA layers; if ``active`` is given, only those of this block train."""
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer = DynamicAllocationOptimizer(inner, model)
    optimizer.hold([n for n in optimizer.groups if active is None or f".{active}." in n])
    return optimizer


def audio(name: str, *, blocks: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(4, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        classifier_proj_size=8,
        apply_spec_augment=False,
        layerdrop=0.0,
        **{f"{part}_dropout": 0.0 for part in ("hidden", "attention", "feat_proj", "activation")},
    )
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).double().train()
    inject(model, LoRAConfig(rank=2, alpha=4, targets=["intermediate_dense", "output_dense"]))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.2)
    values = torch.randn(2, 400, dtype=torch.float64)
    return model, {"input_values": values, "labels": torch.tensor([0, 2])}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def first_inputs(model: nn.Module, list_name: str) -> list[bool]:
    """Filled with whether the first block's input requires a gradient, in each forward."""
    seen: list[bool] = []
    first = model.get_submodule(list_name)[0]
    forward = first.forward

    def noted(x: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(x.requires_grad)
        return forward(x, *args, **kwargs)

    first.forward = noted
    return seen


@pytest.mark.parametrize("name", AUDIO)
def test_a_model_that_asks_for_gradients_itself_trains_the_same_without_them(name, caplog):
    model, batch = audio(name)
    plain = copy.deepcopy(model)
    blocks = next(n for n, m in model.named_modules() if n.endswith("encoder.layers"))
    uncut = first_inputs(plain, blocks)
    optimizer = drive(model, 2)
    seen = first_inputs(model, blocks)
    with caplog.at_level(logging.WARNING, logger="dynalora_optim"):
        for _ in range(3):
            model(**batch).loss.backward()
            plain(**batch).loss.backward()
            found, expected = gradients(model), gradients(plain)
            active = {name for name in expected if ".2." in name}
            assert active <= found.keys()
            for key, gradient in found.items():
                torch.testing.assert_close(gradient, expected[key], rtol=1e-12, atol=1e-12)
    assert seen == [False] * 3
    assert uncut == [True] * 3
    assert len([r for r in caplog.records if "requires a gradient" in r.message]) == 1
    optimizer.close()
    model(**batch)
    assert seen[-1]


def test_the_peak_falls_with_the_lowest_active_block():
    model, batch = audio("Wav2Vec2", blocks=6)
    batch["input_values"] = torch.randn(2, 4000, dtype=torch.float64)
    optimizer = drive(model)
    peaks = []
    for lowest in range(6):
        optimizer.hold([name for name in optimizer.groups if f".{lowest}." in name])
        with LiveBytes() as memory:
            model(**batch).loss.backward()
        peaks.append(memory.peak)
        gradients(model)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.6 * peaks[0]


def test_looking_for_holders_keeps_no_tensor_of_the_forward():
    """The frames that are looked through would form cycles, which only a collection frees."""
    model, batch = audio("Wav2Vec2")
    alive: list[weakref.ref[Tensor]] = []
    for block in model.wav2vec2.encoder.layers:
        block.register_forward_hook(lambda _, args, out: alive.append(weakref.ref(args[0])))
    optimizer = drive(model, 2)
    gc.collect()
    gc.disable()
    try:
        model(**batch).loss.backward()
        assert len(alive) == 4
        assert not [one for one in alive if one() is not None]
    finally:
        gc.enable()
        optimizer.close()


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=3,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).double().train()
    inject(model, LoRAConfig(rank=2, alpha=4, targets=["q", "v"]))
    ids = torch.randint(1, 32, (2, 5))
    return model, {"input_ids": ids, "labels": ids}


def test_an_encoder_and_a_decoder_have_one_cut_each():
    model, batch = t5()
    model.enable_input_require_grads()
    plain = copy.deepcopy(model)
    optimizer = drive(model)
    driven = [("encoder", "block"), ("decoder", "block")]
    optimizer._driver._hooks.close()
    optimizer._driver._hooks._blocks = [
        Block(f"{part}.{blocks}.{i}", module)
        for part, blocks in driven
        for i, module in enumerate(model.get_submodule(f"{part}.{blocks}"))
    ]
    optimizer._driver._hooks.attach()
    seen = {part: first_inputs(model, f"{part}.{blocks}") for part, blocks in driven}
    for _ in range(2):
        model(**batch).loss.backward()
        plain(**batch).loss.backward()
        found, expected = gradients(model), gradients(plain)
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-12, atol=1e-12)
    assert seen == {"encoder": [False] * 2, "decoder": [False] * 2}


@pytest.mark.parametrize("how", ["ours", "peft"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_what_the_embeddings_are_forced_to_ask_for_is_cut_in_every_forward(name, how):
    """Also where the forced tensor is itself what the first block is given, as in decoders."""
    tiny = adapted(name, how, sizes=TINY)
    (tiny.model if how == "ours" else tiny.model.get_base_model()).enable_input_require_grads()
    optimizer = drive(tiny.model)
    blocks = optimizer._driver._blocks[0].name.rpartition(".")[0]
    seen = first_inputs(tiny.model, blocks)
    for options in ({}, {}, {"output_attentions": False}, {}):
        tiny.model(**tiny.batch, **options).loss.backward()
    assert seen == [False] * 4
    embeds = tiny.model.get_input_embeddings()(tiny.batch["input_ids"]).detach().requires_grad_()
    batch = {key: value for key, value in tiny.batch.items() if key != "input_ids"}
    tiny.model(**batch, inputs_embeds=embeds).loss.backward()
    assert seen[4:] == [True]
    assert embeds.grad is not None


def test_lists_are_told_apart_by_the_name_of_their_parent():
    names = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "layers.0", "layers.1"]
    lists = in_lists([Block(name, nn.Identity()) for name in names])
    assert [[block.name for block in blocks] for blocks in lists] == [
        names[:2],
        names[2:3],
        names[3:],
    ]


# --- Tensors whose gradient somebody wants.


class Layer(nn.Module):
    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(8, 8)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.how is None:
            return x + self.inner(x)
        return x + checkpoint(self.inner, x, use_reentrant=self.how)


class Asking(nn.Module):
    """A model that sets ``requires_grad`` on its embeddings, as if they trained."""

    def __init__(self, how: bool | None = None, *, asks: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.between = nn.Tanh()
        self.layers = nn.ModuleList(Layer(how) for _ in range(4))
        self.head = nn.Linear(8, 2)
        self.asks, self.prompt, self.prompts, self.kept = asks, None, [], None
        inject(self, LoRAConfig(rank=2, alpha=4, targets=["linear"], trainable=["head"]))
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)

    def forward(self, ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        h = self.embed(ids) if inputs_embeds is None else inputs_embeds
        if self.asks:
            h.requires_grad_()
        for prompt in (self.prompt, *self.prompts):
            h = h if prompt is None else h + prompt
        h = self.between(h)
        for layer in self.layers:
            h = layer(h)
        return self.head(h).square().mean()


IDS = torch.arange(6).view(2, 3)


def test_a_model_of_ones_own_is_cut_after_its_first_forward():
    model = Asking()
    _optimizer = drive(model)
    seen = first_inputs(model, "layers")
    for _ in range(3):
        model(IDS).backward()
    assert seen == [True, False, False]


def test_a_block_that_is_called_after_an_interrupt_keeps_its_graph():
    model = Asking()
    optimizer = drive(model, active=3)  # the first block need not record anything
    for _ in range(2):  # in the first forward nothing is cut
        model(IDS).backward()

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    hook.remove()
    y = model.layers[0](torch.ones(2, 3, 8, requires_grad=True))
    assert y.requires_grad
    optimizer.close()


def assert_same_gradients(model: nn.Module, plain: nn.Module) -> None:
    """In each of three passes, to the bit, and for the same parameters."""
    for _ in range(3):
        model(IDS).backward()
        plain(IDS).backward()
        found, expected = gradients(model), gradients(plain)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("how", [False, True])
def test_a_block_that_checkpoints_itself_keeps_what_it_needs(how):
    model, plain = Asking(how), Asking(how)
    _optimizer = drive(model)
    seen = first_inputs(model, "layers")
    assert_same_gradients(model, plain)
    assert seen[:1] + seen[-1:] == [True, how]


class Outside(Asking):
    """Checkpoints its layers from outside, so that their hooks run in the recomputation too."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        h = self.embed(ids) if inputs_embeds is None else inputs_embeds * 2
        h.requires_grad_()
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=self.use_reentrant)
        return self.head(h).square().mean()


@pytest.mark.parametrize("how", [False, True])
def test_a_block_that_is_checkpointed_from_outside_keeps_what_it_needs(how):
    model, plain = Outside(how), Outside(how)
    _optimizer = drive(model)
    assert_same_gradients(model, plain)


def asked(model: Asking, embeds: Tensor) -> Tensor:
    return model(inputs_embeds=embeds)


def unasked(model: Asking, embeds: Tensor) -> Tensor:
    return model(IDS)


@torch.no_grad()
def reference(model: Asking, embeds: Tensor) -> int:
    """As DPO calls the model whose gradients it needs; the input asks for one all the same."""
    model(IDS)
    return 0


FORWARDS = [[asked, unasked], [unasked, asked], [unasked, reference], [asked, reference]]


@pytest.mark.parametrize("how", [False, True])
@pytest.mark.parametrize("forwards", FORWARDS, ids=lambda fs: f"{fs[0].__name__}-{fs[1].__name__}")
def test_each_forward_is_recomputed_as_it_ran_whatever_runs_before_its_backward(forwards, how):
    found = []
    for model in (Outside(how), Outside(how)):
        if not found:
            _optimizer = drive(model)
        model(IDS)  # makes known whether its blocks are reentrant
        embeds = torch.ones(2, 3, 8, requires_grad=True)
        sum(forward(model, embeds) for forward in forwards).backward()
        found.append({**gradients(model), "embeds": embeds.grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is found[1][name] or torch.equal(gradient, found[1][name]), name


class Wanted:
    """Ways of wanting a gradient: each yields the tensor after its set-up, then its gradient."""

    def embeddings(self, model: Asking) -> Iterator[Tensor]:
        embeds = model.embed(IDS).detach().requires_grad_()
        model(inputs_embeds=embeds).backward()
        yield embeds.grad

    def a_perturbation(self, model: Asking) -> Iterator[Tensor]:
        delta = torch.zeros(2, 3, 8, requires_grad=True)
        model(inputs_embeds=model.embed(IDS).detach() + delta).backward()
        yield delta.grad

    def an_attribute(self, model: Asking) -> Iterator[Tensor]:
        model.prompt = torch.zeros(8, requires_grad=True)
        model(IDS).backward()
        yield model.prompt.grad

    def a_list_of_attributes(self, model: Asking) -> Iterator[Tensor]:
        model.prompts = [torch.zeros(8, requires_grad=True)]
        model(IDS).backward()
        yield model.prompts[0].grad

    def a_hooks_own(self, model: Asking) -> Iterator[Tensor]:
        prompt = torch.zeros(8, requires_grad=True)
        model.between.register_forward_hook(lambda module, args, output: output + prompt)
        model(IDS).backward()
        yield prompt.grad

    def what_a_hook_keeps(self, model: Asking) -> Iterator[Tensor]:
        kept: list[Tensor] = []
        model.embed.register_forward_hook(
            lambda module, args, output: kept.append(output.requires_grad_())
        )
        model(IDS).backward()
        yield kept[-1].grad

    def the_blocks_input(self, model: Asking) -> Iterator[Tensor]:
        kept: list[Tensor] = []
        model.between.register_forward_hook(
            lambda module, args, output: kept.append(output) or output.retain_grad()
        )
        model(IDS).backward()
        yield kept[-1].grad

    def a_tensors_hook(self, model: Asking) -> Iterator[Tensor]:
        got: list[Tensor] = []

        def ask(module, args, output):
            output.requires_grad_().register_hook(got.append)

        model.embed.register_forward_hook(ask)
        model(IDS).backward()
        yield got[-1]

    def a_modules_hook(self, model: Asking) -> Iterator[Tensor]:
        got: list[Tensor] = []
        model.between.register_full_backward_hook(lambda m, inputs, outputs: got.append(inputs[0]))
        model(IDS).backward()
        yield got[-1]

    def the_first_blocks_hook(self, model: Asking) -> Iterator[Tensor]:
        got: list[Tensor] = []
        model.layers[0].register_full_backward_hook(lambda m, inputs, _: got.append(inputs[0]))
        model(IDS).backward()
        yield got[-1]


WAYS = [name for name in vars(Wanted) if not name.startswith("_")]
ONLY_IF_ASKED = ("the_first_blocks_hook", "a_modules_hook", "the_blocks_input")


@pytest.mark.parametrize(
    ("way", "asks"),
    [(way, asks) for way in WAYS for asks in (True, False) if asks or way not in ONLY_IF_ASKED],
)
def test_who_wants_a_gradient_gets_it(way, asks):
    """Also where the graph was cut before, in forwards in which nobody wanted it."""
    model, plain = Asking(asks=asks), Asking(asks=asks)
    _optimizer = drive(model)
    for one in (model, plain):
        for _ in range(3):
            one(IDS).backward()
    found, expected = (next(getattr(Wanted(), way)(one)) for one in (model, plain))
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
