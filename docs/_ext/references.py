"""Directives that cut reference pages out of the code, so that they cannot go stale.

- ``bittern-hooks``: the hooks whose names begin with the words given.
- ``bittern-cli``: the help text of every command.
- ``bittern-table``: what core registers in one table of the registry.
- ``bittern-conformance``: a conformance class and its tests.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from bittern.cli.main import COMMANDS, make_cli

WIDTH = 88  # columns of a help text
SETTINGS = Config(napoleon_use_ivar=True, napoleon_use_rtype=False, napoleon_attr_annotations=False)


class Docstring(GoogleDocstring):
    """A Google docstring whose ``Returns:`` is prose: a colon in it introduces no type."""

    def _consume_returns_section(self, preprocess_types: bool = False) -> list[Any]:
        return [("", "", self._dedent(self._consume_to_next_section()))]


def translate(app: Sphinx, *about: Any) -> None:
    """Turn the Google docstrings that autodoc finds into reStructuredText."""
    *what, lines = about
    lines[:] = Docstring(lines, SETTINGS, app, *what).lines()


class Generated(SphinxDirective):
    """A directive whose content is made by `lines`, as reStructuredText."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the parsed lines."""
        found = nodes.Element()
        source = self.get_source_info()[0]
        lines = StringList(list(self.lines(self.arguments[0])), source)
        self.state.nested_parse(lines, 0, found)
        return found.children

    def lines(self, argument: str) -> Iterator[str]:
        """Yield the text that stands for the directive."""
        raise NotImplementedError


def shorten(_: Sphinx, what: str, name: str, obj: Any, *about: Any) -> tuple[str, None] | None:
    """Write a record's fields as its source does: autodoc spells out every module."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return None
    fields = [field for field in dataclasses.fields(obj) if field.init]
    parts = [f"{f.name}: {f.type}{_default(f)}" for f in fields]
    keywords = [index for index, field in enumerate(fields) if field.kw_only]
    if keywords:
        parts.insert(keywords[0], "*")
    return f"({', '.join(parts)})", None


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    return "" if field.default is dataclasses.MISSING else f" = {field.default!r}"


# --- hooks ----------------------------------------------------------------------------------------


class Hooks(Generated):
    """Hooks by the first words of their names: signature, kind, who implements it, docstring."""

    def lines(self, argument: str) -> Iterator[str]:
        """Yield one function per hook, in the order of the specs."""
        from bittern.cli.hookdocs import hook_docs
        from bittern.hooks import specs

        for doc in hook_docs():
            if doc.name.partition("_")[0] not in argument.split():
                continue
            function = getattr(specs, doc.name)
            parameters = ", ".join(f"{name}: {kind}" for name, kind in doc.arguments.items())
            yield f".. py:function:: {doc.name}({parameters}) -> {doc.returns}"
            yield ""
            reserved = " :bdg:`reserved: not called by this version`" * doc.reserved
            yield f"   :bdg:`{doc.kind}`{reserved}"
            yield ""
            text = (inspect.getdoc(function) or "").replace(" Reserved.", "", 1)
            for line in Docstring(text, SETTINGS).lines():
                yield f"   {line}".rstrip()
            yield ""


# --- the command line -----------------------------------------------------------------------------


class CommandLine(SphinxDirective):
    """The help text of ``bittern``, and a section for every command of core."""

    def run(self) -> list[nodes.Node]:
        """Return the texts as a terminal shows them, without any plugin's commands."""
        root = core_commands()
        context = _context(root, None, "bittern")
        found: list[nodes.Node] = [_terminal(root.get_help(context))]
        for name in COMMANDS:
            section = nodes.section(ids=[nodes.make_id(name)], names=[f"bittern {name}"])
            section += nodes.title(text=name)
            section += [_terminal(text) for text in _help_texts(root, context, name)]
            self.state.document.note_implicit_target(section)
            found.append(section)
        return found


def _help_texts(group: click.Group, context: click.Context, name: str) -> Iterator[str]:
    command = group.get_command(context, name)
    assert command is not None
    own = _context(command, context, name)
    yield command.get_help(own)
    for below in command.list_commands(own) if isinstance(command, click.Group) else ():
        yield from _help_texts(command, own, below)


def _terminal(text: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="text")


def _context(command: click.Command, parent: click.Context | None, name: str) -> click.Context:
    settings = {"terminal_width": WIDTH, "max_content_width": WIDTH, **command.context_settings}
    return click.Context(command, parent=parent, info_name=name, **settings)


def core_commands() -> click.Group:
    """Return the root group with core's commands only."""
    root = make_cli()
    root._collected = True  # plugins are not asked
    return root


# --- what core registers --------------------------------------------------------------------------


class Table(Generated):
    """The records of one table of the registry that core itself registers."""

    def lines(self, argument: str) -> Iterator[str]:
        """Yield a table of names and descriptions."""
        from bittern.builtin import hooks
        from bittern.hooks.discovery import PluginOptions
        from bittern.hooks.manager import PluginManager
        from bittern.registry import Registry

        registry = Registry(PluginManager(PluginOptions(), builtin=hooks, records=()))
        table = getattr(registry, argument)
        yield from _list_table({f"``{name}``": table.get(name).description for name in table})


def _list_table(
    rows: dict[str, str], *, head: tuple[str, str] | None = None, widths: str = "25 75"
) -> Iterator[str]:
    yield ".. list-table::"
    yield f"   :widths: {widths}"
    yield "   :width: 100%"
    yield "   :class: names"
    if head is not None:
        yield "   :header-rows: 1"
    yield ""
    for left, right in [*([head] if head is not None else []), *rows.items()]:
        yield f"   * - {left}"
        yield f"     - {right}"
    yield ""


# --- the conformance kit --------------------------------------------------------------------------


class Conformance(Generated):
    """A conformance class: its docstring, and what each of its tests protects users from."""

    def lines(self, argument: str) -> Iterator[str]:
        """Yield the class and a table of its tests."""
        cls = getattr(import_module("bittern.testing"), argument)
        yield f".. autoclass:: bittern.testing.{argument}"
        yield "   :no-index-entry:"
        yield f"   :members: {', '.join(_overridable(cls))}"
        yield ""
        tests = {f"``{name}``": text for name, text in standard_tests(cls).items()}
        yield from _list_table(tests, head=("test", "protects"), widths="45 55")


def _overridable(cls: type) -> list[str]:
    """Return the methods that a class has for its subclasses, beside its cases."""
    return [
        name
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith(("_", "test_")) and name != "cases"
    ]


def standard_tests(cls: type) -> dict[str, str]:
    """Return the tests of a conformance class, its bases' first, and what they protect from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for name, function in vars(base).items():
            if name.startswith("test_") and inspect.isfunction(function):
                text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
                found[name] = text.removeprefix("Protects ")
    return found


# --- cross references -----------------------------------------------------------------------------


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Find an object by its last name.

    Annotations name it where it is defined, pages document it where users import it from.
    """
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    last = str(node["reftarget"]).rpartition(".")[2]
    matches = [name for name in objects if name.rpartition(".")[2] == last]
    if len(matches) != 1:
        return None
    found = objects[matches[0]]
    return make_refnode(
        app.builder, node["refdoc"], found.docname, found.node_id, content, matches[0]
    )


def badge(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """Return a small label: ``:bdg:`first answer```."""
    return [nodes.inline(rawtext, text, classes=["badge"])], []


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("bittern-hooks", Hooks)
    app.add_directive("bittern-cli", CommandLine)
    app.add_directive("bittern-table", Table)
    app.add_directive("bittern-conformance", Conformance)
    app.add_role("bdg", badge)
    for kind in PyObject.doc_field_types:
        if kind.name == "variable":
            kind.label = "Attributes"
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", translate)
    app.connect("missing-reference", resolve)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
