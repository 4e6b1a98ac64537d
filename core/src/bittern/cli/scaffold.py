"""Renders the plugin template: a complete third-party plugin, with tests, that works as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from bittern._version import __version__
from bittern.errors import PluginError

__all__ = ["Scaffold", "render", "scaffold", "write"]

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
SUFFIX = ".tmpl"  # nothing here is Python before it is rendered
MADE_UP = "framework/"


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """The names in a new plugin.

    Attributes:
        name: The plugin's short name.
        target: Requirement of the framework; ``None`` makes one up and writes it too.
    """

    name: str
    target: str | None = None

    @property
    def distribution(self) -> str:
        """Name of the plugin's distribution."""
        return f"bittern-{self.name}"

    @property
    def package(self) -> str:
        """Import name of the plugin."""
        return self.distribution.replace("-", "_")

    def values(self) -> Mapping[str, str]:
        """Return what the placeholders of the template stand for."""
        made_up = f"{self.name}-framework"
        target = self.target or f"{made_up}>=1"
        framework = Requirement(target).name
        package = framework.replace("-", "_").replace(".", "_")
        version = Version(__version__)
        if self.target is None:
            install = "pip install -e framework -e '.[target,test]'"
            row = "| `framework/` | a made-up framework, so that there is something to quantize |\n"
        else:
            install = "pip install -e '.[target,test]'"
            row = f"\nThe classes of `{package}` in these files are examples: put the real ones.\n"
        return {
            "name": self.name,
            "distribution": self.distribution,
            "package": self.package,
            "core": f">={version.major}.{version.minor},<{version.major}.{version.minor + 1}",
            "target": target,
            "target_name": framework,
            "framework": package,
            "framework_distribution": made_up,
            "framework_row": row,
            "install": install,
        }


def scaffold(name: str, target: str | None = None) -> Scaffold:
    """Check the names of a new plugin.

    Args:
        name: The plugin's short name, as ``"heron"``.
        target: Requirement of the framework, as ``"heron-nn>=2"``.

    Raises:
        PluginError: A name is not allowed.
    """
    if name == "bittern" or name.startswith("bittern-"):
        short = name.removeprefix("bittern").removeprefix("-") or "heron"
        raise PluginError(
            f"{name!r} cannot be a plugin's name",
            hint=f"leave out bittern: {short!r} becomes the distribution bittern-{short}",
        )
    if not NAME.fullmatch(name):
        raise PluginError(
            f"{name!r} cannot be a plugin's name",
            hint="use small letters, digits and single dashes, a letter first, as in heron-nn",
        )
    if target is not None:
        try:
            Requirement(target)
        except InvalidRequirement as error:
            raise PluginError(
                f"--target {target!r} is no requirement: {error}",
                hint="write it as pip does, for example 'heron-nn>=2'",
            ) from error
    return Scaffold(name=name, target=target)


def render(plugin: Scaffold) -> dict[str, str]:
    """Return the files of a new plugin: path, with slashes, to content."""
    values = plugin.values()
    found = {}
    for path, source in _templates(files("bittern.cli").joinpath("template")):
        if plugin.target is not None and path.startswith(MADE_UP):
            continue
        name = path.replace("PACKAGE", values["package"]).replace("FRAMEWORK", values["framework"])
        found[name] = Template(source.read_text(encoding="utf-8")).substitute(values)
    return found


def write(plugin: Scaffold, folder: Path) -> list[str]:
    """Write a new plugin; the folder is whole or not there.

    Returns:
        The files, sorted.

    Raises:
        OutputError: The folder exists, or cannot be written.
    """
    from bittern.exporting import staged_directory

    rendered = render(plugin)
    with staged_directory(folder) as stage:
        for name, content in rendered.items():
            file = stage / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8", newline="\n")
    return sorted(rendered)


def _templates(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _templates(item, f"{prefix}{item.name}/")
        elif item.name.endswith(SUFFIX):
            yield prefix + item.name.removesuffix(SUFFIX), item
