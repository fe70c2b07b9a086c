"""Any sequence of what a training script does: the plain optimizer with the same frozen set.

Hypothesis drives three runs of one loop in step. The *leader* is ours and makes every move. The
*plain* run makes them too, with torch's own optimizer; which modules train is read from the leader
and imposed on it. The *follower* is ours and makes only the moves that affect training, in the
plainest way, or is what was left behind when the leader went on from a file or as a copy: it must
choose the same modules. After every move all that can be seen of them is equal bit for bit, or all
have raised the same error.

``tox run -e loops`` (``HYPOTHESIS_PROFILE=deep pytest tests/test_state_machine.py``) runs a
thousand scripts, and a hundred more that also go on in processes of their own.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from processes import finished, start
from strategies import any_allocator
from training_loop import (
    CLIPS,
    KEEPS_STATE,
    LAYERS,
    MOST_LAYERS,
    NO_MOMENTUM,
    RULES,
    SCHEDULES,
    Boom,
    Interrupt,
    Loop,
    go_on,
)

from dynalora_optim import ForwardNorm, GradientNorm, Once, Sensitivity
from dynalora_optim.allocation._context import uses_active
from dynalora_optim.update._param_groups import PACKED

CHECKPOINTS = ("", "recorded", "reentrant")  # "recorded": what torch calls non-reentrant

pauses = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "state": st.sampled_from(["keep", "offload", "drop"]),
            "moments": st.sampled_from(["keep", "reset_momentum", "reset"]),
            "warmup": st.sampled_from([0, 3]),
        }
    ),
).map(lambda pause: {"state": "keep", "moments": "keep", "warmup": 0, **pause})


def is_valid(chosen: dict[str, Any]) -> bool:
    pause = chosen["pause"]
    forgets = pause["state"] == "drop" or pause["moments"] == "reset"
    if pause["moments"] == "reset_momentum" and chosen["rule"] in NO_MOMENTUM:
        return False
    return not (pause["state"] == "drop" and pause["moments"] != "keep") and not (
        forgets and chosen["rule"] in KEEPS_STATE
    )


options = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["flagged", "lora", "blocks"]),
        "rule": st.sampled_from(sorted(RULES)),
        "schedule": st.sampled_from(sorted(SCHEDULES)),
        "schedule_inner": st.booleans(),
        "frozen": st.sampled_from([0, 0, 1, 2]),  # modules at first
        "holds_frozen": st.booleans(),  # whether the optimizer holds these from the beginning
        "checkpoints": st.sampled_from(CHECKPOINTS),
        "checkpoint_idle": st.booleans(),
        "measure": st.sampled_from(
            [ForwardNorm(), ForwardNorm(p=1), GradientNorm(), Sensitivity()]
        ),
        "window": st.sampled_from(["run", "period"]),
        "every": st.sampled_from([1, 1, 2]),
        "probe": st.booleans(),  # of a gradient measure
        "allocator": any_allocator,
        "active": st.integers(1, LAYERS - 2) | st.sampled_from([0.3, 0.5, 0.9, 1.0]),
        "period": st.integers(1, 3) | st.integers(1, 6).map(Once),
        "seed": st.integers(0, 2**32),
        "warmup": st.sampled_from([0, 0, 2]),
        "lr_time": st.sampled_from(["global", "global", "local", "own"]),
        "pause": pauses,
    }
).filter(is_valid)


def options_of(chosen: dict[str, Any]) -> dict[str, Any]:
    """The options as drawn; a probe is of a gradient measure that needs no update."""
    is_gradient = isinstance(chosen["measure"], (GradientNorm, Sensitivity))
    return {**chosen, "probe": chosen["probe"] and is_gradient}


def error_of(move: Callable[..., Any], *arguments: Any) -> BaseException | None:
    try:
        move(*arguments)
    except (RuntimeError, ValueError, TypeError, Boom, Interrupt) as error:
        return error
    return None


def assert_equal(ours: Any, plain: Any, what: str) -> None:
    """Fail unless two tensors (or None, or numbers) are the same bit for bit."""
    if isinstance(ours, torch.Tensor) and isinstance(plain, torch.Tensor):
        if ours.dtype == plain.dtype and torch.equal(ours, plain):
            return
        torch.testing.assert_close(
            ours, plain, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )
    else:
        assert type(ours) is type(plain), what
        assert ours == plain or (ours != ours and plain != plain), f"{what}: {ours} != {plain}"


class TrainingScript(RuleBasedStateMachine):
    """Three runs, their moves, and a ledger of what must have come of them."""

    @initialize(chosen=options)
    def begin(self, chosen):
        self.chosen = options_of(chosen)
        self.leader, self.follower = Loop(self.chosen), Loop(self.chosen)
        self.plain = Loop(self.chosen, plain=True)
        self.active = chosen["active"]
        self.batches = 0  # used so far
        self.over = False  # an error has ended all runs
        self.held = False
        self.snapshot: Any = None
        self.left_behind: list[tuple[Loop, dict[str, torch.Tensor]]] = []
        self.begin_ledger()
        self.impose()

    def begin_ledger(self) -> None:
        self.steps = 0  # made by our optimizer
        self.active_sum = 0  # of the sizes of the active sets that these steps found
        self.selected_at: list[int] = []
        self.selection_made()

    def selection_made(self) -> None:
        self.selected_at.append(self.steps)
        self.newcomer_waits = False
        modules, active = len(self.leader.optimizer.groups), self.active
        self.size = active if isinstance(active, int) else max(1, round(active * modules))
        if self.steps < self.chosen["warmup"]:
            self.size = modules
        elif not uses_active(self.chosen["allocator"]):
            self.size = None  # as the scores have it

    def is_due(self) -> bool:
        since, period = self.steps - self.chosen["warmup"], self.chosen["period"]
        if since <= 0:
            return since == 0
        on_time = since == period.at if isinstance(period, Once) else since % period == 0
        return on_time or self.newcomer_waits

    def take_batches(self, count: int) -> range:
        self.batches += count
        return range(self.batches - count, self.batches)

    # How the three go on

    def do(self, move: str, *arguments: Any, quiet: str | None = None, rest: Any = None) -> bool:
        """Make a move in all runs; ``quiet`` ("" for none) is that of the follower."""
        error, other = (
            error_of(getattr(run, move), *arguments) for run in (self.leader, self.plain)
        )
        assert type(error) is type(other), (move, error, other)
        if move_of_follower := move if quiet is None else quiet:
            rest = arguments if rest is None else rest
            third = error_of(getattr(self.follower, move_of_follower), *rest)
            assert type(third) is type(error), (move, error, third)
        self.over = error is not None and not isinstance(error, (Boom, Interrupt))
        return error is None

    def waiting(self) -> set[str]:
        """The modules that train as far as the script is concerned, but have not joined yet."""
        names = set(self.leader.model.names()) - set(self.leader.frozen)
        return names if self.leader.closed else names - set(self.leader.optimizer.groups)

    def trained(self, *, at_step: bool = False) -> set[str]:
        """The modules that get gradients now, or that this step updates."""
        if self.leader.closed:
            return self.waiting()
        optimizer = self.leader.optimizer
        active = set(optimizer.active_groups)
        if at_step and active != set(optimizer.groups):
            return active
        return active | self.waiting()

    def impose(self) -> None:
        if not self.over:
            self.plain.freeze(self.trained())

    def update(self, move: str, *arguments: Any, **quiet: Any) -> None:
        """Make a move that ends in a step of the optimizer."""
        closed, joining = self.leader.closed, self.waiting()
        trained = self.trained(at_step=True)
        self.plain.waits = joining - trained
        if move == "step":  # the others clip within it, before
            self.plain.drop(joining - trained)
        batches = arguments[0] if arguments else ()  # of a closure
        moved = {
            name
            for name, params in self.plain.model.groups().items()
            if name in trained and (batches or any(p.grad is not None for p in params))
        }
        if not self.do(move, *arguments, **quiet) or closed:
            return
        after = set(self.leader.optimizer.active_groups)
        returning = after - trained
        self.plain.local.advance(moved, returning)
        self.plain.freeze(self.trained(), returning=returning)
        self.count_step(trained, joining)

    def count_step(self, trained: set[str], joining: set[str]) -> None:
        joined = bool(joining)
        if joined and joining <= trained:
            self.selected_at.append(self.steps)
            self.size = None if self.size is None else self.size + len(joining)
        elif joined:
            self.newcomer_waits = True
        self.steps += 1
        self.active_sum += len(trained)
        if self.is_due() and not self.held:
            self.selection_made()

    @precondition(lambda self: self.over)
    @rule()
    def end(self):
        """Do nothing: all runs have ended in the same error."""

    # Moves that affect training

    @precondition(lambda self: not self.over)
    @rule(
        micro_batches=st.integers(1, 3),
        how=st.sampled_from(["plain", "plain", "plain", "closure", "scaler", "save between"]),
        schedule=st.booleans(),
    )
    def train(self, micro_batches, how, schedule):
        numbers = self.take_batches(micro_batches)
        if how == "scaler" and (self.leader.pending or self.chosen["probe"]):
            how = "plain"  # no scaled gradients beside others; a probe reads them as they come
        if how == "closure":
            self.train_by_closure(numbers, False)
        else:
            for number in numbers:
                self.do("backward", number, how == "scaler", rest=(number,))
                if how == "save between":
                    self.leader.saved()
            if how == "scaler":
                self.follower.clipped()
                self.update("step_by_scaler", quiet="step")
            else:
                self.do("clipped")
                self.update("step")
        if not self.over:
            self.do("zero_grad", True)
        if schedule and not self.over:
            self.do("step_schedulers")

    def train_by_closure(self, numbers: range, fails: bool) -> None:
        self.update("step_by_closure", numbers, fails)

    @precondition(lambda self: not self.over)
    @rule(fails=st.booleans(), micro_batches=st.integers(0, 2))
    def step_by_closure(self, fails, micro_batches):
        self.train_by_closure(self.take_batches(micro_batches), fails)

    @precondition(lambda self: not self.over)
    @rule(twice=st.booleans())
    def backward(self, twice):
        (number,) = self.take_batches(1)
        self.do("backward", number, False, twice)

    @precondition(lambda self: not self.over)
    @rule(count=st.integers(2, 3), between=st.sampled_from(["", "reference", "evaluation"]))
    def backward_of_all(self, count, between):
        numbers = self.take_batches(count)
        self.do("backward_of_all", numbers, between, rest=(numbers, ""))

    @precondition(lambda self: not self.over)
    @rule()
    def discard(self):
        (number,) = self.take_batches(1)
        self.do("discard", number)

    @precondition(lambda self: not self.over)
    @rule()
    def clip(self):
        self.do("clipped")

    @precondition(lambda self: not self.over)
    @rule()
    def step(self):
        self.update("step")

    @precondition(lambda self: not self.over)
    @rule(set_to_none=st.booleans(), by_model=st.booleans())
    def zero_grad(self, set_to_none, by_model):
        self.do("zero_grad", set_to_none, by_model)

    @precondition(lambda self: not self.over)
    @rule()
    def step_schedulers(self):
        self.do("step_schedulers")

    @precondition(lambda self: not self.over)
    @rule(
        where=st.sampled_from(["forward", "interrupt", "backward"]),
        block=st.integers(0, MOST_LAYERS),
    )
    def fail(self, where, block):
        (number,) = self.take_batches(1)
        names = self.leader.model.names()
        trained = [names.index(name) for name in self.trained()]
        place = block % len(names)
        # What the plain run makes require a gradient below all that trains may be cut off in ours,
        # and a probe may go back further than the plain run does.
        never = place not in trained if self.chosen["probe"] else place < min(trained, default=0)
        if where == "backward" and never:
            where = "forward"
        self.do("fail", where, block, number)

    @precondition(lambda self: not (self.over or self.leader.pending))
    @rule()
    def overflow(self):
        (number,) = self.take_batches(1)
        self.do("overflow", number)
        for run in (self.leader, self.plain):
            run.step_by_scaler()
        self.do("zero_grad", True)

    @precondition(lambda self: not self.over)
    @rule(clip=st.sampled_from(CLIPS))
    def set_clip(self, clip):
        self.do("set_clip", clip)

    @precondition(lambda self: not self.over)
    @rule(training=st.booleans())
    def set_mode(self, training):
        self.do("set_mode", training)

    @precondition(lambda self: not self.over)
    @rule(kind=st.sampled_from(CHECKPOINTS))
    def set_checkpoints(self, kind):
        self.do("set_checkpoints", kind)

    @precondition(lambda self: not self.over)
    @rule(
        line=st.integers(0, 5),
        option=st.sampled_from([("lr", 0.02), ("lr", 0.2), ("weight_decay", 0.3)]),
        inside=st.booleans(),
    )
    def set_option(self, line, option, inside):
        self.do("set_option", line, *option, inside)

    @precondition(lambda self: not self.over)
    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def to(self, dtype):
        self.do("to", dtype)

    @precondition(lambda self: not self.over)
    @rule(active=st.integers(1, LAYERS) | st.sampled_from([0.2, 0.5, 1.0]))
    def set_active(self, active):
        if uses_active(self.chosen["allocator"]) and not self.leader.closed:
            if isinstance(active, int):
                active = min(active, len(self.leader.optimizer.groups))
            self.active = active
            self.do("set_active", active)

    @precondition(lambda self: not self.over and self.leader.frozen)
    @rule()
    def unfreeze(self):
        self.newcomers("unfreeze", self.leader.frozen[0])

    @precondition(lambda self: not self.over and len(self.leader.model.blocks) < MOST_LAYERS)
    @rule()
    def append_layer(self):
        self.newcomers("append_layer")

    def newcomers(self, move: str, *arguments: Any) -> None:
        closed = self.leader.closed
        before = [] if closed else self.leader.optimizer.groups
        everyone = not closed and self.leader.optimizer.active_groups == before
        self.do(move, *arguments)
        new = 0 if closed else len(self.leader.optimizer.groups) - len(before)
        if new and everyone:  # all are active, so the new ones are too
            self.selected_at.append(self.steps)
            self.size = None if self.size is None else self.size + new
        elif new:
            self.newcomer_waits = True

    @precondition(lambda self: not (self.over or self.leader.closed))
    @rule(data=st.data())
    def hold(self, data):
        groups = self.leader.optimizer.groups
        held = data.draw(st.lists(st.sampled_from(groups), min_size=1, unique=True))
        if set(held) != set(self.leader.optimizer.active_groups):
            self.selected_at.append(self.steps)
        for run in (self.leader, self.follower):
            run.optimizer.hold(held)
        self.held, self.size = True, len(held)

    # Moves that leave no trace

    @precondition(lambda self: not self.over)
    @rule(mode=st.sampled_from([(False, False), (False, True), (True, False)]))
    def evaluate(self, mode):
        self.do("evaluate", *mode, quiet="")

    @precondition(lambda self: not self.over)
    @rule()
    def round_trip(self):
        self.do("round_trip", quiet="" if self.leader.loading_leaves_no_trace() else None)

    @precondition(lambda self: not self.over)
    @rule(
        how=st.sampled_from(["deepcopy", "pickle", "average"]),
        interrupted=st.none() | st.integers(0, MOST_LAYERS),
    )
    def train_a_copy_of_the_model(self, how, interrupted):
        if interrupted is not None:
            (number,) = self.take_batches(1)
            self.do("fail", "interrupt", interrupted, number)
        ours, plain = self.leader.trained_copy(how), self.plain.trained_copy(how)
        for name, weight in plain.items():
            assert_equal(ours[name], weight, f"{name} of the copy")

    # Lives: closing, taking over, files, copies of all

    @precondition(lambda self: not (self.over or self.leader.closed))
    @rule()
    def close(self):
        self.do("close")

    @precondition(lambda self: not self.over)
    @rule(how=st.sampled_from(["same inner", "new inner"]), regroups=st.booleans())
    def take_over(self, how, regroups):
        self.do("take_over", how, regroups)
        self.active, self.held = self.chosen["active"], False
        self.begin_ledger()

    def ledger(self) -> dict[str, Any]:
        names = ("steps", "active_sum", "selected_at", "size", "newcomer_waits", "active", "held")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    @precondition(lambda self: not (self.over or self.leader.closed))
    @rule()
    def save(self):
        runs = (self.leader, self.plain)
        files = [(run.shape(), run.saved()) for run in runs]
        self.snapshot = files, self.ledger(), self.leader.optimizer.groups

    @precondition(lambda self: not (self.over or self.leader.closed) and self.snapshot)
    @rule(used=st.booleans())
    def go_on_from_the_file(self, used):
        files, ledger, _ = self.snapshot
        self.leader, self.plain = (Loop.resumed(*file, used=used) for file in files)
        self.follower = Loop.resumed(*files[0])
        vars(self).update(copy.deepcopy(ledger))

    @precondition(lambda self: not (self.over or self.leader.closed))
    @rule(used=st.booleans())
    def save_and_go_on(self, used):
        former, self.follower = self.leader, self.leader
        former.zero_grad(True)
        if not former.loading_leaves_no_trace():
            former.round_trip()
        self.leader = Loop.resumed(former.shape(), former.saved(), used=used)
        self.plain = Loop.resumed(self.plain.shape(), self.plain.saved(), used=used)

    @precondition(lambda self: not (self.over or self.leader.closed) and self.snapshot)
    @rule()
    def roll_back(self):
        (ours, plain), ledger, groups = self.snapshot
        now, then = self.leader.shape(), ours[0]
        assume(all(now[key] == then[key] for key in ("frozen", "added")))
        assume(self.leader.optimizer.groups == groups)  # others are refused
        for run, (_, file) in ((self.leader, ours), (self.follower, ours), (self.plain, plain)):
            run.load(torch.load(io.BytesIO(file), weights_only=True))
        vars(self).update(copy.deepcopy(ledger))

    @precondition(lambda self: not self.over)
    @rule(go_on_with_copy=st.booleans())
    def deepcopy(self, go_on_with_copy):
        twin = copy.deepcopy(self.leader)
        if go_on_with_copy:  # which has no gradients
            self.leader, twin = twin, self.leader
            self.plain = copy.deepcopy(self.plain)
            self.follower.zero_grad(True)
            self.leader.pending = self.plain.pending = False
        self.left_behind.append((twin, weights(twin)))

    # Laws

    @invariant()
    def all_is_equal(self):
        if self.over or not hasattr(self, "leader"):
            return
        self.impose()
        ours, plain = self.leader, self.plain
        idle = set(ours.model.names()) - self.trained()
        others = dict(plain.model.named_parameters())
        grads, state = plain.gradients(), plain.inner_state()
        owners = {id(p): name for name, params in ours.model.groups().items() for p in params}
        for name, parameter in ours.model.named_parameters():
            assert_equal(parameter.detach(), others[name].detach(), name)
            if owners.get(id(parameter)) not in idle:
                assert_equal(parameter.grad, grads[name], f"gradient of {name}")
        for mine, its in zip(
            ours.optimizer.param_groups, plain.optimizer.param_groups, strict=True
        ):
            for key in its.keys() - {"params"}:
                assert_equal(mine[key], its[key], key)
            assert mine.keys() - its.keys() <= {PACKED, "differentiable"}  # a default since loading
        self.state_is_equal(ours.inner_state()["state"], state["state"])
        assert ours.scaler.state_dict() == plain.scaler.state_dict()
        for mine, its in zip(ours.schedulers, plain.schedulers, strict=True):
            assert mine.get_last_lr() == its.get_last_lr()

    def state_is_equal(self, ours: dict[int, Any], plain: dict[int, Any]) -> None:
        # A fused rule makes its state also in a step that the scaler skips.
        unused = {key for key, values in plain.items() if values.get("step", 1) == 0}
        assert plain.keys() - unused <= ours.keys() <= plain.keys()
        for key, values in ((key, plain[key]) for key in ours):
            assert ours[key].keys() == values.keys()
            for name, value in values.items():
                assert_equal(ours[key][name], value, f"state {key} {name}")

    @invariant()
    def the_follower_chooses_the_same(self):
        if self.over or not hasattr(self, "leader"):
            return
        ours, other = self.leader, self.follower
        mine = dict(ours.model.named_parameters())
        for name, weight in other.model.named_parameters():
            assert_equal(mine[name].detach(), weight.detach(), name)
        if not ours.closed:
            mine, its = ours.optimizer, other.optimizer
            assert mine.record.state_dict() == its.record.state_dict()
            # As text: a probe that met an overflow holds a nan, which equals nothing. Sorted: who
            # was built again has modules in their order, which others have joined in another one.
            scores = [sorted(one.tracker.scores().items()) for one in (mine, its)]
            assert str(scores[0]) == str(scores[1])
            assert mine.active_groups == its.active_groups
            rates = zip(mine.learning_rates(), its.learning_rates(), strict=True)
            assert all(a == b or a != a or b != b for a, b in rates)  # nan since it was loaded

    @invariant()
    def the_active_set_is_of_the_right_size(self):
        if self.over or not hasattr(self, "leader") or self.leader.closed:
            return
        optimizer = self.leader.optimizer
        groups, active = optimizer.groups, optimizer.active_groups
        assert groups == [name for name in self.leader.model.names() if name in set(groups)]
        assert active == [name for name in groups if name in set(active)]
        assert len(active) >= 1
        if uses_active(self.chosen["allocator"]):
            assert optimizer.active == self.active
        assert self.size in (None, len(active))

    @invariant()
    def the_record_follows_the_schedule_and_counts_the_steps(self):
        if self.over or not hasattr(self, "leader") or self.leader.closed:
            return
        record = self.leader.optimizer.record
        assert [entry.step for entry in record] == self.selected_at
        assert sum(record.counts().values()) == self.active_sum
        assert record[-1].chosen == tuple(self.leader.optimizer.active_groups)

    @invariant()
    def importance_sums_to_one(self):
        if self.over or not hasattr(self, "leader") or self.leader.closed:
            return
        importance = self.leader.optimizer.tracker.importance()
        assert sum(importance.values()) == pytest.approx(1.0)
        assert importance.keys() == set(self.leader.optimizer.groups)

    def teardown(self):
        for run, before in getattr(self, "left_behind", ()):
            for name, weight in weights(run).items():
                assert_equal(weight, before[name], name)


def weights(run: Loop) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


class InFreshProcesses(TrainingScript):
    """The same, and a run that goes on in another process."""

    @precondition(lambda self: not (self.over or self.leader.closed or self.leader.pending))
    @precondition(lambda self: self.leader.loading_leaves_no_trace())
    @rule()
    def go_on_in_another_process(self):
        first, twin = self.take_batches(3)[0], copy.deepcopy(self.leader)
        with tempfile.TemporaryDirectory() as folder:
            run = (self.leader.shape(), self.leader.saved(), first, 3)
            Path(folder, "run").write_bytes(pickle.dumps(run))
            finished(start(Path(__file__).with_name("training_loop.py"), folder))
            end = pickle.loads(Path(folder, "end").read_bytes())
        here = go_on(twin, first, 3)
        assert here["record"] == end["record"]
        for name, weight in here["weights"].items():
            assert_equal(end["weights"][name], weight, name)


quiet = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step", "ignore:Seems like", "ignore:.*epoch parameter"
)


def scripts() -> settings:
    """The same scripts each time in the profiles with few of them; new ones in the deep profile."""
    few = settings().max_examples < 1000
    return settings(stateful_step_count=30, derandomize=few)


@quiet
def test_any_script_does_what_it_does_with_the_plain_optimizer():
    run_state_machine_as_test(TrainingScript, settings=scripts())


SMALL: dict[str, Any] = {
    "kind": "blocks",
    "rule": "adamw",
    "schedule": "one_cycle",
    "schedule_inner": False,
    "frozen": 1,
    "holds_frozen": True,
    "checkpoints": "",
    "checkpoint_idle": False,
    "measure": ForwardNorm(),
    "window": "run",
    "every": 1,
    "probe": False,
    "allocator": "discounted",
    "active": 2,
    "period": 2,
    "seed": 5,
    "warmup": 0,
    "lr_time": "local",
    "pause": {"state": "keep", "moments": "reset_momentum", "warmup": 3},
}


@quiet
def test_a_script_goes_on_in_another_process():
    script = InFreshProcesses()
    script.begin(chosen=SMALL)
    for how, schedule in (("plain", True), ("closure", False), ("save between", True)):
        script.train(micro_batches=2, how=how, schedule=schedule)
    script.go_on_in_another_process()
    script.teardown()


@quiet
@pytest.mark.slow
def test_any_script_goes_on_in_another_process():
    examples = max(10, settings().max_examples // 10)
    run_state_machine_as_test(
        InFreshProcesses, settings=settings(max_examples=examples, stateful_step_count=30)
    )
