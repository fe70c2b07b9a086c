"""What a model is for: its task, in peft's words, and its heads."""

from __future__ import annotations

import inspect

from torch import nn

from dynalora_adapters._bases import is_conv1d, linear_shape

_TASKS = {  # the end of a transformers class name -> peft's task_type
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Seq2Seq": "SEQ_2_SEQ_LM",
}
_SENSES = ("pixel_values", "input_features", "input_values")  # inputs that are not text
# The ends of the names of transformers' classes whose head is not part of a pretrained model.
_WITH_NEW_HEAD = ("Classification", "QuestionAnswering", "MultipleChoice", "Regression")
_HEAD_NAMES = ("classifier", "score", "head", "heads", "fc", "qa_outputs")


def task_type(model: nn.Module) -> str | None:
    """Return peft's task type of the model, None if none fits.

    It is found by the end of the class name. With a task type, peft's model passes ``input_ids``
    on by name, and for SEQ_2_SEQ_LM ``decoder_input_ids``: the model's forward must take them.
    """
    kind = type(model).__name__
    task = next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
    takes = inspect.signature(model.forward).parameters
    if "input_ids" not in takes:
        return None
    text = "decoder_input_ids" in takes and not any(name in takes for name in _SENSES)
    return None if task == "SEQ_2_SEQ_LM" and not text else task


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head, which "all-linear" does not adapt."""
    head = output_embeddings(model)
    if head is None and type(model).__name__.endswith("ForSequenceClassification"):
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head if isinstance(head, nn.Module) else None


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the embedding of the input tokens that a model of transformers tells."""
    return _told(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the head of a language model that a model of transformers tells."""
    return _told(model, "get_output_embeddings")


def _told(model: nn.Module, method: str) -> nn.Module | None:
    ask = getattr(model, method, None)
    try:
        found = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):  # a model without one need not define this
        return None
    return found if isinstance(found, nn.Module) else None


def new_heads(model: nn.Module) -> list[str]:
    """Return the names of the heads that a user of a pretrained model would train from scratch.

    In transformers' classes for classification and the like, this is all that is not the backbone.
    In other models it is what has the name of a head.
    """
    backbone = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if isinstance(backbone, nn.Module) and backbone is not model:
        named = type(model).__name__.endswith(_WITH_NEW_HEAD)
        heads = [n for n, m in model.named_children() if named and m is not backbone]
    elif hasattr(model, "get_output_embeddings"):
        heads = []
    else:
        heads = [name for name, _ in model.named_children() if name in _HEAD_NAMES]
    return [name for name in heads if any(True for _ in getattr(model, name).parameters())]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether "all-linear" adapts a module of this class."""
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and linear_shape(module) is not None
