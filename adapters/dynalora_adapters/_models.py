"""The parts of a model: its modules by name, its adapters, and the owners of parameters."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dynalora_adapters._bases import is_conv1d, linear_shape
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._torch_private import children, original, plain_name

_TASKS = {  # the end of a transformers class name -> peft's task_type
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Seq2Seq": "SEQ_2_SEQ_LM",
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = original(model)
        if inner is None and isinstance(model, (DistributedDataParallel, DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def module_tree(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module below the model by dotted name, parents first.

    A module that has several names appears under each. Modules inside an adapter do not appear, so
    that a model has the same names with and without adapters.
    """
    tree: dict[str, nn.Module] = {}
    adapters: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        name = plain_name(path)
        if not name or inside(name, adapters):
            continue
        tree[name] = module
        if isinstance(module, AdapterLinear):
            adapters.add(name)
    return tree


def first_names(tree: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Keep only the first name of each module."""
    first: dict[nn.Module, str] = {}
    for name, module in tree.items():
        first.setdefault(module, name)
    return {name: module for module, name in first.items()}


def adapters_of(model: nn.Module) -> dict[str, AdapterLinear]:
    """Return the model's adapters, each under its first name."""
    modules = first_names(module_tree(model))
    return {name: module for name, module in modules.items() if isinstance(module, AdapterLinear)}


def require_adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    """Return the model's adapters, or raise ValueError if there is none."""
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError(
            f"model ({type(model).__name__}) holds no adapters; call inject(model, config) first."
        )
    return adapters


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return, for the id of every parameter, its names in different modules."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(prefix, recurse=False):
            owners.setdefault(id(param), []).append(name)
    return owners


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace ``module`` by ``new[module]`` wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in children(parent):
            if child in new and new[child] is not parent:
                setattr(parent, name, new[child])


def inside(name: str, names: Container[str]) -> bool:
    """Whether ``name`` is one of ``names``, or the name of a module inside one of them."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))


def task_type(model: nn.Module) -> str | None:
    """Return peft's task type of the model, found by the end of its class name."""
    kind = type(model).__name__
    return next((task for end, task in _TASKS.items() if kind.endswith(end)), None)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head, which "all-linear" does not adapt."""
    embeddings = getattr(model, "get_output_embeddings", None)
    head = embeddings() if callable(embeddings) else None
    if head is None and task_type(model) == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head if isinstance(head, nn.Module) else None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether "all-linear" adapts a module of this class."""
    return linear_shape(module) is not None and (isinstance(module, nn.Linear) or is_conv1d(module))
