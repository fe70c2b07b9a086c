"""What the user should know about an adapted model, although it is no mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from dynalora_adapters._bases import linear_shape
from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._models import first_names, inside, module_tree
from dynalora_adapters._reads import read_layers
from dynalora_adapters._targets import Plan, ends, is_all_linear, matches
from dynalora_adapters._tasks import new_heads, output_head

# The projections that a fused parameter holds, as users know them from the unfused layers.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}


def notices(model: nn.Module, config: AdapterConfig, plan: Plan) -> Iterator[str]:
    """Yield a line for each thing that a plan leaves frozen, although one may expect otherwise."""
    tree = first_names(module_tree(model))
    yield from _read_past(model, tree, config, plan)
    yield from _frozen_experts(tree, config)
    yield from _frozen_heads(model, tree, config, plan)


def _read_past(
    model: nn.Module, tree: Mapping[str, nn.Module], config: AdapterConfig, plan: Plan
) -> Iterator[str]:
    read = read_layers(model)
    past = [n for n, m in tree.items() if m in read and linear_shape(m) is not None]
    if is_all_linear(config.targets):
        head = output_head(model)
        odd = [n for n, m in tree.items() if isinstance(m, nn.Linear) and linear_shape(m) is None]
        if past := [n for n in past if tree[n] is not head and isinstance(tree[n], nn.Linear)]:
            yield (
                f'targets="all-linear" leaves out {few(past)}: the model reads their weight '
                f"without calling them, at least in some cases, and an adapter has no effect there."
            )
        if odd:
            yield (
                f'targets="all-linear" leaves out {few(odd)}: their class computes something else '
                f"than nn.Linear."
            )
    elif past := [n for n in past if n in plan.bases]:
        yield (
            f"targets matches {few(past)}, whose weight the model reads without calling the "
            f"layer in some cases, such as a fused kernel: the adapter has no effect there. "
            f"Leave them out with exclude={ends(past)!r}."
        )


def _frozen_experts(tree: Mapping[str, nn.Module], config: AdapterConfig) -> Iterator[str]:
    fused = [name for name in fused_experts(tree) if _meant(config, name)]
    if fused:
        yield (
            f"{few(fused)} hold the experts of a layer in one parameter and stay frozen. To adapt "
            f"them, use peft.LoraConfig(target_parameters={ends(fused)!r}, ...) instead of inject: "
            f"the optimizer drives peft's layers with the same line."
        )


def fused_experts(tree: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the parameters that hold the weights of several experts."""
    found = []
    for name, module in tree.items():
        if linear_shape(module) is None and (
            "expert" in type(module).__name__.lower() or name.rpartition(".")[2] == "experts"
        ):
            own = module.named_parameters(recurse=False)
            found += [f"{name}.{param}" for param, value in own if value.dim() == 3]
    return found


def _meant(config: AdapterConfig, name: str) -> bool:
    """Whether ``targets`` would match a fused parameter, or a projection inside it."""
    if is_all_linear(config.targets):
        return not matches(config.exclude, name.rpartition(".")[0])
    owner, _, leaf = name.rpartition(".")
    words = (leaf, *_FUSED.get(leaf, ()))
    return any(matches(config.targets, f"{owner}.{word}") for word in words)


def _frozen_heads(
    model: nn.Module, tree: Mapping[str, nn.Module], config: AdapterConfig, plan: Plan
) -> Iterator[str]:
    free = {name for name, module in tree.items() if module in set(plan.trainable)}
    frozen = [n for n in new_heads(model) if not _all_inside(n, tree, free)]
    if frozen:
        yield (
            f"{few(frozen)}: the head of {type(model).__name__} stays frozen. If it is new (its "
            f"first weights are random), pass trainable={[*config.trainable, *frozen]!r}: then it "
            f"is trained and saved."
        )


def _all_inside(name: str, tree: Mapping[str, nn.Module], free: set[str]) -> bool:
    """Whether every parameter of the module belongs to one of the trainable modules."""
    params = [f"{name}.{n}".rpartition(".")[0] for n, _ in tree[name].named_parameters()]
    return all(inside(param, free) for param in params)


def few(names: list[str]) -> str:
    """Return the first three of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
