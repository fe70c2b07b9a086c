"""Costs as plain dicts and lists, as a state dict holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

from dynalora_optim.allocation._costs import BlockCost, BlockUses, Costs, Use
from dynalora_optim.allocation._loop import Loop
from dynalora_optim.allocation._resident import Resident


def saved_costs(costs: Costs) -> dict[str, Any]:
    """Return the numbers as plain dicts and lists."""
    loop = {**asdict(costs.loop), "followers": list(map(saved_costs, costs.loop.followers))}
    lists = {
        "own": [list(stretch) for stretch in costs.own],
        "order": list(costs.order),
        "routes": [saved_costs(route) for route in costs.routes],
    }
    return {**asdict(costs), "pinned": sorted(costs.pinned), "loop": loop, **lists}


def restored_costs(state: Mapping[str, Any], *, modules: int) -> Costs:
    """Return the costs from which `saved_costs` made ``state``, if they are of so many modules.

    Raises:
        ValueError: ``state`` has another form, is of other modules, or has values that are not
            numbers of bytes and FLOPs.
    """
    try:
        costs = Costs(
            **{
                **state,
                "blocks": tuple(map(_block_cost, state["blocks"])),
                "group_blocks": tuple(state["group_blocks"]),
                "pinned": frozenset(state["pinned"]),
                "head": Use(**state["head"]),
                "prefix": Use(**state["prefix"]) if state["prefix"] else None,
                "own": tuple((first, stop) for first, stop in state.get("own", ())),
                "order": tuple(state.get("order", ())),
                "routes": tuple(
                    restored_costs(route, modules=len(route["group_blocks"]))
                    for route in state.get("routes", ())
                ),
                "loop": _loop(state["loop"], modules),
            }
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"state_dict has costs of another form: {error!r}.") from error
    _check(costs, modules)
    return costs


def _loop(state: Mapping[str, Any], modules: int) -> Loop:
    followers = tuple(restored_costs(costs, modules=modules) for costs in state["followers"])
    resident = Resident(**state["resident"])
    return Loop(**{**state, "followers": followers, "resident": resident})


def _check(costs: Costs, modules: int) -> None:
    may_lack = {"group_blocks", "prefix", "routes", "loop"}  # and what is checked by itself
    parts = [getattr(costs, f.name) for f in fields(costs) if f.name not in may_lack]
    parts += [part for part in (*costs.group_blocks, costs.prefix) if part is not None]
    parts.append(replace(costs.loop, followers=()))
    numbers = _numbers(tuple(parts))
    if (
        not all(type(n) in (bool, int) and 0 <= n < 2**63 for n in numbers)
        or len(costs.group_blocks) != modules
        or not {*costs.group_blocks, *costs.pinned} <= {None, *range(len(costs.blocks))}
        or any(len(other.blocks) != len(costs.blocks) for other in costs.loop.followers)
        or sorted(costs.order) not in ([], [*range(len(costs.blocks))])
        or any(len(route.blocks) != len(costs.blocks) for route in costs.routes)
        or not costs.flops(costs.all_active)
    ):
        raise ValueError("state_dict has costs of other modules, or no costs at all.")


def _numbers(tree: Any) -> Iterator[Any]:
    """Yield the values in nested dataclasses, tuples and sets; they should all be numbers."""
    if is_dataclass(tree):
        tree = tuple(getattr(tree, field.name) for field in fields(tree))
    if isinstance(tree, (tuple, frozenset)):  # not a list: it is yielded, so that the check fails
        for item in tree:
            yield from _numbers(item)
    else:
        yield tree


def _block_cost(state: Mapping[str, Any]) -> BlockCost:
    roles = {name: _block_uses(state[name]) for name in ("lowest", "active", "idle")}
    return BlockCost(**{**state, **roles})


def _block_uses(state: Mapping[str, Any]) -> BlockUses:
    full, checkpointed = Use(**state["full"]), Use(**state["checkpointed"])
    return BlockUses(full, checkpointed, state.get("beside", 0))
