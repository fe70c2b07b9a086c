"""`Budget(total=...)`: weights, state and step together stay within one number, in every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from devices import peak_above, saved_and_loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from language_model import LanguageModel, tokens
from torch import Tensor, nn
from toy import named, same, weights

from dynalora_optim import Blocks, Bounded, Budget, DynamicAllocationOptimizer, LiveBytes, Pause
from dynalora_optim._base.live_bytes import storage_bytes

ROWS = 16


class WithLoss(LanguageModel):
    """A language model that computes its loss itself, as those of transformers do."""

    def forward(self, batch: Tensor) -> Tensor:
        logits = super().forward(batch)[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())


@dataclass
class Run:
    """A run of a tiny language model on a total; nothing of it exists before ``steps`` begin."""

    rule: Any = torch.optim.AdamW
    options: dict[str, Any] = field(default_factory=dict)
    wrapper: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    rows: int = ROWS
    period: int = 3
    max_idle: int = 0

    def build(self, total: int | str) -> None:
        torch.manual_seed(0)
        self.model = WithLoss(4).to(self.dtype)
        inner = self.rule(self.model.parameters(), lr=1e-3, **self.options)
        budget = Budget(total=total)
        self.optimizer = DynamicAllocationOptimizer(
            inner,
            self.model,
            allocator=Bounded(budget, self.max_idle) if self.max_idle else budget,
            groups="blocks",
            period=self.period,
            **self.wrapper,
        )
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, 1.0, 10)

    def peaks(self, total: int | str, steps: int) -> list[int]:
        """The most bytes alive in each step of a new run: of everything, weights included."""
        with LiveBytes() as memory:
            self.build(total)
            fixed = storage_bytes([*self.model.parameters(), *self.model.buffers()])
            fixed -= memory.size([*self.model.parameters(), *self.model.buffers()])
            found = []
            for step in range(steps):
                memory.restart()
                self.step(step)
                found.append(memory.peak + fixed)
        return found

    def step(self, step: int) -> None:
        loss = self.model(tokens(step, self.rows))
        loss.backward()
        del loss
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def least(self, total: int = 1000) -> int:
        """The smallest total that is accepted, as the refusal of ``total`` says."""
        self.build(total)
        with pytest.raises(ValueError, match="pass at least total=") as refused:
            self.step(0)
        return named(refused.value)

    def fits(self, total: int) -> bool:
        """Whether the first two steps are accepted."""
        try:
            self.build(total)
            self.step(0)
            self.step(1)
        except ValueError:
            return False
        return True


MODES = {
    "keep": Run(),
    "drop": Run(wrapper={"pause": "drop"}, period=5),
    "offload": Run(wrapper={"pause": "offload"}, options={"amsgrad": True}),
    "masters": Run(dtype=torch.bfloat16, wrapper={"pause": "drop", "master_weights": "stochastic"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_no_step_of_a_long_run_exceeds_the_total(mode):
    run = MODES[mode]
    total = run.least() * 6 // 5
    peaks = run.peaks(total, 200 if mode == "drop" else 40)
    assert max(peaks) <= total
    assert max(peaks) >= 0.85 * total  # what is promised is not far too high
    assert len({entry.chosen for entry in run.optimizer.record}) > 1


RULES = st.sampled_from(
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
        (torch.optim.Rprop, {}),
    ]
)


@settings(max_examples=8)
@given(
    rule=RULES,
    pause=st.sampled_from(["keep", "drop", "offload"]),
    low=st.booleans(),
    rounding=st.sampled_from([None, "nearest", "stochastic"]),
    rows=st.integers(1, 24),
    spare=st.sampled_from([1, 1, 1.05, 1.5]),  # 1: exactly the least that the refusal names
    period=st.integers(1, 4),
    max_idle=st.sampled_from([0, 12]),
)
def test_no_step_exceeds_the_total_whatever_the_settings(rule, pause, low, rounding, spare, **rest):
    make, options = rule
    dtype = torch.bfloat16 if low else torch.float32
    wrapper = {"pause": pause, "master_weights": rounding}
    run = Run(make, options, wrapper, dtype, **rest)
    total = int(run.least() * spare)
    assert max(run.peaks(total, 12)) <= total


def test_the_least_total_that_a_refusal_names_is_accepted_and_one_byte_less_is_not():
    run = MODES["drop"]
    least = run.least()
    assert max(run.peaks(least, 6)) <= least
    with pytest.raises(ValueError, match=f"pass at least total={least} "):
        run.peaks(least - 1, 1)
    assert Run(max_idle=12, rows=1).fits(10**6)


@pytest.mark.parametrize("options", [{}, {"foreach": True}])
def test_the_least_total_of_a_bound_is_enough_for_the_block_that_takes_the_most(options):
    run = Run(options=options, rows=1, max_idle=12)
    least = run.least()
    assert max(run.peaks(least, 13)) <= least
    assert not run.fits(least - 1)


def test_a_refusal_names_the_parts_and_what_lowers_them_and_changes_nothing():
    run = Run(rows=2)
    run.build(20_000)
    before = weights(run.model)
    with pytest.raises(ValueError, match=r"Budget\(total=20000\) cannot hold") as refused:
        run.step(0)
    message = str(refused.value)
    for part in ("weights 5.", "optimizer state 10.", "gradients", "rest of the step"):
        assert part in message
    for remedy in ("a loss in chunks", 'pause="offload" or "drop"', "shorter rows"):
        assert remedy in message
    assert same(before, weights(run.model))
    assert not run.optimizer.state
    assert not run.optimizer.record
    small = Run(dtype=torch.bfloat16, rows=1, wrapper={"pause": "drop"})
    small.build(2_000)
    with pytest.raises(ValueError, match="frozen weights in 4 bits"):
        small.step(0)


def test_dropping_idle_state_lowers_the_least_total():
    kept, dropped = (Run(wrapper={"pause": state}).least() for state in ("keep", "drop"))
    assert dropped < kept
    assert Run(wrapper={"pause": "offload"}).least() == kept  # on a CPU the host is the device


def test_existing_state_of_what_never_trains_counts():
    plain = Run()
    fresh, least = plain.least(), 0
    plain.build(1000)
    plain.optimizer.close()
    inner = torch.optim.AdamW(plain.model.parameters())
    plain.model(tokens(0)).backward()
    inner.step()
    inner.zero_grad()
    for outside in ("frozen", "always_active"):
        rule = Blocks(outside=outside)
        options = {"allocator": Budget(total=1000), "groups": rule, "pause": Pause("drop")}
        optimizer = DynamicAllocationOptimizer(inner, plain.model, **options)
        with pytest.raises(ValueError, match="pass at least total=") as refused:
            plain.model(tokens(0, ROWS))
        least = named(refused.value)
        # Beside embeddings that train, the largest block must fit too: 3104 bytes more.
        assert least > Run(wrapper={"pause": "drop"}).least() - 3104 - 2000
        optimizer.close()
    assert least < fresh


def test_the_report_shows_all_parts_beside_the_total():
    run = Run(wrapper={"pause": "drop"})
    total = run.least() * 5 // 4
    peaks = run.peaks(total, 11)  # the last two with the choice of the report
    report = run.optimizer.memory_report()
    assert report.total == total
    assert report.current.whole == sum(report.current.process.values())
    assert max(peaks[-2:]) <= report.current.whole <= total < report.all_active.whole
    process = report.current.process
    assert process["weights"] == storage_bytes(run.model.parameters())
    assert process["step"] == report.current.peak
    shown = str(report)
    for row in ("process: weights", "process: optimizer state", "everything", "allowed (total)"):
        assert row in shown


def test_a_report_of_a_batch_counts_what_the_process_holds_before_any_step():
    run = Run()
    run.build(10**6)
    report = run.optimizer.memory_report(tokens(0, ROWS))
    assert report.all_active.whole > report.all_active.peak + report.weights
    assert "allowed (total)" in str(report)


def test_without_a_total_the_report_has_no_such_rows():
    run = Run()
    run.build(10**6)
    run.optimizer.close()
    inner = torch.optim.AdamW(run.model.parameters())
    optimizer = DynamicAllocationOptimizer(
        inner, run.model, allocator=Budget(memory="1MiB"), groups="blocks"
    )
    report = optimizer.memory_report(tokens(0))
    assert report.total is None
    assert report.current.whole == 0
    assert "process" not in str(report)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_goes_on_bit_for_bit(stop):
    total = Run().least() * 6 // 5
    whole, resumed = Run(), Run()
    whole.build(total)
    for step in range(stop):
        whole.step(step)
    states = saved_and_loaded(whole.model, whole.optimizer, whole.scheduler)
    resumed.build(total)
    for name, state in zip(("model", "optimizer", "scheduler"), states, strict=True):
        getattr(resumed, name).load_state_dict(state)
    for step in range(stop, 10):
        whole.step(step)
        resumed.step(step)
    assert same(weights(whole.model), weights(resumed.model))
    assert list(whole.optimizer.record) == list(resumed.optimizer.record)


def test_a_state_dict_with_another_total_is_loaded_and_the_new_total_counts(caplog):
    run, other = Run(), Run()
    total = run.least() * 6 // 5
    run.build(2 * total)
    for step in range(4):
        run.step(step)
    _, state = saved_and_loaded(run.model, run.optimizer)
    other.build(3 * total)
    other.optimizer.load_state_dict(state)
    assert f"total={2 * total}" in caplog.text
    assert f"total={3 * total}" in caplog.text
    other.step(4)
    report = other.optimizer.memory_report()
    assert report.total == 3 * total
    other.build(total // 2)
    with pytest.raises(ValueError, match=f"total={total // 2}"):
        other.optimizer.load_state_dict(state)


def test_the_total_is_kept_by_what_the_device_itself_counts(device):
    def run(total: int, steps: int) -> int:
        """The most bytes in use; on a GPU by its allocator, whatever else is there included."""
        torch.manual_seed(0)
        model = WithLoss(3).to(device)
        inner = torch.optim.AdamW(model.parameters())
        optimizer = DynamicAllocationOptimizer(
            inner, model, allocator=Budget(total=total), groups="blocks", period=2, pause="drop"
        )
        most = 0
        for step in range(steps):
            state = [value for one in optimizer.state.values() for value in one.values()]
            before = storage_bytes([*model.parameters(), *state])
            with peak_above(device) as peak:
                model(tokens(step, 64).to(device)).backward()
                optimizer.step()
                optimizer.zero_grad()
            on_gpu = device == "cuda"
            now = torch.cuda.max_memory_allocated() if on_gpu else before + peak.allocated
            most = max(most, now)
        return most

    with pytest.raises(ValueError, match="pass at least total=") as refused:
        run(1000, 1)
    total = named(refused.value) * 5 // 4
    assert run(total, 8) <= total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
def test_the_device_is_a_total():
    torch.manual_seed(0)
    model = WithLoss(3).to("cuda")
    optimizer = DynamicAllocationOptimizer(
        torch.optim.AdamW(model.parameters()),
        model,
        allocator=Budget(total="device"),
        groups="blocks",
    )
    model(tokens(0).to("cuda")).backward()
    optimizer.step()
    report = optimizer.memory_report()
    free, whole = torch.cuda.mem_get_info()
    assert report.total is not None
    assert free / 2 < report.total < whole
    assert report.current.whole <= report.total


def test_the_device_of_a_cpu_is_refused_at_the_first_forward():
    run = Run()
    run.build("device")
    with pytest.raises(ValueError, match=r'needs a CUDA device.*total="24GiB"'):
        run.step(0)
    assert not run.optimizer.record


def test_a_wrapper_without_the_total_is_told_so():
    class Wrapped:
        uses_active = False

        def __init__(self) -> None:
            self.budget = Budget(total=10**6)
            self.select, self.plan = self.budget.select, self.budget.plan
            self.fitting = self.budget.fitting

    run = Run()
    run.build(10**6)
    run.optimizer.close()
    inner = torch.optim.AdamW(run.model.parameters())
    optimizer = DynamicAllocationOptimizer(inner, run.model, allocator=Wrapped(), groups="blocks")
    with pytest.raises(ValueError, match="must have its attribute total"):
        run.model(tokens(0))
    assert not optimizer.record


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("7KiB", 7168),
        ("0.1GB", 10**8),
        ("3MB", 3_000_000),
        ("2kB", 2000),
        (" 12 bytes ", 12),
    ],
)
def test_amounts_as_texts(text, size):
    assert Budget(memory=text).memory == size
    assert Budget(total=text).total == size
    assert Budget(memory=text) == Budget(memory=size)


def test_numbers_of_numpy_are_amounts_and_are_kept_as_plain_numbers():
    numpy = pytest.importorskip("numpy")
    budgets = Budget(total=numpy.int64(10**9)), Budget(memory=numpy.float64(0.5))
    assert budgets == (Budget(total=10**9), Budget(memory=0.5))
    assert [type(budgets[0].total), type(budgets[1].memory)] == [int, float]


@pytest.mark.parametrize(
    ("amounts", "error", "words"),
    [
        ({"memory": "20 gigs"}, ValueError, "20 gigs.*GiB, MiB"),
        ({"memory": "device"}, ValueError, "not an amount"),
        ({"memory": "0GiB"}, ValueError, "not positive"),
        ({"memory": "-1GiB"}, ValueError, "not an amount"),
        ({"total": "0.5"}, ValueError, "not an amount"),
        ({"total": "1e3MiB"}, ValueError, "not an amount"),
        ({"total": f"{'9' * 5000}GiB"}, ValueError, r"Budget\(total=.*not an amount"),
        (
            {"total": 0.5},
            TypeError,
            r"total=0.5\) is not a number of bytes; pass bytes",
        ),
        ({"total": 0}, ValueError, "not positive"),
        ({"total": True}, TypeError, "total=True"),
        ({"total": [1]}, TypeError, "total="),
        ({"total": "1GiB", "memory": 0.5}, ValueError, "exactly one"),
        ({}, ValueError, "exactly one"),
        ({"memory": 1.5}, ValueError, r"share in \(0, 1\]"),
        ({"memory": float("nan")}, ValueError, r"share in \(0, 1\]"),
    ],
)
def test_amounts_that_make_no_sense(amounts, error, words):
    with pytest.raises(error, match=words):
        Budget(**amounts)
