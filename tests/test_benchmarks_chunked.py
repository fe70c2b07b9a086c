"""The memory benchmark with a real vocabulary, its loss in chunks, and the plan in 4 bits."""

import importlib
import itertools
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from dynalora_adapters import LoRAConfig, inject
from dynalora_optim import estimate_memory, measure_step

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as for a script there
_chunked_rows = importlib.import_module("_chunked_rows")
_count = importlib.import_module("_count")
_four_bit = importlib.import_module("_four_bit")
_memory_tables = importlib.import_module("_memory_tables")
_planned_tables = importlib.import_module("_planned_tables")
_recompute_tables = importlib.import_module("_recompute_tables")
_progress = importlib.import_module("_progress")
_rows = importlib.import_module("_rows")
_runs = importlib.import_module("_runs")
_shapes = importlib.import_module("_shapes")
_stored = importlib.import_module("_stored")
_torch_loss = importlib.import_module("_torch_loss")
memory = importlib.import_module("memory")
planned_lora = importlib.import_module("planned_lora")
recompute = importlib.import_module("recompute")


IN_CHUNKS = f"{_rows.ALL_ACTIVE}{_chunked_rows.IN_CHUNKS}"


def chunked(**options):
    return replace(_shapes.quick(_shapes.SMOLLM2), **options)


def test_the_strongest_peer_is_counted_with_what_torch_allocates_inside():
    if not _torch_loss.is_there():
        pytest.skip("torch has its own linear_cross_entropy from 2.13 on")
    shape = chunked(budgets=())
    bare = shape.bare()
    build = _chunked_rows.rows(shape)
    plain, peer, ours = (
        build[name](shape, bare)
        for name in (
            _rows.REFERENCE,
            f"{_rows.REFERENCE}, chunked loss",
            IN_CHUNKS,
        )
    )
    torch.testing.assert_close(peer.loss(), plain.loss())
    torch.testing.assert_close(ours.loss(), plain.loss())
    counts = [_count.count(run.loss) for run in (plain, peer, ours)]
    assert len({counted.forward + counted.backward for counted in counts}) == 1
    logits = 4 * shape.chunk * bare.config.vocab_size
    hidden = torch.randn(64, 64, requires_grad=True)
    head, labels = torch.randn(4096, 64), torch.randint(4096, (64,))
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=shape.chunk, chunking_method=None)

    def loss():
        return nn.functional.linear_cross_entropy(hidden, head, labels, options=options)

    loss().backward()
    assert logits <= allocated(loss) <= 1.2 * logits


def allocated(call):
    """The peak of the allocator, within operations too."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(sizes)))


def test_budgets_of_a_real_vocabulary_are_shares_of_pefts_peak():
    shape = chunked(budgets=((0.3, 1.0),))
    bare = shape.bare()
    name = _chunked_rows.chunked_name(0.3, 1.0)
    counted = _chunked_rows.rows(shape)[name](shape, bare).count({})
    limit = 0.3 * _chunked_rows.reference_peak(shape, bare)
    assert 0.5 * limit < max(c.peak for c in counted) <= limit


@pytest.fixture
def few(monkeypatch):
    """A small model, and three of its rows."""
    shape = chunked(budgets=((0.3, 0.6),), draws=2)
    shape = replace(shape, config=partial(shape.config, num_hidden_layers=4))
    every = _chunked_rows.rows(shape)
    names = [_rows.REFERENCE, IN_CHUNKS, _chunked_rows.chunked_name(0.3, 0.6)]
    monkeypatch.setattr(memory, "rows", lambda shape: {name: every[name] for name in names})
    return shape


def test_a_killed_run_continues_and_counts_nothing_twice(few, tmp_path, monkeypatch):
    path, run = tmp_path / "rows.progress.jsonl", {"versions": {}, "hardware": {}}

    def killed_in_timing(*args, **options):
        raise KeyboardInterrupt

    options = {"rounds": 1, "rss": lambda name: None}
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_mean_seconds", killed_in_timing)
        with pytest.raises(KeyboardInterrupt):
            memory.measure(few, **options, progress=_progress.Progress(path, run))
    path.write_text(path.read_text("utf-8") + '{"key": ["cut', "utf-8")
    monkeypatch.setattr(_runs.Run, "count", None)  # another count would be an error
    rows = memory.measure(few, **options, progress=_progress.Progress(path, run))
    assert all(row["seconds"] > 0 for row in rows)
    again = _progress.Progress(path, run)
    assert again.knows((few.name, "seconds", f"{_rows.REFERENCE}/0", 0))
    other = _progress.Progress(path, {**run, "versions": {"torch": "another"}})
    assert not other.knows((few.name, "counts", _rows.REFERENCE))


def test_counts_alone_are_stored_and_shown_without_times(few, tmp_path, capsys):
    path = tmp_path / "memory.jsonl"
    run = _stored.run_of(memory.__file__, [])
    rows = memory.report(few, rounds=0, rss=lambda name: None, output=path, run=run)
    printed = capsys.readouterr().out
    assert {row["seconds"] for row in _stored.read(path, few.name)} == {None}
    assert f"\n| {IN_CHUNKS} | " in printed
    assert "median time" not in printed
    assert "nan" not in printed
    assert not list(tmp_path.glob("*progress*"))
    bars = {bar.name: bar for bar in _memory_tables.found_bars(rows)}
    assert bars[f"{IN_CHUNKS}: largest peak"].is_met
    assert bars[f"{IN_CHUNKS}: mean FLOPs"].is_met


def test_four_bits_on_the_meta_device_are_those_of_a_real_layer():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(96, 160, bias=False), nn.Linear(160, 64, bias=False)).bfloat16()
    options = {"compress_statistics": True, "quant_type": "nf4"}
    real = nn.Sequential()
    for linear in model:
        sizes = linear.in_features, linear.out_features
        layer = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16)
        weight = linear.weight.detach()
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
        real.append(layer.to("cpu"))
    planned = _four_bit.four_bit(model.to("meta"), but="nothing")
    config = LoRAConfig(rank=4, alpha=8, targets="all-linear")
    found = []
    for net in (real, planned):
        inject(net, config)
        x = torch.randn(2, 16, 96, dtype=torch.bfloat16, device=net[0].lora_A.device)

        def adamw(net):
            return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])

        loss = torch.Tensor.sum
        found.append(estimate_memory(net, [x], adamw, loss=loss))
        if net is real:
            optimizer = adamw(net)
            measure_step(net, [x], optimizer, loss=loss)  # makes the optimizer's state
            found.append(measure_step(net, [x], optimizer, loss=loss))
    estimated, measured, planned_step = found
    assert estimated == planned_step
    assert estimated.weights == measured.weights
    assert estimated.peak == pytest.approx(measured.peak, abs=100)
    blocks = [96 * 160 // 64, 160 * 64 // 64]
    scales = sum(n + 4 * -(-n // 256) + 4 * (16 + 256 + 1) for n in blocks)
    adapters = sum(p.numel() * 4 for n, p in real.named_parameters() if "lora" in n)
    assert measured.weights == (96 * 160 + 160 * 64) // 2 + scales + adapters


def test_the_plan_of_lora_in_four_bits_in_small(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "planned.jsonl"
    planned_lora.main(["--quick", "--output", str(path)])
    rows = _stored.read(path, planned_lora.PART)
    assert [row["row"] for row in rows] == [*planned_lora.ROWS]
    table = _planned_tables.planned_lora_table(rows)
    assert table in capsys.readouterr().out
    peaks = [row["memory"]["peak"] for row in rows]
    assert peaks[-1] == min(peaks)


def test_all_modules_in_less_memory_in_small(tmp_path, capsys):
    if not _torch_loss.is_there():
        pytest.skip("torch has its own linear_cross_entropy from 2.13 on")
    path = tmp_path / "recompute.jsonl"
    recompute.main(["--quick", "--output", str(path)])
    rows = _stored.read(path)
    assert _recompute_tables.recompute_table(rows) in capsys.readouterr().out
    for name, shares in recompute.SHARES.items():
        first, *others = (row for row in rows if row["part"] == name)
        mine = [row for row in others if row["row"].startswith("ours")]
        assert len(mine) == len(shares)
        for row, share in zip(mine, shares, strict=True):
            assert row["peak"] <= share * first["peak"]
            assert row["inactive"] or row["flops"] <= max(peer["flops"] for peer in others)
