"""Which gradients the search counts with what a block holds, and which with all moments.

In a loop that accumulates, the gradients of all that trains are alive in every moment. While it is
open what trains, those of a block count with what the block holds: the sum is right when the search
is over. If the forward and the backward differ in how many are alive, or other forwards follow,
that is the larger of both, and too much in some moments. Where it is known what trains, each moment
has its own.
"""

from __future__ import annotations

from dataclasses import replace

from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._partials import Problem


def gradients_of(problem: Problem) -> tuple[int, int, int]:
    """Return how many gradients of each parameter count with what a block holds.

    Also return the bytes of all gradients that count in the forward, and in the backward.
    """
    costs, loop = problem.costs, problem.costs.loop
    if problem.trained is None:
        return loop.waiting, 0, 0
    trained = costs.outer_gradients + costs.gradients(Plan(problem.trained))
    return 0, loop.standing * trained, loop.waiting * trained


def at_the_top(problem: Problem, base: int, lowest: int) -> int:
    """Return the most bytes alive after the blocks' forward, besides what the blocks hold.

    If it is open which blocks train, gradients of blocks count with what they hold, all of them in
    each moment; those of further forwards, too.
    """
    costs, loop = problem.costs, problem.costs.loop
    left = costs.left_beside + loop.stale
    forward, backward = costs.after_blocks(base)
    if problem.trained is not None:
        _, standing, waiting = gradients_of(problem)
        later = left + loop.later(problem.trained) if loop.followers else 0
        return max(forward + standing, backward + waiting, later)
    bare = replace(loop, followers=tuple(map(_without_gradients, loop.followers)))
    later = left + bare.later(range(lowest, len(costs.blocks))) if loop.followers else 0
    return max(forward, backward, later) + loop.waiting * costs.outer_gradients


def _without_gradients(costs: Costs) -> Costs:
    blocks = tuple(replace(block, gradients=0) for block in costs.blocks)
    routes = tuple(map(_without_gradients, costs.routes))
    loop = replace(costs.loop, standing=0, waiting=0, grows=False)
    bare = replace(costs, blocks=blocks, routes=routes, loop=loop)
    return replace(bare, head_gradients=0, prefix_gradients=0)
