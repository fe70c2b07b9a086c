"""What a step takes: by hand for a small model, rehearsed as measured for the real kinds."""

from __future__ import annotations

import gc
import sys
from dataclasses import astuple

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from dynalora_optim import (
    Backward,
    Blocks,
    Budget,
    DynamicAllocationOptimizer,
    LiveBytes,
    StepMemory,
    badam,
    estimate_memory,
    lisa,
    measure_step,
)

BLOCKS, WIDTH, ROWS, CLASSES = 4, 8, 3, 5
BLOCK = 4 * (WIDTH * WIDTH + WIDTH)  # bytes of a float32 linear layer and its bias
HEAD = 4 * (WIDTH * CLASSES + CLASSES)
HIDDEN, STEP = 4 * ROWS * WIDTH, 4  # an activation; AdamW counts the steps of each parameter


class Stack(nn.Module):
    """A stack of linear layers and a head; the loss is the sum of all outputs."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum()


def x():
    return torch.randn(ROWS, WIDTH)


def adamw(model):
    return AdamW(model.parameters(), lr=1e-3)


def moments(parameter_bytes, parameters):
    return 2 * parameter_bytes + parameters * STEP


def test_adamw_holds_what_it_does_by_hand():
    memory = estimate_memory(Stack(), [x()], adamw)
    total = BLOCKS * BLOCK + HEAD
    assert memory.weights == memory.gradients == total
    assert memory.master_weights == 0
    assert memory.optimizer_state == moments(total, 2 * BLOCKS + 2)


def test_one_block_of_many_holds_its_own_gradients_and_state():
    memory = estimate_memory(Stack(), [x()], lambda m: badam(m, adamw(m)))
    assert memory.weights == BLOCKS * BLOCK + HEAD
    assert memory.gradients == BLOCK
    assert memory.optimizer_state == moments(BLOCK, 2)


def test_idle_state_that_is_kept_is_that_of_all_blocks():
    def keep(m):
        return badam(m, adamw(m), pause="keep")

    assert estimate_memory(Stack(), [x()], keep).optimizer_state == moments(
        BLOCKS * BLOCK, 2 * BLOCKS
    )


def test_lisa_holds_the_layers_it_draws_and_what_lies_outside():
    memory = estimate_memory(Stack(), [x()], lambda m: lisa(m, adamw(m), pause="drop"))
    assert memory.gradients == 2 * BLOCK + HEAD
    assert memory.optimizer_state == moments(2 * BLOCK + HEAD, 6)


def test_bfloat16_weights_have_float32_copies_and_moments_while_they_train():
    memory = estimate_memory(Stack().bfloat16(), [x().bfloat16()], lambda m: badam(m, adamw(m)))
    assert memory.weights == (BLOCKS * BLOCK + HEAD) / 2
    assert memory.master_weights == BLOCK
    assert memory.gradients == BLOCK / 2
    assert memory.optimizer_state == moments(BLOCK, 2)


def test_a_tensor_of_a_class_of_its_own_counts_with_what_it_is_made_of():
    quantization = pytest.importorskip("torchao.quantization")
    subclass_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    quantization.quantize_(model[0], quantization.Int8WeightOnlyConfig())
    weight = model[0].weight
    made_of = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    optimizer = SGD(model[1].parameters(), lr=0.1)
    optimizer.state[model[1].weight]["moment"] = subclass_8bit.OptimState8bit.zeros((64, 64))
    memory = measure_step(model, [torch.randn(2, 64)], optimizer, loss=lambda y: y.sum())
    assert memory.weights == sum(part.nbytes for part in made_of) + 4 * (64 + 64 * 3 + 3)
    assert memory.weights < 64 * 64 * 2, "not the float32 numbers that it stands for"
    assert memory.optimizer_state == 64 * 64 + 4 * (16 + 256), "codes, a scale per block, a table"


def test_activations_are_what_autograd_keeps_and_one_layer_holds():
    model = Stack()
    memory = measure_step(model, [x()], SGD(model.parameters(), lr=0.1))
    kept = BLOCKS * HIDDEN  # the inputs of all layers but the first, whose input is the batch
    one_layer = BLOCK + 2 * HIDDEN  # its gradients on their way, and those of its output and input
    assert kept < memory.activations <= kept + one_layer + 2 * 4
    assert memory.optimizer_state == 0
    at_rest = memory.weights + memory.gradients
    assert at_rest < memory.peak <= at_rest + memory.activations


def test_the_peak_is_what_a_plain_loop_under_the_counter_has():
    model, twin, batch = Stack(), Stack(), x()
    measured = measure_step(model, [batch], adamw(model))
    optimizer = adamw(twin)
    with LiveBytes() as memory:
        twin(batch).backward()
        optimizer.step()
    assert measured.peak == memory.peak + measured.weights


# torch 2.8 cannot rehearse grouped queries.
HAS_GROUPED_QUERIES = torch.__version__ >= (2, 9)


def llama(blocks=3, key_value_heads=2 if HAS_GROUPED_QUERIES else 4, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        use_cache=False,
        **options,
    )
    return transformers.LlamaForCausalLM(config).train()


def tokens(mask=False):
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "labels": ids}
    return {**batch, "attention_mask": torch.ones_like(ids)} if mask else batch


def largest(found):
    return StepMemory(*map(max, zip(*map(astuple, found), strict=True)))


def everywhere(model, optimizer, batch):
    """Real steps: a wrapper that changes blocks every second one comes back to the lowest."""
    return largest([measure_step(model, batch, optimizer) for _ in range(8)])


def ascending(m, **options):
    return badam(m, adamw(m), order="ascending", period=2, **options)


RULES = {
    "AdamW": adamw,
    "lisa": lambda m: lisa(m, adamw(m), allocator="round_robin", layers=2, period=2),
    "lisa, drop": lambda m: lisa(
        m, adamw(m), allocator="round_robin", layers=2, period=2, pause="drop"
    ),
    "badam": ascending,
    "badam, keep": lambda m: ascending(m, pause="keep"),
    "badam, checkpoint_idle": lambda m: ascending(m, backward=Backward(checkpoint_idle=True)),
    "badam, fused_backward": lambda m: ascending(m, backward=Backward(fused=True)),
    "all blocks fused": lambda m: DynamicAllocationOptimizer(
        adamw(m), m, groups=Blocks(), active=1.0, backward=Backward(fused=True)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rehearsal_takes_what_real_steps_do(rule, dtype):
    model = llama().to(dtype)
    planned = estimate_memory(model, tokens(), rule)
    measured = everywhere(model, rule(model), tokens())
    for name in StepMemory.__dataclass_fields__:
        assert getattr(planned, name) == pytest.approx(getattr(measured, name), rel=0.05), name


@pytest.mark.parametrize("library", ["peft", "ours"])
def test_a_rehearsal_of_lora_takes_what_real_steps_do(library):
    if library == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        model, rule = peft.get_peft_model(llama(), config).train(), adamw
    else:
        from dynalora_adapters import LoRAConfig, inject

        model = inject(llama(), LoRAConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"]))

        def rule(m):
            return DynamicAllocationOptimizer(adamw(m), m, active=1.0, period=1)

    planned = estimate_memory(model, tokens(), rule)
    measured = everywhere(model, rule(model), tokens())
    assert planned.peak == pytest.approx(measured.peak, rel=0.05)
    assert planned.gradients == measured.gradients < planned.weights / 5
    assert planned.optimizer_state == measured.optimizer_state


def test_named_groups_are_the_ones_that_are_active():
    model = llama()
    low, high = (
        estimate_memory(model, tokens(), ascending, active=[f"model.layers.{i}"]) for i in (0, 2)
    )
    assert low.gradients == high.gradients
    assert low.activations > high.activations
    assert estimate_memory(model, tokens(), ascending) == low, "the worst of all"
    both = estimate_memory(model, tokens(), ascending, active=2)
    assert both.gradients == 2 * low.gradients


def test_padding_masks_and_checkpointed_models_are_rehearsed_too():
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    planned = estimate_memory(model, tokens(mask=True), ascending)
    measured = everywhere(model, ascending(model), tokens(mask=True))
    assert planned.peak == pytest.approx(measured.peak, rel=0.05)
    assert planned.peak < estimate_memory(llama(), tokens(), ascending).peak


def test_attention_holds_no_scores():
    ids = torch.zeros(1, 1024, dtype=torch.long)
    with torch.device("meta"):
        model = llama(blocks=2, attn_implementation="sdpa")
    memory = estimate_memory(model, {"input_ids": ids, "labels": ids}, adamw)
    scores = 4 * 4 * 1024 * 1024  # of one block
    assert memory.activations < scores


def test_nothing_of_the_model_is_touched():
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attention = nn.functional.scaled_dot_product_attention
    estimate_memory(model.eval(), tokens(), ascending)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p.is_meta or p.grad is not None for p in model.parameters())
    assert not model.training
    assert nn.functional.scaled_dot_product_attention is attention
    DynamicAllocationOptimizer(adamw(model), model, groups="blocks")  # nothing is claimed


def test_tied_weights_count_once():
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    sizes = [estimate_memory(model, tokens(), adamw).weights for model in (tied, untied)]
    assert sizes[1] - sizes[0] == 4 * 97 * 32


@pytest.mark.skipif(HAS_GROUPED_QUERIES, reason="this torch can rehearse them")
def test_grouped_queries_name_the_torch_that_they_need():
    with pytest.raises(ValueError, match=r"needs torch 2\.9 or newer, found 2\.8.*measure_step"):
        estimate_memory(llama(key_value_heads=2), tokens(), adamw)


def test_a_large_model_is_planned_in_seconds_without_its_memory():
    with torch.device("meta"):
        model = llama(blocks=2).to(torch.bfloat16)
        model.lm_head = nn.Linear(32, 10**9, bias=False, dtype=torch.bfloat16)
    model.config.vocab_size = 10**9
    memory = estimate_memory(model, tokens(), lambda m: badam(m, adamw(m)))
    assert memory.weights > 2 * 32 * 10**9


def test_the_loss_is_what_the_caller_says():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    with pytest.raises(ValueError, match=r"Tensor, which is not a loss.*pass loss="):
        measure_step(model, [x()], adamw(model))
    memory = measure_step(model, (x(),), adamw(model), loss=lambda output: output.mean())
    assert memory.gradients == BLOCK + HEAD


def test_what_cannot_be_rehearsed_says_so():
    model = Stack()
    with pytest.raises(ValueError, match=r"Budget.*memory_report"):
        estimate_memory(
            model,
            [x()],
            lambda m: DynamicAllocationOptimizer(
                adamw(m), m, groups=Blocks(outside="frozen"), allocator=Budget(0.5)
            ),
        )
    with pytest.raises(ValueError, match=r"\['nobody'\] are not names of module groups"):
        estimate_memory(model, [x()], lambda m: badam(m, adamw(m)), active=["nobody"])

    class Elsewhere(Stack):
        def forward(self, x):
            return super().forward(x + torch.ones(WIDTH))  # on the CPU, wherever x is

    with pytest.raises(ValueError, match=r"Elsewhere cannot run on the meta device.*measure_step"):
        estimate_memory(Elsewhere(), [x()], adamw)


def test_the_work_grows_in_proportion_to_the_number_of_layers():
    """A hundred layers take minutes if one list of all parameters is read for each of them."""

    def made(model):
        return AdamW(model.parameters(), foreach=True)

    def calls(blocks):
        model, count = Stack(blocks), 0

        def called(frame, event, argument):
            nonlocal count
            count += event.endswith("call")

        gc.collect()
        gc.disable()  # what a collection calls is no work of the estimate
        sys.setprofile(called)
        try:
            estimate_memory(model, [x()], made)
        finally:
            sys.setprofile(None)
            gc.enable()
        return count

    _, few, more, most = (calls(blocks) for blocks in (12, 3, 6, 12))  # the first call fills caches
    assert most - more == pytest.approx(2 * (more - few), rel=0.005)


def test_the_table_names_every_category():
    lines = str(StepMemory(*(2**20 * n for n in range(1, 7)))).splitlines()
    assert len(lines) == 6
    assert lines[-1].split() == ["peak", "6.0", "MiB"]
