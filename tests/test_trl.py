"""TRL's trainers on `Budget(total=...)`; docs/trl.md has the recipes, which `test_docs` runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from text_runs import MARKS, WORDS, tiny_chat
from toy import named

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import Budget, DynamicAllocationOptimizer, LiveBytes
from dynalora_optim._base.live_bytes import storage_bytes

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


ROWS = {
    "SFT": [
        {"prompt": said("user", f"the {a}"), "completion": said("assistant", a)} for a in WORDS
    ],
    "DPO": [
        {
            "prompt": said("user", f"the {a}"),
            "chosen": said("assistant", a),
            "rejected": said("assistant", "dull and cold"),
        }
        for a in WORDS
    ],
}


def trainer(kind: str, checkpoint: str, total: int | str, folder: Any, **more: Any) -> Any:
    """A trainer as in the recipe: SFT with our adapters, DPO with those of peft."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if kind == "SFT":
        inject(model, LoRAConfig(rank=4, alpha=8, targets="all-linear"))
    else:
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = DynamicAllocationOptimizer(
        torch.optim.AdamW(trained, lr=1e-3), model, allocator=Budget(total=total), period=2
    )
    args = getattr(trl, f"{kind}Config")(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_list(ROWS[kind]),
        processing_class=transformers.AutoTokenizer.from_pretrained(checkpoint),
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("kind", ROWS)
def test_every_step_of_a_trl_trainer_stays_within_the_total(kind, tmp_path):
    checkpoint = str(tiny_chat(tmp_path / "chat"))
    with pytest.raises(ValueError, match="pass at least total=") as refused:
        trainer(kind, checkpoint, "1kB", tmp_path).train()
    least = named(refused.value)
    total = least * 51 // 50  # TRL's head takes most of it, whatever is active
    run = trainer(kind, checkpoint, total, tmp_path)
    held = storage_bytes([*run.model.parameters(), *run.model.buffers()])
    with LiveBytes() as memory:
        run.train()
    optimizer = run.optimizer.optimizer  # ours, inside Accelerate's
    assert 0.9 * total < memory.peak + held <= total
    assert optimizer.memory_report().all_active.whole > total
    assert len({entry.chosen for entry in optimizer.record}) > 1


def test_packed_conversations_do_not_attend_to_each_other(tmp_path):
    """As docs/trl.md packs them: without flash attention, of which TRL's own pages speak."""
    packing = {"packing": True, "max_length": 30}
    run = trainer("SFT", str(tiny_chat(tmp_path / "chat")), "1GiB", tmp_path, **packing)
    batch = next(iter(run.get_train_dataloader()))
    labels = batch.pop("labels")
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 2
    with torch.no_grad():
        for parameter in run.model.parameters():  # large enough that others would matter
            parameter.mul_(5)
        packed = run.model.eval()(**batch, use_cache=False).logits[0]
        for start, end in pairwise([*starts, len(packed)]):
            alone = run.model(input_ids=batch["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-4)
    words = run.processing_class.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert set(words[1::2]) == {MARKS[1]}, "the answers, each a word and its end"
    assert set(words[::2]) <= set(WORDS)
