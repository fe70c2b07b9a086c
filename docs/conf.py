"""How the pages are built: ``tox run -e docs``. Every warning is an error; nothing is fetched."""

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

# The modules whose ``__all__`` is the public interface, each name documented at the first of them.
PUBLIC = (
    "dynalora_optim",
    "dynalora_optim.allocation",
    "dynalora_optim.importance",
    "dynalora_optim.memory",
    "dynalora_optim.integrations.transformers",
    "dynalora_optim.integrations.ddp",
    "dynalora_adapters",
)

nitpicky = True
nitpick_ignore_regex = [
    # Of other projects: their pages are on the network, which a build does without.
    (r"py:.*", r"(torch|nn|transformers|collections|typing|os|pathlib|random)\..*"),
    (r"py:.*", r"Optimizer|Tensor|LambdaLR|TrainingArguments|TrainerCallback"),
    # Unions with a short name; the docstrings say what they allow.
    (r"py:.*", r"Batch|Factor|GroupRule|ImportanceMeasure|Loss|LrTime|MakeOptimizer"),
    (r"py:.*", r"Rounding|WindowSpec"),
    # What a user neither makes nor calls.
    (r"py:.*", r"Projections|dynalora_adapters\._config\.AdapterConfig"),
]

default_role = "py:obj"  # `Budget` in a docstring is a link
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    # Of our own base classes, and not of these.
    "inherited-members": "Optimizer,Module,TorchDispatchMode,TrainerCallback,Sequence,Protocol",
}
napoleon_use_ivar = True  # "Attributes:" is a list, no entries of their own
napoleon_use_rtype = False


def home_of(name: str) -> str | None:
    """Return the public module at which ``name`` is documented: the first that exports it."""
    for module in PUBLIC:
        if name in importlib.import_module(module).__all__:
            return module
    return None


def document_once(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what an earlier public module documents, and fields: "Attributes:" has those."""
    module = app.env.temp_data["autodoc:module"]
    if what == "module" and home_of(name) not in (None, module):
        return True
    if what == "class" and not isinstance(thing, (property, classmethod, staticmethod)):
        return True if isinstance(thing, type) or not callable(thing) else None
    return None


def require_docstring(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Warn, which fails the build, where a public thing has no docstring."""
    if not any(lines) and what not in ("attribute", "data"):
        logger.warning("%s has no docstring", name)


def resolve_private_path(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.reference | None:
    """Link a public name, in whatever module it is defined, to its place in the reference.

    Annotations name the private module of a class, and docstrings its bare name.
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
