"""The memory benchmark: its counters by hand, its fronts, and a run in small."""

import importlib
import logging
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as for a script there
_bars = importlib.import_module("_bars")
_chunked_rows = importlib.import_module("_chunked_rows")
_count = importlib.import_module("_count")
_fronts = importlib.import_module("_fronts")
_full_tables = importlib.import_module("_full_tables")
_measure = importlib.import_module("_measure")
_memory_tables = importlib.import_module("_memory_tables")
_overhead_tables = importlib.import_module("_overhead_tables")
_rows = importlib.import_module("_rows")
_rss = importlib.import_module("_rss")
_shapes = importlib.import_module("_shapes")
_stored = importlib.import_module("_stored")
full_parameter = importlib.import_module("full_parameter")
memory = importlib.import_module("memory")
overhead = importlib.import_module("overhead")

# Of the rows below, in floats: the batch, the hidden values, the output, a scalar, the two weights.
ROWS, IN, HIDDEN, OUT = 11, 5, 7, 3
X, H, Y, ONE, W1, W2 = (4 * n for n in (ROWS * IN, ROWS * HIDDEN, ROWS * OUT, 1, 35, 21))


def two_layers(trains_first=True):
    model = nn.Sequential(
        nn.Linear(IN, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, OUT, bias=False)
    )
    model[0].requires_grad_(trains_first)
    x = torch.randn(ROWS, IN)
    return _count.count(lambda: model(x).sum())


def test_saved_bytes_and_peak_of_two_layers_are_those_by_hand():
    counted = two_layers()
    # ReLU keeps its output, which is the second layer's input. The first layer's existed before.
    assert counted.saved == H
    # ReLU's backward: its output, the gradient it gets and the one it makes; W2's gradient, the
    # loss and the loss's gradient are alive as well. The forward never held more than 2 H.
    assert counted.peak == 3 * H + W2 + 2 * ONE
    assert counted.forward == 2 * ROWS * (IN * HIDDEN + HIDDEN * OUT)
    assert counted.backward == 2 * ROWS * (IN * HIDDEN + 2 * HIDDEN * OUT)


def test_what_ends_above_the_first_layer_costs_less_by_hand():
    counted = two_layers(trains_first=False)
    assert counted.saved == H
    assert counted.peak == 2 * H  # the first layer's output and ReLU's: more than any of backward
    assert counted.backward == 2 * ROWS * HIDDEN * OUT


def test_a_front_is_compared_at_equal_memory():
    peers = [(1.0, 1.0), (0.2, 2.0), (0.6, 1.8)]  # (0.6, 1.5) is on the line of the other two
    assert _fronts.pareto(peers) == [(0.2, 2.0), (0.6, 1.8), (1.0, 1.0)]
    assert _fronts.between(peers, 0.4) == pytest.approx(1.9)
    assert _fronts.between(peers, 0.1) == math.inf
    assert _fronts.between(peers, 2.0) == 1.0
    assert _fronts.worst_ratio([(0.2, 0.5)], peers) == pytest.approx(0.5)
    assert _fronts.worst_ratio([(0.4, 0.9)], peers) == pytest.approx(0.9)  # nothing of ours below
    assert _fronts.worst_ratio([(0.2004, 0.5)], peers) == pytest.approx(0.5)  # as printed
    untimed = [(memory, math.nan) for memory in (0.1, 0.4, 1.0)]
    assert math.isnan(_fronts.worst_ratio(untimed, untimed)), "a target that was not measured"
    assert _fronts.worst_point([(0.1, 9.0), (1.0, 1.5)], peers) == pytest.approx(1.5)


def test_a_bar_is_compared_as_printed_and_a_chance_must_be_above_zero():
    assert _bars.Bar("peak", 1.0004, 1.0).is_met
    assert not _bars.Bar("peak", 1.0006, 1.0).is_met
    assert _bars.Bar("chance", 1e-9, 0.0, above=True).is_met
    assert not _bars.Bar("chance", 0.0, 0.0, above=True).is_met


def test_a_step_named_in_every_is_taken_in_those_rounds_only():
    taken = {"a": 0, "b": 0}

    def step(name):
        taken[name] += 1

    steps = {name: lambda name=name: step(name) for name in taken}
    seconds = _measure.median_seconds(steps, rounds=4, warm_up=1, every={"b": 2})
    assert taken == {"a": 5, "b": 3}
    assert seconds.keys() == steps.keys()


def global_state():
    """What is logged and warned of, and how many threads compute."""
    ours, theirs = logging.getLogger("dynalora_optim"), transformers.logging
    return ours.level, theirs.get_verbosity(), torch.get_num_threads(), [*warnings.filters]


@pytest.fixture
def unchanged():
    """A script changes nothing for what runs after it in the same process."""
    before = global_state()
    yield
    assert global_state() == before


def small(**options):
    return replace(_shapes.quick(_shapes.ROBERTA), **options)


def test_rows_share_the_frozen_weights_and_train_a_head_of_their_own():
    shape = small()
    bare = shape.bare()
    before = {id(p) for p in bare.parameters()}
    models = [
        _chunked_rows.rows(shape)[name](shape, bare).model for name in [*_rows.PEER_FRONT][:2]
    ]
    trained = [{p for p in model.parameters() if p.requires_grad} for model in models]
    assert all(trained)
    assert not trained[0] & trained[1]
    assert not any(id(p) in before for p in trained[0] | trained[1])
    frozen = [{id(p) for p in model.parameters() if not p.requires_grad} for model in models]
    embeddings = models[0].get_input_embeddings().weight
    assert id(embeddings) in before & frozen[0] & frozen[1]


def test_the_control_freezes_another_third_of_the_modules_at_each_step():
    shape = small()
    run = _rows.random_pefts(shape, shape.bare())
    drawn = []
    for _ in range(3):
        _, trains, _ = run.choice()
        drawn.append({name for name in trains if "lora_A" in name})
        run.step()
    assert [len(modules) for modules in drawn] == [16, 16, 16]  # of 24
    assert drawn[0] != drawn[1] != drawn[2]


def test_checkpointed_rows_hold_less_and_compute_the_forward_again():
    shape = small()
    bare = shape.bare()
    rows = [_chunked_rows.rows(shape)[name](shape, bare) for name in _rows.PEER_FRONT]
    counts = [_count.count(run.loss) for run in rows]  # every 4th, 2nd, each
    peaks = [counted.peak for counted in counts]
    assert peaks == sorted(peaks, reverse=True)
    extra = [counted.backward - counts[0].backward for counted in counts]
    assert extra[1] * 4 == extra[2] * 2 == extra[3]
    assert 0 < extra[3] <= counts[0].forward  # without what comes after the blocks
    assert len({counted.forward for counted in counts}) == 1


def test_a_choice_met_before_is_not_counted_again_but_updated():
    shape = small(draws=40)
    run = _rows.budgeted(shape, shape.bare(), memory=0.75, compute=1.0)
    known = {}
    counted = run.count(known)
    assert len(counted) == len(run.choices) == 40
    assert set(known) == set(run.choices)
    assert len(known) < 40
    assert counted == [known[choice] for choice in run.choices]
    updates = sum(run.optimizer.record.counts().values())
    assert updates == sum(len(active) for active, *_ in run.choices)
    costs = run.budget.contexts[-1].costs
    assert max(c.peak for c in counted) <= 0.75 * costs.peak(costs.all_active)


@pytest.mark.usefixtures("unchanged")
def test_the_benchmark_in_small(tmp_path, capsys):
    path = tmp_path / "memory.jsonl"
    memory.main(["--quick", "--shape", "roberta", "--no-rss", "--output", str(path)])
    printed = capsys.readouterr().out
    shape = small()
    names = _chunked_rows.rows(shape)
    for name in names:
        assert f"\n| {name} | " in printed
    rows = _stored.read(path, "roberta")
    assert [row["row"] for row in rows] == [*names]
    for row in rows:
        values = [value for value in row.values() if isinstance(value, (int, float))]
        assert all(math.isfinite(value) for value in values)
        assert "python benchmarks/memory.py --quick --shape roberta" in row["run"]["command"]
    results = _memory_tables.results(rows)
    assert results[_rows.REFERENCE].peak == results[_rows.REFERENCE].added == 1.0
    bars = _memory_tables.found_bars(rows)
    for bar in bars:
        assert f"\n| {bar.name} | " in printed
    assert len(bars) == 24
    assert (tmp_path / "memory_roberta.png").stat().st_size > 10_000
    for share, compute in shape.budgets:
        assert results[_rows.budget_name(share, compute)].peak <= share


def test_the_large_shapes_run_without_a_gpu_in_small(tmp_path, capsys):
    budgets = ((0.4, 1.0), (0.01, 1.0))
    shape = replace(_shapes.quick(_shapes.LARGE[0]), device="cpu", budgets=budgets)
    run = _stored.run_of(memory.__file__, [])
    path = tmp_path / "memory.jsonl"
    rows = memory.report(shape, rounds=1, rss=lambda name: None, output=path, run=run)
    refused = [row["row"] for row in rows if "refused" in row]
    assert refused == [_rows.budget_name(0.01, 1.0)]
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert f"\n{refused[0]} is missing: " in printed  # and says what would do
    assert {row["row"] for row in rows} == _chunked_rows.rows(shape).keys()
    results = _memory_tables.results(rows)
    assert results.keys() == _chunked_rows.rows(shape).keys() - {*refused}
    assert all(result.tokens > 0 for result in results.values())


def test_what_is_held_back_and_the_threads_are_put_back():
    before = global_state()
    with _measure.quiet(FutureWarning), _measure.threads(2):
        held_back = global_state()
        assert held_back[:2] == (logging.ERROR, logging.ERROR)
        assert held_back[2] == 2
    assert global_state() == before


@pytest.mark.usefixtures("unchanged")
def test_full_parameter_training_in_small_stores_what_it_prints(tmp_path, capsys):
    pytest.importorskip("badam")
    path = tmp_path / "full.jsonl"
    full_parameter.main(["--quick", "--output", str(path)])
    printed = capsys.readouterr().out
    shape = full_parameter.QUICK.name
    measured, planned = _stored.read(path, shape), _stored.read(path, "planned")
    for make in ("memory_table", "everywhere_table", "times_table", "bars_table"):
        assert getattr(_full_tables, make)(measured) in printed
    assert _full_tables.planned_table(planned) in printed
    assert {row["kind"] for row in measured} == {"shape", "measured", "rehearsed", "timed"}


def test_a_gpu_is_not_asked_to_hold_full_fine_tuning():
    shape = _shapes.LARGE[1]
    assert _rows.FULL not in _chunked_rows.rows(shape)
    assert _rows.FULL in _chunked_rows.rows(replace(shape, device="cpu"))


def test_the_published_sizes_are_those_of_their_parameters():
    sizes = []
    for shape in _shapes.LARGE:
        with torch.device("meta"):
            model = shape.model(shape.config())
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes == [1_235_814_400, 8_030_261_248]  # as published on their model cards, exactly


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_resident_bytes_come_from_a_process_of_its_own():
    kept = [
        _rss.measured_apart(name, "--shape", "roberta", "--quick")
        for name in (_rows.REFERENCE, _rows.ALL_ACTIVE)
    ]
    assert all(0 < resident < 2**30 for resident in kept)


# What knowing costs


def test_the_wrapper_dispatches_nothing_and_the_forward_measure_little():
    wraps = {name: overhead.GROUP_ROWS[name][0] for name in overhead.GROUP_ROWS}
    groups = 5
    ops = overhead.counted(
        {name: overhead.chain_step(groups, wrap) for name, wrap in wraps.items()}
    )
    plain = ops["our LoRA, AdamW"]
    assert ops["wrapped, not measured"] == plain
    assert ops["wrapped, forward measure"] == plain + 2 * groups + 1
    assert ops["wrapped, one active in turn"] < ops["wrapped, forward measure, 2/3 active"] < plain


def test_a_row_says_what_a_reallocation_adds():
    expected, run = overhead.group_rows(), _stored.run_of(overhead.__file__, [])
    measured = [{**row, "run": run} for row in overhead.measured_groups(3, 2)]
    table = _overhead_tables.group_table(measured)
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == list(expected)
    fixed = {row[0].strip("| ") for row in rows if row[-1] == "- |"}
    assert fixed == {name for name, (_, twin) in expected.items() if twin is None}


def test_without_the_badam_package_its_row_is_left_out(monkeypatch):
    monkeypatch.setattr(overhead, "is_installed", lambda: False)
    assert overhead.group_rows() == overhead.GROUP_ROWS
