"""Sphinx settings for ``tox run -e docs``. Every warning is an error; no network is needed."""

from __future__ import annotations

import importlib
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)

project = "dynalora-optim"
author = "The dynalora-optim authors"
copyright = author  # noqa: A001 (Sphinx's name)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project

# The modules whose ``__all__`` is the public interface. Each name is documented at the first.
PUBLIC = (
    "dynalora_optim",
    "dynalora_optim.allocation",
    "dynalora_optim.importance",
    "dynalora_optim.loss",
    "dynalora_optim.memory",
    "dynalora_optim.integrations.transformers",
    "dynalora_optim.integrations.ddp",
    "dynalora_adapters",
)

nitpicky = True
nitpick_ignore_regex = [
    # Names of other projects: their pages are on the network, which is not used here.
    (r"py:.*", r"(torch|nn|transformers|collections|contextlib|typing|os|pathlib|random)\..*"),
    (r"py:.*", r"Optimizer|Tensor|LambdaLR|TrainingArguments|TrainerCallback"),
    # Short names of union types; the docstrings say what they allow.
    (r"py:.*", r"Batch|CrossEntropy|Factor|GroupRule|ImportanceMeasure|Loss|LrTime|MakeOptimizer"),
    (r"py:.*", r"Rounding|WindowSpec"),
    # Names that a user neither creates nor calls.
    (r"py:.*", r"Projections|dynalora_adapters\._config\.AdapterConfig"),
]

default_role = "py:obj"  # `Budget` in a docstring is a link
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    # Inherited members are documented, except those of these classes.
    "inherited-members": "Optimizer,Module,TorchDispatchMode,TrainerCallback,Sequence,Protocol",
}
napoleon_use_ivar = True  # "Attributes:" is shown as a list, not as separate entries
napoleon_use_rtype = False


def home_of(name: str) -> str | None:
    """Return the public module that documents ``name``: the first one that exports it."""
    for module in PUBLIC:
        if name in importlib.import_module(module).__all__:
            return module
    return None


def document_once(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Skip names that an earlier module documents, and fields, which "Attributes:" lists."""
    module = app.env.temp_data["autodoc:module"]
    if what == "module" and home_of(name) not in (None, module):
        return True
    if what == "class" and not isinstance(thing, (property, classmethod, staticmethod)):
        return True if isinstance(thing, type) or not callable(thing) else None
    return None


def require_docstring(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Warn if a public name has no docstring. A warning makes the build fail."""
    if not any(lines) and what not in ("attribute", "data"):
        logger.warning("%s has no docstring", name)


def resolve_private_path(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.reference | None:
    """Link a public name to its place in the reference, in whatever module it is defined.

    Annotations contain the private module of a class; docstrings contain only its name.
    """
    target = node.get("reftarget", "").split(".")
    for length in (1, 2):  # Budget; Budget.select
        head, *rest = target[-length:]
        module = home_of(head) if target[-length:] else None
        if module is None:
            continue
        path = ".".join([module, head, *rest])
        found = env.domains["py"].find_obj(env, None, None, path, None)
        if found:
            _, entry = found[0]
            uri = app.builder.get_relative_uri(env.docname, entry.docname)
            return nodes.reference("", "", content, refuri=f"{uri}#{entry.node_id}", internal=True)
    return None


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("autodoc-skip-member", document_once)
    app.connect("autodoc-process-docstring", require_docstring)
    app.connect("missing-reference", resolve_private_path)
